"""Quantized keys and values: as they enter the cache in training, and as integers in the cache of a generation.

One alpha per token and head, over the D channels of the head: keys after the rotary embedding, values as they are.
The head is the unit because it is the unit of attention (an outlier channel of one head costs the others nothing),
because it needs no view across heads, and because compressed-tensors can name it (groups of D channels).

A stored token of a head is one row of bytes, its codes and then its alpha:

    8 bits    byte i holds code_i + 128
    4 bits    byte i holds code_2i + 8 in its low half, code_2i+1 + 8 in its high half
    then      alpha as bfloat16, 2 bytes

so D = 64 takes 34 bytes at 4 bits and 66 at 8, where 16-bit floats take 128. Attention reads the row's numbers,
code * alpha in the dtype of the model: what the fake quantizer gives, bit for bit.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from eqat_kernels.cached_attention.reference import SCALE_DTYPE, unpack_rows
from eqat_mm.errors import ConfigError
from eqat_mm.quant.activations import fake_quantize_symmetric, quantize_symmetric


def pack_rows(states: Tensor, bits: int) -> Tensor:
    """Quantize keys or values and return their rows of bytes.

    Args:
        states: float [..., D]; D even at 4 bits.
        bits: 4 or 8.

    Returns:
        uint8 [..., D * bits / 8 + 2].

    Raises:
        ConfigError: an odd D at 4 bits.
    """
    codes, scale = quantize_symmetric(states.detach(), bits, SCALE_DTYPE)
    unsigned = (codes + (1 << (bits - 1))).to(torch.uint8)
    if bits == 4:
        _require_pairs(unsigned.shape[-1])
        unsigned = unsigned[..., 0::2] | (unsigned[..., 1::2] << 4)
    alpha = scale.to(SCALE_DTYPE).clone(memory_format=torch.contiguous_format)  # `view` refuses odd strides
    return torch.cat([unsigned, alpha.view(torch.uint8)], dim=-1)


def _require_pairs(channels: int) -> None:
    if channels % 2:
        raise ConfigError(
            where="KV cache of 4 bits",
            given=f"heads with {channels} channels",
            allowed="an even number of channels: two codes share a byte",
            do="use 8 bits for the cache",
        )


class _Room:
    """Rows of bytes with room behind them, so that a token is appended without moving those before it.

    An eighth of them and some: a row is then moved a few times in a generation, however long it gets.
    """

    def __init__(self) -> None:
        self.rows: Tensor | None = None
        self.held: Tensor | None = None

    def append(self, held: Tensor, new: Tensor) -> Tensor:
        """Return `held` and `new` [batch, heads, tokens, bytes] as one tensor; both are left as they are."""
        before = held.shape[-2] if held.numel() else 0
        end = before + new.shape[-2]
        if self.rows is None or not self._is_behind(held, end):
            batch, heads, _, width = new.shape
            self.rows = new.new_empty(batch, heads, end + end // 8 + 64, width)
            self.rows[..., :before, :] = held if before else 0
        self.rows[..., before:end, :] = new
        self.held = self.rows[..., :end, :]
        return self.held

    def _is_behind(self, held: Tensor, end: int) -> bool:
        """Say whether the room for rows up to `end` is here, behind `held`, and may be written to."""
        assert self.rows is not None
        writable = torch.is_inference_mode_enabled() or not self.rows.is_inference()
        return held is self.held and end <= self.rows.shape[-2] and writable


class QuantizedKVLayer(DynamicLayer):
    """Cache of one attention layer: rows of bytes, [batch, heads, tokens, bytes], in place of floats.

    Attention reads the rows themselves where the model can (`quant.integer_attention`). Otherwise they are expanded
    anew for each token and forgotten: kept, the floats would take the memory that the integers save. Who has that
    memory gives the model transformers' own cache, which then holds the same numbers as floats.

    Sequences are reordered, repeated and cropped by the methods of `DynamicLayer`, which need not know what is in a
    row. A model with sliding windows keeps all its tokens here; its masks hide the old ones.

    Args:
        bits: 4 or 8.
        expand: whether attention is given floats.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, bits: int, expand: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bits, self.expand = bits, expand
        self._room = _Room(), _Room()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take dtype and device of the first states; the cache holds none yet."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = torch.empty(0, dtype=torch.uint8, device=self.device)
        self.values = torch.empty(0, dtype=torch.uint8, device=self.device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values, float [batch, heads, new tokens, D]; return those of all tokens.

        As they were stored, float [batch, heads, tokens, D], or the rows of bytes.

        Raises:
            ConfigError: an odd D at 4 bits.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._room[0].append(self.keys, pack_rows(key_states, self.bits))
        self.values = self._room[1].append(self.values, pack_rows(value_states, self.bits))
        if not self.expand:
            return self.keys, self.values
        keys, values = (unpack_rows(rows, self.bits, key_states.dtype) for rows in (self.keys, self.values))
        return keys, values


class QuantizedKVCache(Cache):
    """KV cache that stores integers, for `model.generate(..., past_key_values=QuantizedKVCache(4))`.

    Args:
        bits: 4 or 8.
        expand: whether attention is given floats; false only for models whose attention `reads_integers`.
    """

    def __init__(self, bits: int, expand: bool = True) -> None:
        super().__init__(layer_class_to_replicate=partial(QuantizedKVLayer, bits, expand))  # type: ignore[arg-type]
        self.bits = bits


def cache_bytes(cache: Cache) -> int:
    """Return the bytes of all keys and values that a cache holds, step sizes included."""
    held = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(states.nbytes for states in held if isinstance(states, Tensor))


class KVQuantizer(nn.Module):
    """Quantizes keys and values on their way to the cache of an attention module, with straight-through gradients.

    It is a forward pre-hook of that module, so it works whether there is a cache or not, and when activations are
    recomputed in the backward.

    Args:
        bits: 4 or 8.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def pre_hook(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Put the quantizer in front of the cache that the attention module was called with."""
        given = kwargs.get("past_key_values")
        if isinstance(given, QuantizedKVCache) and given.bits == self.bits:
            return args, kwargs
        return args, kwargs | {"past_key_values": _QuantizingCache(self.bits, given)}

    def extra_repr(self) -> str:
        """Bits."""
        return f"bits={self.bits}"


class _QuantizingCache:
    """What an attention module sees in place of its cache; everything but `update` is the cache's own."""

    def __init__(self, bits: int, cache: Cache | None) -> None:
        self._bits, self._cache = bits, cache

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys = fake_quantize_symmetric(key_states, self._bits, SCALE_DTYPE)
        values = fake_quantize_symmetric(value_states, self._bits, SCALE_DTYPE)
        if self._cache is None:
            return keys, values
        return self._cache.update(keys, values, layer_idx, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)
