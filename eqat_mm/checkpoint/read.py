"""Loading a packed checkpoint: integers stay integers, step sizes become float32 parameters."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from eqat_mm.blocks.arch import set_submodule
from eqat_mm.blocks.attention import quantize_keys_and_values
from eqat_mm.blocks.source import OpenModel, WeightSource, module_names, release
from eqat_mm.checkpoint.adapters import ADAPTER, load_adapters
from eqat_mm.checkpoint.layout import SCALE_SUFFIX, from_bytes, spec_of_config, widths_of_config
from eqat_mm.checkpoint.verify import MANIFEST, Manifest, read_manifest, verify_checkpoint
from eqat_mm.errors import CheckpointError
from eqat_mm.quant.bit_widths import UNQUANTIZED
from eqat_mm.quant.dynamic_linear import DynamicPackedLinear
from eqat_mm.quant.packed_linear import PackedLinear
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.files import read_json
from eqat_mm.runtime.precision import Precision, unquantized_dtype


def load(
    folder: str | Path,
    *,
    dtype: torch.dtype | Precision = "auto",
    device: str | torch.device = "cpu",
    verify: bool = True,
) -> PreTrainedModel:
    """Return the packed model in `folder`.

    Every quantized linear is a `PackedLinear`; nothing is dequantized. All parameters are frozen but the step
    sizes, which are float32 and trainable. Low-rank adapters of the checkpoint are active, and frozen. Where the
    checkpoint quantizes activations or keys and values, the model does so in every forward.

    Args:
        folder: written by Block-AP, E2E-QP or LLM-QAT.
        dtype: of the unquantized parts; `auto` is bfloat16 on a GPU that computes in it, float32 on a CPU.
        device: to load to.
        verify: check the SHA-256 of every file first.

    Raises:
        CheckpointError: not a checkpoint, unfinished, truncated or altered.
        ConfigError: it has adapters, and `peft` is not installed; or no such dtype.
    """
    folder, device = Path(folder), torch.device(device)
    dtype = unquantized_dtype(dtype, device)
    manifest = verify_checkpoint(folder) if verify else read_manifest(folder)
    raw = read_json(folder / "config.json")
    model = _skeleton(folder, raw)
    source = _PackedSource(folder, module_names(model))
    _insert_packed(model, source, raw, str(folder), manifest)
    quantize_keys_and_values(model, manifest.kv_cache_bits)
    tied = _tied_names(model, source)
    for path, module in model.named_modules():
        if any(f"{path}.{name}" in tied for name, _ in module.named_parameters(recurse=False)):
            continue
        kept = torch.float32 if isinstance(module, PackedLinear) else dtype
        source.materialise(module, f"{path}." if path else "", kept, device, recurse=False)
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


def load_block(
    shard: Path, opened: OpenModel, name: str, block: nn.Module, spec: QuantSpec, device: torch.device
) -> None:
    """Turn a full-precision block into the packed one of a shard, frozen; unquantized parts are float32.

    The checkpoint need not be finished.

    Args:
        shard: written by `CheckpointWriter.write_block`.
        opened: the full-precision model.
        name: path of the block in it.
        block: the block; what it holds is not read.
        spec: of its quantized linears.
        device: to load to.

    Raises:
        CheckpointError: the shard is missing, truncated or another one.
    """
    release(block)
    for path, linear in opened.arch.named_linears(block):
        set_submodule(block, path, _empty_packed(linear, spec, UNQUANTIZED, f"{name}.{path}"))
    names = [f"{name}.{part}" for part in block.state_dict()]
    stored = {opened.source.stored_name(part): part for part in names}
    source = WeightSource(shard.parent, lambda part: stored.get(part, part), [shard])
    source.materialise(block, f"{name}.", torch.float32, device)
    block.requires_grad_(False)


class _PackedSource(WeightSource):
    """Weights as `PackedLinear` asks for them, also where the files hold them as whole bytes."""

    def read(self, name: str) -> Tensor:
        module, _, leaf = name.rpartition(".")
        if name in self or leaf not in ("weight_packed", "weight_shape"):
            return super().read(name)
        packed, shape = from_bytes(super().read(f"{module}.weight"))
        return packed if leaf == "weight_packed" else shape


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
    names = [name for name in source.names() if name.endswith(SCALE_SUFFIX)]
    if not names:
        raise CheckpointError(
            where=where,
            given="no packed weights",
            allowed="a folder written by `eqat block-ap` or `eqat e2e-qp`",
            do="load full-precision models with transformers",
        )
    scale_dtype = source.read(names[0]).dtype
    spec = spec_of_config(raw, scale_dtype, where)
    given, recorded = (spec, widths_of_config(raw)), (QuantSpec(**manifest.spec), manifest.widths)
    if given != recorded:
        raise CheckpointError(
            where=f"{where}/config.json: quantization_config",
            given=" ".join(part.name for part in given),
            allowed=f"{' '.join(part.name for part in recorded)}, as recorded in {MANIFEST}",
            do="the file was altered: copy or make the checkpoint again",
        )
    for name in names:
        path = name.removesuffix(SCALE_SUFFIX)
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear), path
        set_submodule(model, path, _empty_packed(linear, spec, manifest.activation_bits, path))


def _empty_packed(linear: nn.Linear, spec: QuantSpec, activation_bits: int, path: str) -> PackedLinear:
    bias = linear.bias is not None
    with torch.device("meta"):
        if activation_bits == UNQUANTIZED:
            return PackedLinear(linear.in_features, linear.out_features, spec, bias=bias, layer=path)
        return DynamicPackedLinear(
            linear.in_features, linear.out_features, spec, activation_bits=activation_bits, bias=bias, layer=path
        )


def _tied_names(model: PreTrainedModel, source: WeightSource) -> set[str]:
    """Names of parameters that are not stored because they are tied to another."""
    tied = model.all_tied_weights_keys or {}
    return {name for name in tied if name not in source}
