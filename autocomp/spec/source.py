"""A spec file as written: plain data, with the line of every key. Finds what YAML lets pass.

Read by the rules of YAML 1.2: `no` and `2:4` are text, `1e-4` is a number. A key written twice is
an error. Every complaint about a spec, from any room, goes through `SpecSource`, so that it says
`file:line dotted.path: problem`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from autocomp.core.errors import SpecError, did_you_mean

Parts = tuple[str | int, ...]
"""A place in a spec: `("space", 0, "bits", "method")`."""

_TAG = "tag:yaml.org,2002:"
_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^[-+]?[0-9][0-9_]*$")
FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
"""What YAML 1.2 reads as a number (a superset of the integers)."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


_Loader.add_implicit_resolver(f"{_TAG}null", _NULL, ["~", "n", "N", ""])
_Loader.add_implicit_resolver(f"{_TAG}bool", _BOOL, list("tTfF"))
_Loader.add_implicit_resolver(f"{_TAG}int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver(f"{_TAG}float", FLOAT, list("-+.0123456789"))


@dataclass
class SpecSource:
    """The data of a spec file and where each part of it stands.

    Attributes:
        file: as the user named it.
        data: mappings, lists and scalars; whatever the file holds, not yet checked.
        lines: place → line of its key (or of its list entry), from 1.
        overridden: places set from outside the file; complaints about them name `--set`.
        problems: found before the schema is applied (keys written twice), raised with its own.
    """

    file: Path
    data: Any = None
    lines: dict[Parts, int] = field(default_factory=dict)
    overridden: set[Parts] = field(default_factory=set)
    problems: list[tuple[Parts, str]] = field(default_factory=list)

    @classmethod
    def read(cls, file: Path | str) -> SpecSource:
        """Read a file.

        Raises:
            SpecError: if it is missing, not text or not YAML.
        """
        source = cls(Path(file))
        try:
            text = source.file.read_text(encoding="utf-8-sig")
        except OSError as error:
            raise SpecError(_unreadable(source.file, error)) from error
        except UnicodeDecodeError as error:
            raise SpecError(f"{file}: not UTF-8 text (byte {error.start})") from error
        try:
            node = _Loader(text).get_single_node()
        except yaml.YAMLError as error:
            raise SpecError(_syntax(source.file, error)) from error
        source.data = None if node is None else source._build(node, (), ())
        return source

    def _build(self, node: yaml.Node, parts: Parts, above: tuple[int, ...]) -> Any:
        """Plain data of `node`, which stands at `parts`; `above` guards against cycles."""
        self.lines.setdefault(parts, node.start_mark.line + 1)
        if id(node) in above:
            self.problems.append((parts, "an alias that contains itself"))
            return None
        above = (*above, id(node))
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, parts, above)
        if isinstance(node, yaml.SequenceNode):
            return [self._build(item, (*parts, i), above) for i, item in enumerate(node.value)]
        return self._scalar(node, parts)

    def _mapping(
        self, node: yaml.MappingNode, parts: Parts, above: tuple[int, ...]
    ) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append((parts, f"line {line}: a key must be a word"))
                continue
            place = (*parts, key_node.value)
            if key_node.value in data:
                first = self.lines[place]
                again = "again on this line" if line == first else f"again on line {line}"
                self.problems.append((place, f"written twice: here and {again}. Keep one"))
                continue
            self.lines[place] = line
            data[key_node.value] = self._build(value_node, place, above)
        return data

    def _scalar(self, node: yaml.Node, parts: Parts) -> Any:
        text: str = node.value
        if node.tag == f"{_TAG}null":
            return None
        if node.tag == f"{_TAG}bool":
            return text.lower() == "true"
        if node.tag == f"{_TAG}int":
            return int(text)
        if node.tag == f"{_TAG}float":
            return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
        if node.tag != f"{_TAG}str":
            self.problems.append((parts, f"the YAML tag {node.tag!r} has no meaning here"))
        return text

    def override(self, overrides: Mapping[str, Any]) -> None:
        """Set values from outside the file, `{"search.trials": 3}`; sections are made as needed.

        Raises:
            SpecError: for a place that cannot be (an entry beyond a list, a key inside a number).
        """
        for name, value in overrides.items():
            parts = parse_dotted(name)
            if self.data is None:
                self.data = {}
            here = self.data
            for depth, part in enumerate(parts):
                last = depth == len(parts) - 1
                if isinstance(here, list) and isinstance(part, int):
                    if part >= len(here):
                        raise SpecError(
                            f"--set {name}: {dotted(parts[:depth])} has {len(here)} entries, "
                            f"the last is [{len(here) - 1}]"
                        )
                elif not isinstance(here, dict) or isinstance(part, int):
                    where = dotted(parts[:depth]) or "the spec"
                    if isinstance(here, list) and str(part).isdecimal():
                        raise SpecError(
                            f"--set {name}: {where} is a list; its entries are written "
                            f"{where}[{part}]"
                        )
                    kind = "a list" if isinstance(here, list) else "a mapping"
                    raise SpecError(
                        f"--set {name}: {where} is "
                        f"{kind if isinstance(here, dict | list) else repr(here)}; "
                        f"{dotted((part,))!r} does not exist in it"
                    )
                elif not last and here.get(part) is None:
                    here[part] = {}
                if last:
                    here[part] = value
                else:
                    here = here[part]
            self.overridden.add(parts)

    def is_overridden(self, place: str | Parts) -> bool:
        """Whether this place, or one around it, was set from outside the file."""
        parts = parse_dotted(place) if isinstance(place, str) else place
        return any(parts[: len(outer)] == outer for outer in self.overridden)

    def line(self, place: str | Parts) -> int:
        """The line of a key; of the closest section around it that is written, if it is not."""
        parts = parse_dotted(place) if isinstance(place, str) else place
        while parts and parts not in self.lines:
            parts = parts[:-1]
        return self.lines.get(parts, 1)

    def where(self, place: str | Parts) -> str:
        """`search_spaces/edge.yaml:11 space[0].bits.method`, or `--set space[0].bits.method`."""
        parts = parse_dotted(place) if isinstance(place, str) else place
        if self.is_overridden(parts):
            return f"--set {dotted(parts)}"
        return f"{self.file}:{self.line(parts)} {dotted(parts)}".rstrip()

    def error_at(self, place: str | Parts, message: str) -> SpecError:
        """The error to raise for what is wrong at one place."""
        return self.error([(place, message)])

    def error(self, problems: Iterable[tuple[str | Parts, str]]) -> SpecError:
        """One error for several problems, a line each, in the order of the file."""
        placed = [
            (parse_dotted(place) if isinstance(place, str) else place, message)
            for place, message in problems
        ]
        placed.sort(key=lambda item: (not self.is_overridden(item[0]), self.line(item[0])))
        return SpecError("\n".join(f"{self.where(parts)}: {text}" for parts, text in placed))


