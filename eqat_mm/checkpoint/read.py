"""Loading a packed checkpoint: integers stay integers, step sizes become float32 parameters.

The model is built as its source was, by the same transformers class from the same config.json, and what the files say
of their tensors is compared with it before anything is read.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eqat_mm.blocks.arch import set_submodule
from eqat_mm.blocks.attention import quantize_keys_and_values
from eqat_mm.blocks.config import CONFIG
from eqat_mm.blocks.source import OpenModel, release
from eqat_mm.checkpoint.adapters import load_adapters, teach_peft
from eqat_mm.checkpoint.build import empty_packed, insert_packed, require_described, skeleton
from eqat_mm.checkpoint.devices import DeviceMap, Devices, main_device
from eqat_mm.checkpoint.layout import BYTES, SCALE_SUFFIX, format_of
from eqat_mm.checkpoint.manifest import ADAPTER, checkpoint_folder, read_manifest
from eqat_mm.checkpoint.match import needless, require_match, wanted_tensors
from eqat_mm.checkpoint.origin import Origin
from eqat_mm.checkpoint.pretrained import as_packed
from eqat_mm.checkpoint.source import PackedSource, packed_names, published_packed_names
from eqat_mm.checkpoint.verify import verify_checkpoint
from eqat_mm.errors import CheckpointError
from eqat_mm.quant.bit_widths import UNQUANTIZED
from eqat_mm.quant.narrow import HALVES, compute_wide, narrow_matrices
from eqat_mm.quant.packed_linear import PackedLinear
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.device import require_kernels
from eqat_mm.runtime.files import read_json_object
from eqat_mm.runtime.precision import Precision, unquantized_dtype

_SMALL = 2**16
"""Bytes of a tensor that is copied: what is mapped for a few of them would keep the pages around them, too."""


def load(
    folder: str | Path,
    *,
    dtype: torch.dtype | Precision = "auto",
    device: str | torch.device = "cpu",
    device_map: DeviceMap | None = None,
    verify: bool = True,
) -> PreTrainedModel:
    """Return the packed model in `folder`.

    Every quantized linear is a `PackedLinear`; nothing is dequantized. All parameters are frozen but the step
    sizes, which are float32 and trainable. Low-rank adapters of the checkpoint are active, and frozen. Where the
    checkpoint quantizes activations or keys and values, the model does so in every forward. Its `save_pretrained` and
    `push_to_hub` write a packed checkpoint again.

    Args:
        folder: written by Block-AP, E2E-QP or LLM-QAT, the folder of such a run, or a folder with one run in it.
        dtype: of the unquantized parts; `auto` is bfloat16 on a GPU that computes in it, float32 on a CPU, where
            matrices stay in the 16 bits of their file and are computed with in float32.
        device: to load to.
        device_map: in place of `device`, for a model on several: `auto`, or path of a module -> device.
        verify: check the SHA-256 of every file first.

    Raises:
        CheckpointError: not a checkpoint, unfinished, truncated or altered; or its files contradict each other.
        ConfigError: it has adapters, and `peft` is not installed; no such dtype or device; or `EQAT_KERNELS` names
            kernels that cannot run on this device.
    """
    folder, device = checkpoint_folder(Path(folder)), main_device(device, device_map)
    as_stored = dtype == "auto" and device.type == "cpu"
    dtype = unquantized_dtype(dtype, device)
    require_kernels(device)
    manifest = verify_checkpoint(folder) if verify else read_manifest(folder)
    raw = read_json_object(folder / CONFIG)
    model = skeleton(folder, manifest)
    source, publish = PackedSource(folder, packed_names(model)), published_packed_names(model)
    shards = source.shards()
    published = {stored: publish(stored) for held in shards.values() for stored in held}
    headers = {name: header for stored in shards.values() for name, header in stored.values()}
    scales = [name for name in headers if name.endswith(SCALE_SUFFIX)]
    require_described(folder, raw, manifest, headers[scales[0]].dtype if scales else None)
    insert_packed(model, scales, manifest, str(folder))
    quantize_keys_and_values(model, manifest.kv_cache_bits)
    wanted = wanted_tensors(model, whole_bytes=format_of(manifest.widths) == BYTES)
    ignored = needless(model, headers)
    headers = {name: header for name, header in headers.items() if name not in ignored}
    missing = {name for name in wanted if name not in headers}
    require_match(wanted, headers, str(folder), spare=_given_by_ties(model, missing))
    devices = Devices(model, {"": device} if device_map is None else device_map, dtype)
    narrow = narrow_matrices(model) if as_stored else set()
    _fill(model, source, missing | ignored, dtype, devices.of, narrow)
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    if narrow:
        compute_wide(model, dtype)
    teach_peft()
    if manifest.has_adapters:
        load_adapters(model, folder / ADAPTER)
    freeze_all_but_step_sizes(model)
    devices.spread(model)
    model.eval()
    return as_packed(model, Origin.of(model, folder, manifest, raw, shards, published))


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
        spec: of its quantized linears, resolved.
        device: to load to.

    Raises:
        CheckpointError: the shard is missing, truncated or another one.
    """
    release(block)
    for path, linear in opened.arch.named_linears(block):
        set_submodule(block, path, empty_packed(linear, spec.of(f"{name}.{path}"), UNQUANTIZED, f"{name}.{path}"))
    stored = {
        called(f"{name}.{part}"): part  # a run that was begun by an older version has the names of its source
        for called in (opened.source.stored_name, opened.source.published_name)
        for part in block.state_dict()
    }
    source = PackedSource(shard.parent, lambda part: stored.get(part, part), [shard])
    headers = {part: header for part, header in source.shards()[shard.name].values()}
    require_match(wanted_tensors(block), headers, str(shard))
    _fill(block, source, set(), torch.float32, lambda _: device)
    block.requires_grad_(False)


