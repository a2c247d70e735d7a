"""Text that a model writes for its own training, token by token: the data of LLM-QAT (arXiv 2305.17888).

The paper's mix: the first token is drawn uniformly from the vocabulary, the next three to five are the most likely
ones, every later one is drawn from softmax(logits), until end-of-text or the length limit.

What a text depends on: model, tokenizer, seed, sampling, length limit and its own index. Not on which texts are
written beside it, in what order, by how many processes, or before or after an interruption:

- Every text draws from a generator of its own, seeded by (seed, index).
- A token is drawn by Gumbel-max, argmax_v(logits_v - log(-log u_v)) with a uniform u_v for each token v in float64.
  A change of the logits by rounding then changes a token about as often as it changes probabilities: the rounding of
  other batch sizes, up to 7e-5 on logits of up to 30 (SmolLM2-135M, float32, batches of 1 to 32), one in a million.
  Walking along the cumulative distribution with one u would change one in a thousand: there the differences of all
  49,152 tokens add up.
- Where the two best tokens are closer to each other than rounding can explain away (`_CLOSE`, which is three times
  the largest sum of two such differences), the logits are computed again from the text alone, in a batch of one and
  without a cache, and decide.

So texts are equal wherever rounding stays below that bound and a text computed alone gives the same bits, that is on
one machine with one version of torch and one number of threads. On another machine nearly all are: only tokens as close
as rounding can turn out differently, and then the rest of their text does. That holds for float32; in 16 bits rounding
is a thousand times larger.

B rows, V tokens of the vocabulary, H heads, T columns, D features of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from eqat_mm.data.text.vocabulary import Vocabulary
from eqat_mm.errors import CheckpointError
from eqat_mm.runtime.seeding import generator

Sampling = Literal["paper", "random", "greedy"]

_GREEDY = (3, 5)
"""Fewest and most greedy tokens behind the first one, in the paper's mix."""

_CLOSE = 2.0**-16
"""Two scores this close, relative to the largest logit, are compared again without the influence of the batch."""

_CHUNK = 256
"""Columns by which the cache grows."""


@dataclass(frozen=True)
class GeneratedTokens:
    """One text.

    Attributes:
        index: which one.
        token_ids: its tokens, without those that the tokenizer puts around a text.
        ended: the model ended it; otherwise it reached the length limit.
    """

    index: int
    token_ids: tuple[int, ...]
    ended: bool


def generate_tokens(
    model: PreTrainedModel,
    vocabulary: Vocabulary,
    indices: Sequence[int],
    *,
    length: int,
    seed: int,
    sampling: Sampling = "paper",
    batch_size: int = 8,
) -> Iterator[GeneratedTokens | None]:
    """Write texts side by side; as one ends, the next takes its place.

    Args:
        model: a causal LM, or a vision-language model, which is given text only; put in eval mode.
        vocabulary: what it may write.
        indices: of the texts to write.
        length: most tokens of a text, 2 or more.
        seed: of all texts.
        sampling: `paper`, or `random` or `greedy` for every token behind the first one.
        batch_size: texts side by side; a matter of speed and memory.

    Yields:
        Each text as it is finished, in the order in which they end; and None for each token written behind a
        text's first one that does not finish it, as a sign of progress.

    Raises:
        CheckpointError: the model's logits are not finite.
    """
    assert length >= 2
    assert batch_size >= 1
    model.eval()
    begun = (_Text(index, vocabulary, seed, sampling) for index in indices)
    texts = list(islice(begun, batch_size))
    columns = _Columns(model, vocabulary)
    while texts:
        for text, token in columns.step(texts):
            text.take(token, vocabulary.ends, length)
            yield text.finished
        texts = columns.refill(texts, begun)


class _Text:
    """A text being written, with its own stream of random numbers."""

    def __init__(self, index: int, vocabulary: Vocabulary, seed: int, sampling: Sampling) -> None:
        self.index = index
        self.column = 0  # of the cache, where it begins
        self.read = 0  # tokens that the model has seen
        self.finished: GeneratedTokens | None = None
        self._draw = generator(seed, "generated text", index)
        first = int(torch.randint(len(vocabulary.first), (), generator=self._draw))
        greedy = int(torch.randint(_GREEDY[0], _GREEDY[1] + 1, (), generator=self._draw))
        self._greedy: float = {"paper": greedy, "random": 0, "greedy": float("inf")}[sampling]
        self._begin = len(vocabulary.start)
        self.token_ids = [*vocabulary.start, vocabulary.first[first]]

    @property
    def awaits(self) -> bool:
        """Whether the model has seen all of it, so that its logits are for the next token."""
        return self.read == len(self.token_ids)

    def noise(self, tokens: int) -> Tensor:
        """Return what is added to the logits of its next token, float64 [V]: nothing where that token is greedy."""
        if len(self.token_ids) - self._begin <= self._greedy:
            return torch.zeros(tokens, dtype=torch.float64)
        uniform = torch.rand(tokens, dtype=torch.float64, generator=self._draw)
        return uniform.log_().neg_().log_().neg_()

    def take(self, token: int, ends: frozenset[int], length: int) -> None:
        """Add the next token, and finish where it is the last."""
        ended = token in ends
        if not ended:
            self.token_ids.append(token)
        written = self.token_ids[self._begin :]
        if ended or len(written) == length:
            self.finished = GeneratedTokens(self.index, tuple(written), ended)


