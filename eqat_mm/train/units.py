"""Linears that share bits: those of a stage, which read the same input and which engines fuse into one matrix."""

from __future__ import annotations

from typing import NamedTuple

from eqat_mm.blocks.experts import SplitExperts
from eqat_mm.blocks.source import OpenModel
from eqat_mm.errors import ConfigError
from eqat_mm.quant.spec import QuantSpec


class Unit(NamedTuple):
    """Linears of one block that have the same bits.

    Attributes:
        block: its number.
        paths: of the linears inside the block.
        names: of the same from the list of blocks on, as an allocation has them.
    """

    block: int
    paths: tuple[str, ...]
    names: tuple[str, ...]


def units_of(opened: OpenModel) -> list[Unit]:
    """Return the units of a model in the order data passes them.

    Raises:
        ConfigError: it has experts, for which no reader of several widths was found.
    """
    if any(isinstance(module, SplitExperts) for module in opened.model.modules()):
        raise ConfigError(
            where=f"bits that differ, in {opened.folder}",
            given="a model with experts",
            allowed="models without: readers want the same bits for all experts and all their linears",
            do="leave the allocation out",
        )
    return [
        Unit(index, stage, tuple(f"{opened.arch.block_name(index)}.{path}" for path in stage))
        for index, block in enumerate(opened.blocks)
        for stage in opened.arch.stages_of(block)
    ]


def check_allocation(opened: OpenModel, spec: QuantSpec) -> None:
    """Check that an allocation, where there is one, is of this model, and gives the linears of a unit the same bits.

    Raises:
        ConfigError: it is not.
    """
    if not spec.table:
        return
    units, table = units_of(opened), spec.table
    known = {name for unit in units for name in unit.names}
    unknown, missing = sorted(table.keys() - known), sorted(known - table.keys())
    if unknown or missing:
        raise ConfigError(
            where="quant.allocation",
            given=f"bits for {unknown[0]}, which is none of them" if unknown else f"no bits for {missing[0]}",
            allowed=f"bits for each of the {len(known)} quantized linears of this model, and for nothing else",
            do="make the file for this model: eqat allocate",
        )
    for names in (unit.names for unit in units if len({table[name] for name in unit.names}) > 1):
        raise ConfigError(
            where="quant.allocation",
            given=", ".join(f"{name} {table[name]} bits" for name in names),
            allowed="the same bits for linears that read the same input: engines fuse them",
            do="correct the file, or make it with eqat allocate",
        )
