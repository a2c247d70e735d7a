"""Decoding in which one step of the model is recorded and replayed: as a CUDA graph, on a CPU as a list of C calls.

A decode step launches hundreds of small kernels, and Python needs longer to launch them than a GPU to run them, or a
CPU those of a small model. A recording keeps the launches of one step and makes them again in one call. It replays
addresses and shapes, so everything a step reads and writes has its place from the beginning:

    cache      transformers' `StaticCache`, as long as prompt and answer; a layer counts its tokens on the device
    token      the token that was chosen last, one for each sequence
    position   of that token, counted without the padding
    mask       what is added to the scores: 0 where there is a token, the lowest number where there is none yet

The prompt, images included, is read as ever. On a GPU the first steps of a decode are run from Python, as a warm-up,
then one is recorded; on a CPU the first one is. Logits leave the recording, and the choice of a token is made outside:
as in transformers' `generate`, number for number.

Shape letters: B sequences, P tokens of the padded prompt, L length of the cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StaticCache, TemperatureLogitsWarper, TopPLogitsWarper
from transformers.cache_utils import StaticLayer
from transformers.generation.streamers import BaseStreamer

from eqat_eval.finite import not_finite, predicts
from eqat_kernels import cpu_library
from eqat_kernels.recording import Recording, record
from eqat_mm.blocks.attention import kv_cache_bits
from eqat_mm.blocks.experts import SplitExperts
from eqat_mm.errors import ConfigError
from eqat_mm.quant.bit_widths import UNQUANTIZED
from eqat_mm.runtime.progress import say

CudaGraph = bool | Literal["auto"]

WARM_UP = 2
"""Steps before one is recorded: kernels are compiled and libraries set up by then."""

LINE = 16
"""The cache has a multiple of so many tokens: a mask of another length would be copied in every layer."""


def uses_graph(model: Any, wanted: CudaGraph) -> bool:
    """Decide whether `model` decodes with a recorded step; `auto` says so where it cannot on a GPU.

    On a CPU `auto` records where the model computes in float32, whose sums hardly depend on their order.

    Raises:
        ConfigError: `wanted` is True and it cannot.
    """
    if wanted is False or (wanted == "auto" and model.device.type not in ("cuda", "cpu")):
        return False
    if wanted == "auto" and model.device.type == "cpu":
        return model.dtype is torch.float32 and cpu_library.obstacle() is None and obstacle(model) is None
    reason = obstacle(model) if model.device.type == "cuda" else f"the model is on {model.device}"
    if reason is not None and wanted == "auto":
        say(f"decoding without a CUDA graph: {reason}")
    elif reason is not None:
        raise ConfigError("cuda_graph", f"true, but {reason}", "a decode step of fixed shape on a GPU", "use auto")
    return reason is None


def obstacle(model: Any) -> str | None:
    """Say why a decode step of `model` has no fixed shape; None where it has one."""
    config = model.config.get_text_config(decoder=True)
    if kv_cache_bits(model) != UNQUANTIZED:
        return "its KV cache of integers grows with the text"
    if not getattr(model, "_can_compile_fullgraph", False):
        return f"{type(model).__name__} decides by values, as transformers declares"
    if any(isinstance(module, SplitExperts) for module in model.modules()):
        return "which of its experts a token needs is decided step by step"
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"its attention is {config._attn_implementation}, which takes no mask of four dimensions"
    if any(type(layer) is not StaticLayer for layer in StaticCache(config, max_cache_len=LINE).layers):
        return "some of its layers do not see the whole text (sliding windows)"
    return _obstacle_of_positions(config)


def _obstacle_of_positions(config: Any) -> str | None:
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    return f"its rotary embedding ({kind}) changes with the length" if kind in ("dynamic", "longrope") else None


def decode(
    model: Any,
    inputs: Mapping[str, Tensor],
    max_new_tokens: int,
    *,
    temperature: float | None = None,
    top_p: float | None = None,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
    streamer: BaseStreamer | None = None,
    graph: bool = True,
) -> Tensor:
    """Continue a batch of prompts with a static cache; call in inference mode, with the model in eval mode.

    Args:
        model: without an `obstacle`.
        inputs: what its forward takes: input_ids and attention_mask [B, P], padded on the left, and images.
        max_new_tokens: most tokens to write.
        temperature: of the sampling; None is greedy.
        top_p: nucleus of the sampling.
        eos_token_id: tokens that end a sequence.
        pad_token_id: what follows the end of a sequence while others go on.
        streamer: is given the tokens as they come.
        graph: replay a recorded step; otherwise the same step is run from Python, anywhere.

    Returns:
        Prompts and answers, [B, P + new tokens].

    Raises:
        CheckpointError: the model's predictions are not finite.
    """
    choice = _Choice(temperature, top_p, eos_token_id, pad_token_id)
    with _device_of(model):
        step = DecodeStep(model, inputs, max_new_tokens, graph=graph)
        logits_BV, tokens = step.first_logits, [inputs["input_ids"]]
        _put(streamer, tokens[0])
        for left in reversed(range(max_new_tokens)):
            if not predicts(logits_BV):
                raise not_finite(model, "predictions of the next token that are not finite")
            token_B = choice(logits_BV)
            tokens.append(token_B[:, None])
            _put(streamer, token_B)
            if left == 0 or choice.all_ended():
                break
            logits_BV = step(token_B)
    if streamer is not None:
        streamer.end()
    return torch.cat(tokens, dim=1)


def _device_of(model: Any) -> AbstractContextManager[Any]:
    return torch.cuda.device(model.device) if model.device.type == "cuda" else nullcontext()


def _put(streamer: BaseStreamer | None, tokens: Tensor) -> None:
    if streamer is not None:
        streamer.put(tokens.cpu())


class DecodeStep:
    """Reads the prompt, then one token of each sequence at a time; arguments as in `decode`."""

    def __init__(self, model: Any, inputs: Mapping[str, Tensor], max_new_tokens: int, *, graph: bool) -> None:
        self.model, self.records = model, graph
        self.seen_BP = inputs["attention_mask"]
        length = -(-(self.seen_BP.shape[1] + max_new_tokens) // LINE) * LINE
        self.cache = StaticCache(model.config, max_cache_len=length)
        self.first_logits = self._read_prompt(inputs)
        self.token_B1 = torch.zeros_like(inputs["input_ids"][:, :1])
        self.position_B1 = self.seen_BP.sum(1, keepdim=True)
        self.slot = torch.tensor([self.seen_BP.shape[1]], device=self.seen_BP.device)
        self.mask_B11L = self._mask(length)
        self.run_before = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.recording: Recording | None = None
        self.logits_BV = self.first_logits

    def _read_prompt(self, inputs: Mapping[str, Tensor]) -> Tensor:
        positions = (self.seen_BP.cumsum(1) - 1).clamp(min=0)
        found = self.model(
            **inputs, position_ids=positions, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        logits: Tensor = found.logits[:, -1]
        return logits

    def _mask(self, length: int) -> Tensor:
        layer = self.cache.layers[0]
        assert isinstance(layer, StaticLayer)
        keys = layer.keys
        assert keys is not None
        batch, prompt = self.seen_BP.shape
        mask = torch.full((batch, 1, 1, length), torch.finfo(keys.dtype).min, dtype=keys.dtype, device=keys.device)
        mask[:, 0, 0, :prompt].masked_fill_(self.seen_BP.bool(), 0.0)
        return mask

    def __call__(self, token_B: Tensor) -> Tensor:
        """Return the logits [B, V] behind these tokens; valid until the next call."""
        self.token_B1.copy_(token_B[:, None])
        if self.records and self.token_B1.device.type == "cpu":
            return self._replayed_on_cpu()
        if not self.records or self.run_before < WARM_UP:
            self.run_before += 1
            return self._run()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits_BV = self._run()
        self.graph.replay()
        return self.logits_BV

    def _replayed_on_cpu(self) -> Tensor:
        if self.recording is None:
            self.recording = record(self._run)
        else:
            self.recording()
        logits: Tensor = self.recording.result
        return logits

    def _run(self) -> Tensor:
        """Do a step on the tensors of this object, and prepare them for the next one."""
        self.mask_B11L.index_fill_(3, self.slot, 0.0)
        found = self.model(
            input_ids=self.token_B1,
            attention_mask=self.mask_B11L,
            position_ids=self.position_B1,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.position_B1.add_(1)
        self.slot.add_(1)
        logits: Tensor = found.logits[:, -1]
        return logits


class _Choice:
    """Chooses tokens as transformers' `generate` does, and knows which sequences have ended."""

    def __init__(
        self, temperature: float | None, top_p: float | None, ends: int | list[int] | None, pad: int | None
    ) -> None:
        self.samples = temperature is not None
        self.warpers = LogitsProcessorList()
        if temperature is not None and temperature != 1.0:
            self.warpers.append(TemperatureLogitsWarper(temperature))
        if top_p is not None and top_p < 1.0:
            self.warpers.append(TopPLogitsWarper(top_p))
        self.ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        self.pad = pad
        self.ended_B: Tensor | None = None

    def __call__(self, logits_BV: Tensor) -> Tensor:
        """Return the next token of each sequence, [B]."""
        token_B = self._chosen(logits_BV.float())
        if not self.ends:
            return token_B
        if self.ended_B is not None and self.pad is not None:
            token_B = token_B.masked_fill(self.ended_B, self.pad)
        ends_now = torch.isin(token_B, torch.tensor(self.ends, device=token_B.device))
        self.ended_B = ends_now if self.ended_B is None else self.ended_B | ends_now
        return token_B

    def _chosen(self, logits_BV: Tensor) -> Tensor:
        if not self.samples:
            return logits_BV.argmax(-1)
        scores = self.warpers(None, logits_BV)  # type: ignore[arg-type]  # neither looks at the tokens so far
        return torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)

    def all_ended(self) -> bool:
        """Say whether there is nothing left to write."""
        return self.ended_B is not None and bool(self.ended_B.all())
