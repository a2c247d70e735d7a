"""A model as a row of blocks: what an adapter declares, how calls are captured, and the walker."""

from eqat_mm.blocks.arch import Arch
from eqat_mm.blocks.walker import BlockStep, BlockWalker

__all__ = ["Arch", "BlockStep", "BlockWalker"]