def dotted(parts: Parts) -> str:
    """`("space", 0, "bits")` → `space[0].bits`."""
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def parse_dotted(text: str) -> Parts:
    """`space[0].bits` → `("space", 0, "bits")`.

    Raises:
        SpecError: if the text is no such path.
    """
    if not re.fullmatch(r"[^.\[\]=\s]+(?:\[\d+\])*(?:\.[^.\[\]=\s]+(?:\[\d+\])*)*", text):
        raise SpecError(f"{text!r} is no path into a spec: write it like space[0].bits.method")
    found = re.findall(r"[^.\[\]]+", text)
    indices = [match.span() for match in re.finditer(r"\[\d+\]", text)]
    starts = {start + 1 for start, _ in indices}
    positions = [match.start() for match in re.finditer(r"[^.\[\]]+", text)]
    return tuple(
        int(word) if at in starts else word for word, at in zip(found, positions, strict=True)
    )


def parse_scalar(text: str) -> Any:
    """The value after `--set key=`, read as YAML: `3`, `0.5`, `true`, `[dense, 8]`, `25%`.

    Raises:
        SpecError: if it is not YAML.
    """
    source = SpecSource(Path("--set"))
    try:
        node = _Loader(text).get_single_node()
    except yaml.YAMLError as error:
        raise SpecError(f"--set: {text!r} is not a YAML value; put it in quotes") from error
    value = None if node is None else source._build(node, (), ())
    if source.problems:
        raise SpecError(f"--set: {text!r}: {source.problems[0][1]}")
    return value


_SHIPPED = "search_spaces/"
_LISTED = 8


def _specs(directory: Path) -> list[str]:
    found = directory.glob("*.y*ml") if directory.is_dir() else ()
    return sorted(file.name for file in found)


def _listed(opening: str, names: Sequence[str]) -> str:
    """The first few of these; empty for none."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{opening}{', '.join(names[:_LISTED])}{more}." if names else ""


def _unreadable(file: Path, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        beside = _specs(file.parent)
        hint = did_you_mean(file.name, beside) or _listed(" Specs there: ", beside)
        return f"{file}: no such file.{hint} Name a spec file: one to start from is in {_SHIPPED}"
    if isinstance(error, IsADirectoryError):
        inside = _specs(file)
        which = _listed(": it holds ", inside) or f"; those to start from are in {_SHIPPED}"
        return f"{file}: a directory; name a spec file{which}"
    return f"{file}: cannot be read: {error.strerror or error}"


def _syntax(file: Path, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    if "\\t" in problem:
        problem = "a tab cannot indent YAML; use spaces"
    context, started = getattr(error, "context", None), getattr(error, "context_mark", None)
    after = f" ({context}, begun on line {started.line + 1})" if context and started else ""
    place = f"{file}:{mark.line + 1}" if mark else str(file)
    return f"{place}: not valid YAML: {problem}{after}"
