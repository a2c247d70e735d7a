"""Our folders through transformers' own `from_pretrained`: packed modules in place of dense linears.

Importing this module registers that, and `import eqat_mm` imports it as soon as transformers has its quantizers; so
nothing that needs models is imported here before it is asked for. Folders of others are read as ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from eqat_mm.runtime.stock import reads_densely

_METHOD, _FORMAT = "eqat", "compressed-tensors"
_Others: Any = AUTO_QUANTIZATION_CONFIG_MAPPING[_FORMAT]


class CompressedTensorsConfig(_Others):  # type: ignore[misc]
    """What transformers keeps of the `quantization_config` of a folder of ours.

    It is called like its base, because transformers refuses a configuration of another name where a user passes one.

    Args:
        entry: of config.json.
    """

    def __init__(self, entry: dict[str, Any]) -> None:
        self.entry = entry
        self.quant_method = _METHOD
        self.dequantize = self.use_optimized_inference = False

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Return this configuration for a folder of ours, the library's for any other."""
        if reads_densely() or not _is_ours(config_dict):
            return _Others.from_dict(config_dict, return_unused_kwargs=return_unused_kwargs, **kwargs)
        return (cls(config_dict), kwargs) if return_unused_kwargs else cls(config_dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as it was written."""
        return dict(self.entry)

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the same."""
        return self.to_dict()


@register_quantizer(_METHOD)
class PackedQuantizer(HfQuantizer):
    """Builds packed modules before weights are read, and gives the model what `eqat_mm.load` gives it behind that."""

    requires_calibration = True
    quantization_config: Any
    is_trainable = is_qat_trainable = is_compileable = True

    def __new__(cls, quantization_config: CompressedTensorsConfig, **kwargs: Any) -> Any:
        """Return the library's own quantizer where a user asks for dense weights."""
        if quantization_config.dequantize:
            entry = quantization_config.entry | {"dequantize": True}
            return AUTO_QUANTIZER_MAPPING[_FORMAT](_Others.from_dict(entry), **kwargs)
        return super().__new__(cls)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        from eqat_mm.checkpoint.in_place import Found

        files = [Path(name) for name in checkpoint_files or ()]
        self.found = Found.of(model, files, self.quantization_config.entry)
        self.found.make_packed(model)

    def postprocess_model(self, model: Any, **_: Any) -> Any:
        """Freeze, put low-rank adapters on, and let the model write itself as a packed checkpoint."""
        if self.found.there:  # from here on it is no quantized model of transformers' own
            self.remove_quantization_config(model)  # type: ignore[no-untyped-call]
        else:
            model.config.quantization_config = self.quantization_config.entry
        self.found.complete(model)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the tensors as a checkpoint stores them, of a model whose folder has no manifest."""
        from eqat_mm.checkpoint.write import stored_state

        return stored_state(model), {}

    def is_serializable(self) -> bool:
        """It is."""
        return True


def _is_ours(entry: dict[str, Any]) -> bool:
    """Whether an entry is just as this package writes it, for packed linears that transformers does not merge."""
    if entry.keys() - {"dequantize"} != _KEYS or entry["format"] != "pack-quantized":
        return False
    from eqat_mm.checkpoint.layout import is_as_written

    merged = any(not pattern.endswith(".*") for pattern in entry["ignore"])
    return not merged and is_as_written(entry)


_KEYS = {"quant_method", "format", "quantization_status", "config_groups", "ignore", "kv_cache_scheme"}

AUTO_QUANTIZATION_CONFIG_MAPPING[_FORMAT] = CompressedTensorsConfig
