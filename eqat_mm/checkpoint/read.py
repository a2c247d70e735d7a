"""Loading a packed checkpoint: integers stay integers, step sizes become float32 parameters."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel

from eqat_mm.blocks.arch import set_submodule
from eqat_mm.blocks.source import WeightSource, module_names
from eqat_mm.checkpoint.adapters import ADAPTER, load_adapters
from eqat_mm.checkpoint.layout import PACKED_SUFFIX, SCALE_SUFFIX, spec_of_config
from eqat_mm.checkpoint.verify import MANIFEST, Manifest, read_manifest, verify_checkpoint
from eqat_mm.errors import CheckpointError
from eqat_mm.quant.packed_linear import PackedLinear
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.files import read_json


def load(
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    verify: bool = True,
) -> PreTrainedModel:
    """Return the packed model in `folder`.

    Every quantized linear is a `PackedLinear`; nothing is dequantized. All parameters are frozen but the step
    sizes, which are float32 and trainable. Low-rank adapters of the checkpoint are active, and frozen.

    Args:
        folder: written by Block-AP or E2E-QP.
        dtype: of the unquantized parts.
        device: to load to.
        verify: check the SHA-256 of every file first.

    Raises:
        CheckpointError: not a checkpoint, unfinished, truncated or altered.
        ConfigError: it has adapters, and `peft` is not installed.
    """
    folder = Path(folder)
    manifest = verify_checkpoint(folder) if verify else read_manifest(folder)
    raw = read_json(folder / "config.json")
    model = _skeleton(folder, raw)
    source = WeightSource(folder, module_names(model))
    _insert_packed(model, source, raw, str(folder), manifest)
    tied = _tied_names(model, source)
    for path, module in model.named_modules():
        if any(f"{path}.{name}" in tied for name, _ in module.named_parameters(recurse=False)):
            continue
        kept = torch.float32 if isinstance(module, PackedLinear) else dtype
        source.materialise(module, f"{path}." if path else "", kept, torch.device(device), recurse=False)
    model.tie_weights()
    if any(name.startswith(f"{ADAPTER}/") for name in manifest.files):
        load_adapters(model, folder / ADAPTER)
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, PackedLinear):
            for parameter in module.scale_parameters():
                parameter.requires_grad_(True)
    nn.Module.to(model, device)
    model.eval()
    return model


def _skeleton(folder: Path, raw: dict[str, object]) -> PreTrainedModel:
    config = transformers.AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    architecture = str(raw["architectures"][0])  # type: ignore[index]
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = getattr(transformers, architecture)(config)
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model


def _insert_packed(
    model: nn.Module, source: WeightSource, raw: dict[str, object], where: str, manifest: Manifest
) -> None:
    names = [name for name in source.names() if name.endswith(PACKED_SUFFIX)]
    if not names:
        raise CheckpointError(
            where=where,
            given="no packed weights",
            allowed="a folder written by `eqat block-ap` or `eqat e2e-qp`",
            do="load full-precision models with transformers",
        )
    scale_dtype = source.read(names[0].removesuffix(PACKED_SUFFIX) + SCALE_SUFFIX).dtype
    spec = spec_of_config(raw, scale_dtype, where)
    if spec.as_dict() != manifest.spec:
        raise CheckpointError(
            where=f"{where}/config.json: quantization_config",
            given=spec.name,
            allowed=f"{QuantSpec(**manifest.spec).name}, as recorded in {MANIFEST}",
            do="the file was altered: copy or make the checkpoint again",
        )
    for name in names:
        path = name.removesuffix(PACKED_SUFFIX)
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear), path
        with torch.device("meta"):
            packed = PackedLinear(
                linear.in_features, linear.out_features, spec, bias=linear.bias is not None, layer=path
            )
        set_submodule(model, path, packed)


def _tied_names(model: PreTrainedModel, source: WeightSource) -> set[str]:
    """Names of parameters that are not stored because they are tied to another."""
    tied = model.all_tied_weights_keys or {}
    return {name for name in tied if name not in source}
