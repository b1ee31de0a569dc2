"""What is wrong with a spec, in words: turns the schema's verdicts into problems at places."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from autocomp.core.errors import did_you_mean
from autocomp.spec.schema import Spec
from autocomp.spec.source import Parts, dotted

_TYPES = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "dict_type": "a mapping",
}
_BOUNDS = {
    "greater_than": ("gt", "must be above"),
    "greater_than_equal": ("ge", "must be at least"),
    "less_than": ("lt", "must be below"),
    "less_than_equal": ("le", "must be at most"),
}


def schema_problems(errors: Iterable[ErrorDetails], data: Any) -> list[tuple[Parts, str]]:
    """One problem per place, for pydantic's `errors` about `data`."""
    grouped: dict[Parts, list[ErrorDetails]] = {}
    for error in errors:
        grouped.setdefault(_place(error, data), []).append(error)
    deeper = {place[:n] for place in grouped for n in range(len(place))}
    return [
        (place, _describe(place, group))
        for place, group in grouped.items()
        # Leave out the branch of a union that did not apply where another failed further in.
        if not (place in deeper and all(len(error["loc"]) > len(place) for error in group))
    ]


def _place(error: ErrorDetails, data: Any) -> Parts:
    """The error's location without the tags pydantic adds for the branches of a union."""
    place: list[str | int] = []
    here: Any = data
    for part in error["loc"]:
        listed = isinstance(part, int) and isinstance(here, list)
        if listed or (isinstance(here, dict) and part in here):
            here = here[part]
            place.append(part)
    return (*place, error["loc"][-1]) if error["type"] == "missing" else tuple(place)


def _describe(place: Parts, errors: list[ErrorDetails]) -> str:
    first = errors[0]
    kind, value, context = first["type"], first["input"], first.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(place)
    if kind == "missing":
        field = _section(place[:-1]).model_fields[str(place[-1])]
        section = _model_in(field.annotation)
        meaning = field.description or (section.__doc__ if section else None) or ""
        return f"required, but missing. {meaning}".rstrip()
    expected = [_expected(error) for error in errors]
    if all(expected):
        wanted = " or ".join(dict.fromkeys(str(text) for text in expected))
        return f"expected {wanted}, got {_show(value)}{_hint(place, wanted, value)}"
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return f"{words} {context[name]}, got {_show(value)}"
    if kind == "too_short":
        return f"needs at least {context['min_length']} entry"
    if kind == "finite_number":
        return f"must be a finite number, got {_show(value)}"
    if kind == "value_error":
        return str(context["error"])
    return f"{first['msg']}, got {_show(value)}"


def _hint(place: Parts, wanted: str, value: Any) -> str:
    if "a list" in wanted and isinstance(value, str | int | float):
        return f"; write [{value}]"
    if wanted == "text" and isinstance(value, int | float):
        return "; put it in quotes"
    close = did_you_mean(value, _choices(place)) if isinstance(value, str) else ""
    return close and f".{close}"


def _expected(error: ErrorDetails) -> str | None:
    if error["type"] == "literal_error":
        words = str(error["ctx"]["expected"]).replace(" or ", ", ").replace("'", "")
        return f"one of {words}" if ", " in words else words
    return _TYPES.get(error["type"])


def _unknown_key(place: Parts) -> str:
    key, allowed = str(place[-1]), list(_section(place[:-1]).model_fields)
    elsewhere = [path for path in _all_places(Spec, ()) if path[-1] == key]
    hint = f" Did you mean {dotted(elsewhere[0])!r}?" if elsewhere else did_you_mean(key, allowed)
    return f"unknown key.{hint} Allowed: {', '.join(allowed)}"


def _all_places(model: type[BaseModel], above: Parts) -> list[Parts]:
    places: list[Parts] = []
    for name, field in model.model_fields.items():
        places.append((*above, name))
        if inner := _model_in(field.annotation):
            listed = (0,) if getattr(field.annotation, "__origin__", None) is list else ()
            places += _all_places(inner, (*above, name, *listed))
    return places


def _choices(place: Parts) -> list[str]:
    """The words a `Literal` allows at a place."""
    annotation: Any = Spec
    for part in place:
        if isinstance(part, str):
            model = _model_in(annotation)
            if model is None or part not in model.model_fields:
                return []
            annotation = model.model_fields[part].annotation
    return [word for word in _leaves(annotation) if isinstance(word, str)]


def _leaves(annotation: Any) -> list[Any]:
    arguments = get_args(annotation)
    return [leaf for a in arguments for leaf in _leaves(a)] if arguments else [annotation]


def _section(place: Parts) -> type[BaseModel]:
    """The schema of the section at a place."""
    model: type[BaseModel] = Spec
    for part in place:
        if isinstance(part, str):
            model = _model_in(model.model_fields[part].annotation) or model
    return model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for a in get_args(annotation) if (m := _model_in(a))), None)


def _show(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    return repr(value)