class _Columns:
    """A model that reads one token of every text a step, into one more column of its cache.

    A text that begins later than others does not see the columns before its own.
    """

    def __init__(self, model: PreTrainedModel, vocabulary: Vocabulary) -> None:
        self._model: Any = model
        self._allowed_V = vocabulary.allowed.to(model.device)
        self._cache = Cache(layer_class_to_replicate=_Layer)
        self._columns = 0

    @torch.inference_mode()
    def step(self, texts: list[_Text]) -> list[tuple[_Text, int]]:
        """Read one token of every text, and return those that were read to their end, each with its next token."""
        logits_BV = self._read(texts)
        rows = [row for row, text in enumerate(texts) if text.awaits]
        waiting = [texts[row] for row in rows]
        return list(zip(waiting, self._next(waiting, logits_BV[rows]), strict=True)) if rows else []

    @torch.inference_mode()
    def refill(self, texts: list[_Text], begun: Iterator[_Text]) -> list[_Text]:
        """Put new texts in the places of finished ones, close up what stays empty, and return what is being written."""
        rows: list[int] = []
        for row, text in enumerate(texts):
            if text.finished is not None:
                new = next(begun, None)
                if new is None:
                    continue
                new.column = self._columns
                texts[row] = new
            rows.append(row)
        unseen = min((texts[row].column for row in rows), default=0)
        if len(rows) < len(texts) or unseen >= _CHUNK:
            self._keep(rows, unseen)
            for row in rows:
                texts[row].column -= unseen
        return [texts[row] for row in rows]

    def _read(self, texts: list[_Text]) -> Tensor:
        device = self._model.device
        ids_B1 = torch.tensor([[text.token_ids[text.read]] for text in texts], device=device)
        positions_B1 = torch.tensor([[text.read] for text in texts], device=device)
        begins_B1 = torch.tensor([[text.column] for text in texts], device=device)
        seen_BT = (torch.arange(self._columns + 1, device=device) >= begins_B1).long()
        logits_BV: Tensor = self._model(
            input_ids=ids_B1,
            attention_mask=seen_BT,
            position_ids=positions_B1,
            past_key_values=self._cache,
            use_cache=True,
        ).logits[:, -1]
        self._columns += 1
        for text in texts:
            text.read += 1
        return logits_BV

    def _next(self, texts: list[_Text], logits_BV: Tensor) -> list[int]:
        """Return the next token of every text; close decisions are made on logits of the text alone."""
        noise_BV = torch.stack([text.noise(logits_BV.shape[1]) for text in texts]).to(logits_BV.device)
        best = self._scores(logits_BV, noise_BV).topk(2)
        close = best.values[:, 0] - best.values[:, 1] < _CLOSE * logits_BV.abs().amax(dim=1)
        tokens: list[int] = best.indices[:, 0].tolist()
        for row in close.nonzero()[:, 0].tolist():
            ids_1T = torch.tensor([texts[row].token_ids], device=logits_BV.device)
            alone_1V = self._model(input_ids=ids_1T, use_cache=False, logits_to_keep=1).logits[:, -1]
            tokens[row] = int(self._scores(alone_1V, noise_BV[row]).argmax())
        return tokens

    def _scores(self, logits_BV: Tensor, noise_BV: Tensor) -> Tensor:
        if not bool(logits_BV.isfinite().all()):
            raise CheckpointError(
                where=str(self._model.config.name_or_path or type(self._model).__name__),
                given="logits that are not finite numbers",
                allowed="a model that predicts tokens",
                do="check the weights with `eqat eval`",
            )
        return (logits_BV.double() + noise_BV).masked_fill(~self._allowed_V, float("-inf"))

    def _keep(self, rows: list[int], first: int) -> None:
        for layer in self._cache.layers:
            assert isinstance(layer, _Layer)
            layer.keep(rows, first)
        self._columns -= first


class _Layer(DynamicLayer):
    """Keys and values of one layer, each in a buffer with free columns, so that a new one costs no copy of the old."""

    _buffers: list[Tensor]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new columns [B, H, T, D] behind the old ones; return all columns."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers = [key_states[:, :, :0], value_states[:, :, :0]]
        begin = self.get_seq_length()
        end = begin + key_states.shape[2]
        for position, new in enumerate((key_states, value_states)):
            buffer = self._buffers[position]
            if end > buffer.shape[2]:
                grown = buffer.new_zeros((*buffer.shape[:2], end + _CHUNK, buffer.shape[3]))
                grown[:, :, :begin] = buffer[:, :, :begin]
                self._buffers[position] = buffer = grown
            buffer[:, :, begin:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values

    def keep(self, rows: list[int], first: int) -> None:
        """Keep these rows, and of their columns those from `first` on."""
        end = self.get_seq_length()
        self._buffers = [buffer[rows, :, first:end] for buffer in self._buffers]
        self.keys, self.values = self._buffers
