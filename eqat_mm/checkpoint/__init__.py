"""The packed model on disk: compressed-tensors `pack-quantized` in a plain Hugging Face folder."""

from eqat_mm.checkpoint.manifest import Manifest, read_manifest
from eqat_mm.checkpoint.read import load
from eqat_mm.checkpoint.verify import verify_checkpoint
from eqat_mm.checkpoint.write import CheckpointWriter, save_like

__all__ = ["CheckpointWriter", "Manifest", "load", "read_manifest", "save_like", "verify_checkpoint"]