def _given_by_ties(model: PreTrainedModel, missing: set[str]) -> set[str]:
    """Return the names of parameters that are not stored and have the value of one that is."""
    pairs = list((model.all_tied_weights_keys or {}).items())
    given = {target for target, source in pairs if source not in missing}
    given |= {source for target, source in pairs if target not in missing}
    return given | {target for target, source in pairs if source in given}


@torch.no_grad()
def _fill(
    model: nn.Module,
    source: PackedSource,
    leave: set[str],
    dtype: torch.dtype,
    device_of: Callable[[str], torch.device],
    narrow: Set[str] = frozenset(),
) -> None:
    """Give every tensor of a module its stored value, but those to `leave`; packed linears compute in float32.

    What is `narrow` stays in the 16 bits it is stored in.

    Raises:
        CheckpointError: a tensor that is not finite, or a packed weight that says it has another shape.
    """
    for path, module in model.named_modules():
        kept = torch.float32 if isinstance(module, PackedLinear) else dtype
        for leaf, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            name = f"{path}.{leaf}" if path else leaf
            if name in leave or not (tensor.is_meta or name in source):
                continue
            value = source.read(name)
            if isinstance(module, PackedLinear) and leaf == "weight_shape":
                _require_shape(name, value, module, str(source.folder))
            as_it_is = not value.is_floating_point() or (name in narrow and value.dtype in HALVES)
            value = value.to(device_of(name), value.dtype if as_it_is else kept)
            if value.nbytes < _SMALL:
                value = value.clone()
            setattr(
                module, leaf, nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
            )


def _require_shape(name: str, value: Tensor, linear: PackedLinear, where: str) -> None:
    shape = [linear.layout.out_features, linear.layout.in_features]
    if value.tolist() != shape:
        given, allowed = f"{name} {value.tolist()}", f"{shape}, the shape of the packed weight"
        raise CheckpointError(where, given, allowed, "copy or make the checkpoint again")


def freeze_all_but_step_sizes(model: nn.Module) -> None:
    """Leave the step sizes of packed linears trainable, and nothing else."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, PackedLinear):
            for parameter in module.scale_parameters():
                parameter.requires_grad_(True)
