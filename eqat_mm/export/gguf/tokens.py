"""GGUF's keys for a vocabulary, its special tokens and the chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from eqat_mm.checkpoint.folders import load_tokenizer
from eqat_mm.data.text.vocabulary import start_of
from eqat_mm.errors import ExportError
from eqat_mm.export.opened import PackedModel

_NORMAL, _UNKNOWN, _CONTROL, _OWN, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of tokens."""

_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_TEMPLATE = "chat_template.jinja"

_GPT2 = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
_SPLITS = {
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}"
    "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+": "llama-bpe",
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}"
    "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+": "qwen2",
    _GPT2: "gpt-2",
}
"""How text is split before bytes are joined -> llama.cpp's name of it."""


def token_keys(model: PackedModel, rows: int) -> dict[str, Any]:
    """Return key -> value; lists are arrays.

    Args:
        model: the checkpoint.
        rows: of its embedding.

    Raises:
        ExportError: a tokenizer that llama.cpp does not have.
    """
    tokenizer = load_tokenizer(model.folder)
    content = _content(tokenizer, model.folder)
    keys = _vocabulary(content) | {"pre": _split(content, model.folder)}
    words, kinds = _words(tokenizer, content, rows)
    keys |= {"tokens": words, "token_type": kinds} | _specials(tokenizer, rows)
    if keys["model"] == "llama":
        keys["scores"] = _scores(content, words)
    named = {f"tokenizer.ggml.{name}": value for name, value in keys.items()}
    template = _template(tokenizer, model.folder)
    return named | ({"tokenizer.chat_template": template} if template else {})


def _content(tokenizer: PreTrainedTokenizerBase, folder: Path) -> dict[str, Any]:
    """Return what tokenizer.json says, or would say of a tokenizer that lies here in other files.

    Raises:
        ExportError: it is none of pieces that are joined.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())
    if content.get("model", {}).get("type") != "BPE":
        raise _unknown(folder, f"a {type(tokenizer).__name__} of type {content.get('model', {}).get('type')}")
    return content


def _unknown(folder: Path, given: str) -> ExportError:
    return ExportError(
        where=f"--to gguf, from {folder}: tokenizer",
        given=given,
        allowed=f"byte-level BPE split as {', '.join(['smollm', *_SPLITS.values()])}, or SentencePiece BPE",
        do="serve the checkpoint itself (docs/formats.md), or choose another --to",
    )


def _vocabulary(content: dict[str, Any]) -> dict[str, Any]:
    """Return the kind of vocabulary, and merges where it has them."""
    if content["model"].get("byte_fallback"):
        return {"model": "llama", "add_space_prefix": _puts_space(content)}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    return {"model": "gpt2", "merges": merges, "add_space_prefix": False}


def _puts_space(content: dict[str, Any]) -> bool:
    """Whether text begins with a space that is not in it."""
    normal, split = json.dumps(content.get("normalizer")), content.get("pre_tokenizer") or {}
    return '"Prepend"' in normal or split.get("prepend_scheme") in ("first", "always")


def _split(content: dict[str, Any], folder: Path) -> str:
    """Return llama.cpp's name of how text is split before it is joined.

    Raises:
        ExportError: it has none.
    """
    if content["model"].get("byte_fallback"):
        return "default"
    whole = content.get("pre_tokenizer") or {}
    parts = whole.get("pretokenizers", [whole])
    kinds = [part.get("type") for part in parts]
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits") and parts[1].get("use_regex", True):
        return "smollm"
    pattern = parts[0].get("pattern", {}).get("Regex", "") if kinds == ["Split", "ByteLevel"] else ""
    if pattern in _SPLITS:
        return _SPLITS[pattern]
    raise _unknown(folder, f"text split by {' and '.join(map(str, kinds))}{f', {pattern}' if pattern else ''}")


def _words(tokenizer: PreTrainedTokenizerBase, content: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Return word and kind of every row of the embedding."""
    words, kinds = [f"[PAD{row}]" for row in range(rows)], [_UNUSED] * rows
    bytes_too = bool(content["model"].get("byte_fallback"))
    for word, row in content["model"]["vocab"].items():
        if row < rows:
            words[row], kinds[row] = word, _BYTE if bytes_too and _is_byte(word) else _NORMAL
    for row, added in tokenizer.added_tokens_decoder.items():
        if row < rows:
            words[row], kinds[row] = added.content, _CONTROL if added.special else _OWN
    if bytes_too and tokenizer.unk_token_id is not None and tokenizer.unk_token_id < rows:
        kinds[tokenizer.unk_token_id] = _UNKNOWN
    return words, kinds


def _is_byte(word: str) -> bool:
    return len(word) == 6 and word.startswith("<0x") and word.endswith(">")


def _scores(content: dict[str, Any], words: list[str]) -> list[float]:
    """Return a score of every token, the higher the earlier it is joined; llama.cpp joins by these, not by merges."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(content["model"]["merges"]):
        joined = merge.replace(" ", "", 1) if isinstance(merge, str) else "".join(merge)
        ranks.setdefault(joined, rank)
    last = len(content["model"]["merges"])
    return [float(-ranks.get(word, last)) for word in words]


def _specials(tokenizer: PreTrainedTokenizerBase, rows: int) -> dict[str, Any]:
    """Return the numbers of special tokens that have a row of the embedding, and whether text begins with one."""
    found: dict[str, Any] = {}
    for short, name in _SPECIAL.items():
        number = getattr(tokenizer, f"{short}_token_id")
        if number is not None and number < rows:
            found[f"{name}_token_id"] = int(number)
    begins = list(start_of(tokenizer)) == [tokenizer.bos_token_id]
    return found | {"add_bos_token": begins, "add_eos_token": False}


def _template(tokenizer: PreTrainedTokenizerBase, folder: Path) -> str | None:
    """Return the template of the tokenizer, or that of the processor."""
    own = tokenizer.chat_template
    if isinstance(own, str):
        return own
    file = folder / _TEMPLATE
    return file.read_text(encoding="utf-8") if file.is_file() else None
