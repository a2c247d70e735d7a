"""Where keys and values enter the cache of a model, whatever its architecture.

transformers hands the cache to every attention module as `past_key_values`. An attention module of the decoder is
therefore one whose forward takes that argument and that holds a quantized linear itself.
"""

from __future__ import annotations

import inspect

from torch import nn

from eqat_mm.errors import AdapterError
from eqat_mm.quant.bit_widths import UNQUANTIZED
from eqat_mm.quant.dynamic_linear import DynamicFakeLinear
from eqat_mm.quant.integer_attention import reads_integers
from eqat_mm.quant.kv_cache import KVQuantizer, QuantizedKVCache
from eqat_mm.quant.packed_linear import PackedLinear

_QUANTIZER = "kv_quantizer"


def quantize_keys_and_values(model: nn.Module, bits: int) -> None:
    """Quantize keys and values of every decoder block of `model` as they enter the cache; at 16 bits do nothing.

    Args:
        model: its decoder blocks hold quantized linears.
        bits: 4, 8 or 16.

    Raises:
        AdapterError: no attention module of the model takes a cache.
    """
    if bits == UNQUANTIZED:
        return
    found = [module for module in model.modules() if _is_attention(module)]
    if not found:
        raise AdapterError(
            where=f"KV cache of {type(model).__name__}",
            given="no module that holds quantized linears and takes past_key_values",
            allowed="attention modules that are given the cache by that name, as in transformers 5",
            do="leave the cache in floating point: 16 as the last of the bits",
        )
    for module in found:
        quantizer = KVQuantizer(bits)
        module.add_module(_QUANTIZER, quantizer)
        module.register_forward_pre_hook(quantizer.pre_hook, with_kwargs=True)


def kv_cache_bits(model: nn.Module) -> int:
    """Return to how many bits `model` quantizes keys and values; 16 where it does not."""
    return next((module.bits for module in model.modules() if isinstance(module, KVQuantizer)), UNQUANTIZED)


def new_cache(model: nn.Module) -> QuantizedKVCache | None:
    """Return an empty cache for a generation that stores keys and values in the integers of `model`.

    The attention of the model then reads these integers where it can.

    Returns:
        None where the model does not quantize them: transformers then makes its own.
    """
    bits = kv_cache_bits(model)
    return None if bits == UNQUANTIZED else QuantizedKVCache(bits, expand=not reads_integers(model))


def _is_attention(module: nn.Module) -> bool:
    if not any(isinstance(child, DynamicFakeLinear | PackedLinear) for child in module.children()):
        return False
    return "past_key_values" in inspect.signature(type(module).forward).parameters
