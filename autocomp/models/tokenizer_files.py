"""Tokenizer files: which tokens any text needs, and the files of a pruned vocabulary. No torch.

`tokenizer.json` (Hugging Face tokenizers) is read and rewritten as plain JSON, for WordPiece,
WordLevel, BPE and Unigram models. A rewritten tokenizer gives the same tokens as the original
wherever the original's are all kept; other text it cuts into smaller pieces that are.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from autocomp.core.errors import ModelError
from autocomp.core.files import write_text_atomic
from autocomp.models.vocabulary import Vocabulary

Json = dict[str, Any]
TOKENIZER = "tokenizer.json"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def read_tokenizer(directory: Path) -> Json:
    """`tokenizer.json` in `directory`.

    Raises:
        ModelError: if there is none, or of another kind than those above.
    """
    path = directory / TOKENIZER
    try:
        data: Json = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path} cannot be read ({error}): pruning the vocabulary rewrites it. Save the "
            f"model's tokenizer as a fast one, or leave structure.vocabulary out"
        ) from None
    kind = data.get("model", {}).get("type")
    if kind not in ("WordPiece", "WordLevel", "BPE", "Unigram"):
        raise ModelError(
            f"{path}: a {kind} tokenizer cannot be pruned. Supported: WordPiece, WordLevel, BPE, "
            f"Unigram; leave structure.vocabulary out"
        )
    return data


class FileTokenizer:
    """`tokenizer.json` read by the tokenizers library alone, called as transformers' are.

    For counting tokens where importing transformers would take longer than the counting.
    """

    def __init__(self, directory: Path) -> None:
        """Raises ModelError: if `tokenizer.json` in `directory` is none."""
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(directory / TOKENIZER))
        except Exception as error:  # the library raises nothing narrower
            raise ModelError(f"{directory / TOKENIZER} cannot be loaded: {error}") from error
        self._tokenizer.no_padding()
        self._settings = _settings(directory)
        padding = self._settings.get("pad_token")
        if isinstance(padding, dict):
            padding = padding.get("content")
        self.pad_token_id = self._tokenizer.token_to_id(padding) if padding else None

    def __call__(
        self, texts: Sequence[str], *, max_length: int, **settings: Any
    ) -> dict[str, list[list[int]]]:
        """`input_ids` of each text, cut to `max_length`, special tokens included."""
        side = self._settings.get("truncation_side", "right")
        self._tokenizer.enable_truncation(max_length, direction=side)
        encoded = self._tokenizer.encode_batch(list(texts))
        return {"input_ids": [one.ids for one in encoded]}


def _settings(directory: Path) -> Json:
    """What `tokenizer_config.json` and, in older models, `special_tokens_map.json` say."""
    found: Json = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        try:
            said = json.loads((directory / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise ModelError(f"{directory / name} cannot be read as JSON: {error}") from error
        found |= {key: value for key, value in said.items() if value is not None}
    return found


def token_ids(tokenizer: Json) -> dict[str, int]:
    """Token → id, added tokens included."""
    model = tokenizer["model"]
    if model["type"] == "Unigram":
        ids = {piece: index for index, (piece, _) in enumerate(model["vocab"])}
    else:
        ids = dict(model["vocab"])
    return ids | {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}


def unknown_id(tokenizer: Json) -> int | None:
    """The id of what stands for unknown text, if the tokenizer has one."""
    model = tokenizer["model"]
    if model["type"] == "Unigram":
        unknown: int | None = model.get("unk_id")
        return unknown
    return token_ids(tokenizer).get(model.get("unk_token") or "")


def required_ids(tokenizer: Json, used: Iterable[int]) -> set[int]:
    """Ids to keep beside `used`: added and special tokens, and single characters and bytes, alone
    and as continuations, so that any text the tokenizer knew is still made of kept tokens. Of BPE
    also the tokens that kept ones are merged from."""
    model = tokenizer["model"]
    ids = token_ids(tokenizer)
    required = {token["id"] for token in tokenizer.get("added_tokens", [])}
    required |= {ids[token] for token in _special(tokenizer) if token in ids}
    unknown = unknown_id(tokenizer)
    if unknown is not None:
        required.add(unknown)
    if model["type"] != "WordLevel":
        prefix = model.get("continuing_subword_prefix") or ""
        suffix = model.get("end_of_word_suffix") or ""
        for token, index in ids.items():
            bare = token.removeprefix(prefix).removesuffix(suffix)
            if len(token) == 1 or len(bare) == 1 or _BYTE.fullmatch(token):
                required.add(index)
    if model["type"] == "BPE":
        required |= _merged_from(model, ids, required | set(used))
    return required


def _special(tokenizer: Json) -> list[str]:
    """Tokens that post-processors insert."""
    found: list[str] = []
    for part in _processors(tokenizer.get("post_processor")):
        found += part.get("special_tokens", {})
        found += [part[name][0] for name in ("sep", "cls") if name in part]
    return found


def _processors(part: Json | None) -> list[Json]:
    if part is None:
        return []
    if part.get("type") == "Sequence":
        return [inner for one in part["processors"] for inner in _processors(one)]
    return [part]


def _pairs(model: Json) -> list[tuple[str, str]]:
    return [
        tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]
    ]


def _joined(model: Json, left: str, right: str) -> str:
    return left + right.removeprefix(model.get("continuing_subword_prefix") or "")


def _merged_from(model: Json, ids: Mapping[str, int], kept: set[int]) -> set[int]:
    """Every token on the way to a kept one."""
    parts: dict[str, list[str]] = {}
    for left, right in _pairs(model):
        parts.setdefault(_joined(model, left, right), []).extend((left, right))
    tokens = {index: token for token, index in ids.items()}
    found: set[int] = set()
    queue = [tokens[index] for index in kept if index in tokens]
    while queue:
        for part in parts.get(queue.pop(), ()):
            if ids[part] not in found:
                found.add(ids[part])
                queue.append(part)
    return found


def pruned_tokenizer(tokenizer: Json, vocabulary: Vocabulary) -> Json:
    """The tokenizer with the kept tokens alone, renumbered; other settings as they were."""
    result = copy.deepcopy(tokenizer)
    new = vocabulary.new_ids
    model = result["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [entry for index, entry in enumerate(model["vocab"]) if index in new]
        if model.get("unk_id") is not None:
            model["unk_id"] = new[model["unk_id"]]
    else:
        model["vocab"] = {token: new[old] for token, old in model["vocab"].items() if old in new}
    if model["type"] == "BPE":
        known = model["vocab"]
        model["merges"] = [
            merge
            for merge, pair in zip(model["merges"], _pairs(model), strict=True)
            if all(part in known for part in (*pair, _joined(model, *pair)))
        ]
    for token in result.get("added_tokens", []):
        token["id"] = new[token["id"]]
    for part in _processors(result.get("post_processor")):
        for token in part.get("special_tokens", {}).values():
            token["ids"] = [new[old] for old in token["ids"]]
        for name in ("sep", "cls"):
            if name in part:
                part[name] = [part[name][0], new[part[name][1]]]
    if result.get("padding"):
        result["padding"]["pad_id"] = new.get(result["padding"]["pad_id"], 0)
    return result


def write_pruned(source: Path, vocabulary: Vocabulary, directory: Path) -> list[Path]:
    """Write the tokenizer files of `source` for a pruned vocabulary; what was written.

    `tokenizer.json` is what counts; `tokenizer_config.json` and `vocab.txt` follow it if they are
    there. Files that say the same for other tokenizers (`vocab.json`, `merges.txt`) are left out.

    Raises:
        ModelError: if the tokenizer cannot be rewritten.
    """
    tokenizer = pruned_tokenizer(read_tokenizer(source), vocabulary)
    directory.mkdir(parents=True, exist_ok=True)
    written = [directory / TOKENIZER]
    write_text_atomic(written[0], json.dumps(tokenizer, ensure_ascii=False) + "\n")
    config = source / "tokenizer_config.json"
    if config.is_file():
        data = json.loads(config.read_text(encoding="utf-8"))
        if "added_tokens_decoder" in data:
            data["added_tokens_decoder"] = {
                str(vocabulary.new_ids[int(old)]): token
                for old, token in data["added_tokens_decoder"].items()
                if int(old) in vocabulary.new_ids
            }
        written.append(directory / config.name)
        write_text_atomic(written[-1], json.dumps(data, indent=2, ensure_ascii=False) + "\n")
    if (source / "vocab.txt").is_file():
        by_id = {index: token for token, index in token_ids(tokenizer).items()}
        lines = "".join(f"{by_id[index]}\n" for index in sorted(by_id))
        written.append(directory / "vocab.txt")
        write_text_atomic(written[-1], lines)
    special = source / "special_tokens_map.json"
    if special.is_file():
        written.append(directory / special.name)
        shutil.copyfile(special, written[-1])
    return written
