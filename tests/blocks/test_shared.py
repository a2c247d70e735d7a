"""Objects that a model hands to several blocks: they may be read; a block that changes one is refused by name."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eqat_mm.blocks.arch import Arch
from eqat_mm.blocks.calls import signature
from eqat_mm.blocks.capture import capture
from eqat_mm.blocks.source import OpenModel
from eqat_mm.blocks.walker import BlockWalker
from eqat_mm.blocks.weights import WeightSource
from eqat_mm.errors import AdapterError

WIDTH = 8


class Notes:
    """An object of a model's own."""

    def __init__(self, **notes: Any) -> None:
        self.notes = notes


class Block(nn.Module):
    """Reads, and maybe changes, what all blocks are given."""

    def __init__(self, index: int, change: Callable[[int, Any, Tensor], None] | None, decides: bool) -> None:
        super().__init__()
        self.index, self.change, self.decides = index, change, decides
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor, state: Any) -> Tensor:
        if self.decides and hidden.sum().item() > 1e9:  # which fake tensors cannot
            return hidden
        output: Tensor = hidden + self.proj(hidden) * read(state)
        if self.change is not None:
            self.change(self.index, state, output)
        return output


def read(state: Any) -> Tensor:
    """The factor in an object."""
    if isinstance(state, Tensor):
        return state
    factor: Tensor = (
        state.notes["factor"] if isinstance(state, Notes) else state[0] if isinstance(state, list) else state["factor"]
    )
    return factor


class Model(nn.Module):
    def __init__(
        self,
        make: Callable[[Tensor], Any],
        change: Callable[[int, Any, Tensor], None] | None = None,
        decides: bool = False,
    ) -> None:
        super().__init__()
        self.make = make
        self.embed = nn.Embedding(11, WIDTH)
        self.blocks = nn.ModuleList(Block(index, change, decides) for index in range(3))

    def forward(self, input_ids: Tensor, *, use_cache: bool = False) -> Tensor:
        hidden: Tensor = self.embed(input_ids)
        state = self.make(input_ids.float().mean())
        for block in self.blocks:
            hidden = block(hidden, state)
        return hidden


MADE: dict[str, Callable[[Tensor], Any]] = {
    "dict": lambda factor: {"factor": factor},
    "list": lambda factor: [factor],
    "UserDict": lambda factor: UserDict(factor=factor),
    "Notes": lambda factor: Notes(factor=factor),
    "Tensor": lambda factor: factor.expand(WIDTH).clone(),
}
BATCHES = [{"input_ids": torch.tensor([[seed, 2, 3]])} for seed in (1, 7, 1)]


def walker_of(model: Model, folder: Path) -> BlockWalker:
    """A walker over a model that is in memory, whose samples are captured."""
    from safetensors.torch import save_file

    save_file(model.state_dict(), folder / "model.safetensors")
    arch = Arch("toy", ("toy",), "AutoModelForCausalLM", "blocks", (("proj",),), ("embed",), lambda: (model, []))
    samples = list(capture(model, model.blocks, BATCHES))
    for block in model.blocks:
        block.to("meta")
    opened = OpenModel(folder, model, arch, WeightSource(folder))
    return BlockWalker(opened, samples, device=torch.device("cpu"))


@pytest.mark.parametrize("kind", sorted(MADE))
def test_what_all_blocks_read_is_what_the_model_gave(kind: str, tmp_path: Path) -> None:
    """Two samples of one length have different objects, which are not mixed up when they are called together."""
    torch.manual_seed(0)
    model = Model(MADE[kind])
    with torch.no_grad():
        expected = [model(**batch) for batch in BATCHES]
    walker = walker_of(model, tmp_path)
    for step in walker.walk():
        walker.advance_fp(step)
        walker.advance_quantized(step)
    for index, wanted in enumerate(expected):
        assert torch.equal(walker.fp.read(index), wanted)


@pytest.mark.parametrize("kind", ["UserDict", "Notes"])
def test_an_object_stays_the_same_object(kind: str) -> None:
    (sample, other, _) = capture(model := Model(MADE[kind]), model.blocks, BATCHES)
    first, *others = (call.args[0] for call in sample.calls)
    assert all(each is first for each in others)
    assert other.calls[0].args[0] is not first
    shape = sample.hidden.shape
    assert signature(sample.calls[0], shape) == signature(sample.calls[0], shape)
    assert signature(sample.calls[0], shape) != signature(other.calls[0], shape)


def keeps(index: int, state: Any, output: Tensor) -> None:
    """Block 1 leaves its keys to those behind it."""
    if index == 1 and isinstance(state, Tensor):
        state.add_(1.0)
    elif index == 1 and isinstance(state, list):
        state.append(output)
    elif index == 1:
        (state.notes if isinstance(state, Notes) else state)["keys"] = output


@pytest.mark.parametrize("kind", sorted(MADE))
def test_a_block_that_changes_what_others_are_given_is_refused_by_name(kind: str) -> None:
    model = Model(MADE[kind], keeps)
    with pytest.raises(AdapterError) as caught:
        list(capture(model, model.blocks, BATCHES))
    assert caught.value.where == "block 1 (Block): argument 2"
    assert "that the block changes, and that other blocks are given, too" in caught.value.given


@pytest.mark.parametrize("kind", sorted(MADE))
def test_it_is_refused_when_it_runs_where_it_cannot_be_tried(kind: str, tmp_path: Path) -> None:
    walker = walker_of(Model(MADE[kind], keeps, decides=True), tmp_path)
    steps = walker.walk()
    step = next(steps)
    walker.advance_fp(step)
    walker.advance_quantized(step)
    step = next(steps)
    with pytest.raises(AdapterError) as caught:
        walker.advance_fp(step)
    assert caught.value.where == "a decoder block (Block): argument 2"


def test_a_block_may_change_what_it_alone_is_given() -> None:
    """The model makes a list for each call."""

    class Own(Model):
        def forward(self, input_ids: Tensor, *, use_cache: bool = False) -> Tensor:
            hidden: Tensor = self.embed(input_ids)
            for block in self.blocks:
                hidden = block(hidden, [input_ids.float().mean()])
            return hidden

    model = Own(MADE["list"], keeps)
    assert len(list(capture(model, model.blocks, BATCHES))) == 3
