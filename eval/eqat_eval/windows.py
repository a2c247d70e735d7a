"""Held-out windows: the token ids every evaluation here reads, checked before a model runs on them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eqat_mm.errors import ConfigError, DataError


def check_windows(windows_NT: Tensor, model: PreTrainedModel) -> None:
    """Refuse windows that `model` cannot be evaluated on.

    Args:
        windows_NT: token ids, int64 [n, T].
        model: its input embedding bounds the token ids.

    Raises:
        DataError: not int64 [n >= 1, T >= 2], or a token id outside the embedding.
    """
    shape = list(windows_NT.shape)
    if windows_NT.dtype != torch.int64 or len(shape) != 2 or shape[0] < 1 or shape[1] < 2:
        raise DataError(
            where="evaluation windows",
            given=f"{windows_NT.dtype} of shape {shape}",
            allowed="torch.int64 of shape [n >= 1, T >= 2]; the first token of a window is never predicted",
            do="pass token ids cut into windows of equal length",
        )
    embedding = model.get_input_embeddings()
    if isinstance(embedding, nn.Embedding):
        _check_range(windows_NT, embedding.num_embeddings)


def check_positive(name: str, value: int) -> None:
    """Raise `ConfigError` unless the count `value` of option `name` is at least 1."""
    if value < 1:
        raise ConfigError(where=name, given=str(value), allowed="an integer >= 1", do=f"set {name} to 1 or more")


def row_spans(rows: int, chunk_rows: int) -> Iterator[tuple[int, int]]:
    """Yield `(start, stop)` pairs that cover `range(rows)` in pieces of at most `chunk_rows`."""
    for start in range(0, rows, chunk_rows):
        yield start, min(start + chunk_rows, rows)


def _check_range(windows_NT: Tensor, vocabulary: int) -> None:
    low, high = int(windows_NT.min()), int(windows_NT.max())
    if low < 0 or high >= vocabulary:
        raise DataError(
            where="evaluation windows",
            given=f"token ids from {low} to {high}",
            allowed=f"0 to {vocabulary - 1}, the rows of the model's input embedding",
            do="tokenize the text with this model's own tokenizer",
        )
