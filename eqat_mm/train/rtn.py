"""Round-to-nearest: the same row of blocks without calibration or training, the baseline of every table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from eqat_mm.blocks.arch import set_submodule
from eqat_mm.blocks.source import OpenModel
from eqat_mm.checkpoint.manifest import Manifest
from eqat_mm.checkpoint.write import CheckpointWriter
from eqat_mm.quant.convert import to_fake, to_packed
from eqat_mm.quant.init import initial_grid
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.device import require_kernels
from eqat_mm.runtime.memory import release_freed_memory
from eqat_mm.runtime.progress import progress
from eqat_mm.train.block_ap import check_groups, say_who_reads

STAGE = "round-to-nearest"


def run_rtn(opened: OpenModel, spec: QuantSpec, folder: Path, *, source: str, provenance: dict[str, Any]) -> Manifest:
    """Round every block to its min-max grid and write the checkpoint to `folder/model`.

    Raises:
        ConfigError: the group size does not divide a layer, step sizes that are not finite, or `EQAT_KERNELS` names
            kernels that do not run on a CPU.
    """
    require_kernels(torch.device("cpu"))
    check_groups(opened, spec)
    say_who_reads(opened, spec)
    writer, digests = CheckpointWriter(folder / "model", opened, spec), {}
    for index, block in enumerate(progress(opened.blocks, what="round to nearest", unit="block")):
        name = opened.block_name(index)
        opened.source.materialise(block, name + ".", torch.float32, torch.device("cpu"))
        for path, linear in opened.arch.named_linears(block):
            own = spec.of(f"{name}.{path}")
            grid = initial_grid(linear.weight, own, layer=f"{name}.{path}", init="minmax")
            set_submodule(block, path, to_packed(to_fake(linear, grid, own)))
        digests[writer.shard(index)] = writer.write_block(index, block)
        block.to("meta")
        release_freed_memory()
    return writer.finish(STAGE, source, provenance, digests=digests)
