"""Recorded calls are the model's own, and calls of several samples join into one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from eqat_mm.blocks.arch import Inputs
from eqat_mm.blocks.calls import BlockCall, collate, signature
from eqat_mm.blocks.capture import CapturedSample, TensorPool, capture
from eqat_mm.blocks.spool import Stream
from eqat_mm.blocks.walker import BlockStep
from eqat_mm.errors import AdapterError
from tests.blocks.toy import ToyModel, tokens
from tests.tolerances import assert_close


@pytest.fixture
def model() -> ToyModel:
    return ToyModel().eval()


def padded(batch: int, length: int, seed: int) -> Inputs:
    """Return inputs whose first sample starts with two tokens of padding."""
    mask = torch.ones(batch, length)
    mask[0, :2] = 0
    return {"input_ids": tokens(batch, length, seed), "attention_mask": mask}


def captured(model: ToyModel, *batches: Inputs) -> list[CapturedSample]:
    return list(capture(model, model.blocks, batches))


@torch.no_grad()
def chain(model: ToyModel, sample: CapturedSample) -> Tensor:
    """Pass the hidden states of a sample through all blocks."""
    hidden = sample.hidden
    for block, call in zip(model.blocks, sample.calls, strict=True):
        hidden = block(hidden, *call.args, **call.kwargs)[0]
    return hidden


def equal(left: Any, right: Any) -> bool:
    """Whether two nests of tensors and values are the same."""
    (a, structure), (b, other) = pytree.tree_flatten(left), pytree.tree_flatten(right)
    return structure == other and all(
        torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("inputs", [{"input_ids": tokens(2, 5, 0)}, padded(2, 5, 0)])
def test_every_argument_of_every_block_is_recorded(model: ToyModel, inputs: Inputs) -> None:
    with torch.no_grad():
        model(**inputs, use_cache=False)
    own = model.calls
    (sample,) = captured(model, inputs)
    assert torch.equal(sample.hidden, model.embed(inputs["input_ids"]))
    assert len(sample.calls) == len(own) == 3
    for call, (args, kwargs) in zip(sample.calls, own, strict=True):
        assert equal((call.args, call.kwargs), (args, kwargs))
        assert call.batch == 2
    assert not equal(sample.calls[1].kwargs["mask"], sample.calls[2].kwargs["mask"])


def test_replayed_calls_are_the_models_forward(model: ToyModel) -> None:
    for inputs in ({"input_ids": tokens(3, 6, 1)}, padded(3, 6, 2)):
        (sample,) = captured(model, inputs)
        with torch.no_grad():
            expected = model(**inputs, use_cache=False)
            assert torch.equal(model.norm(chain(model, sample)), expected)


def test_equal_tensors_are_kept_once(model: ToyModel) -> None:
    samples = captured(model, *({"input_ids": tokens(1, 5, seed)} for seed in range(4)))
    for index in range(3):
        calls = [sample.calls[index] for sample in samples]
        for leaves in zip(*(pytree.tree_leaves((call.args, call.kwargs)) for call in calls), strict=True):
            assert all(leaf is leaves[0] for leaf in leaves)
    tables = {id(call.kwargs["extras"]["tables"][0]) for sample in samples for call in sample.calls}
    assert len(tables) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64])
def test_the_pool_tells_dtype_shape_and_contents_apart(dtype: torch.dtype) -> None:
    pool = TensorPool()
    first = pool.intern(torch.tensor([[1, 0], [0, 1]]).to(dtype))
    assert pool.intern(torch.tensor([[1, 0], [0, 1]]).to(dtype)) is first
    assert pool.intern(torch.tensor([[1, 1], [0, 1]]).to(dtype)) is not first
    assert pool.intern(torch.tensor([1, 0, 0, 1]).to(dtype)) is not first
    assert pool.intern(torch.tensor([[1, 0], [0, 1]]).to(torch.int16)) is not first
    scalar = pool.intern(torch.tensor(1).to(dtype))
    assert pool.intern(torch.tensor(1).to(dtype)) is scalar
    assert pool.intern(torch.empty(0, dtype=dtype)).numel() == 0
    assert pool.intern("a value") == "a value"


def test_the_weights_of_blocks_are_not_needed(model: ToyModel) -> None:
    (expected,) = captured(model, {"input_ids": tokens(1, 4, 0)})
    model.blocks.to("meta")
    (sample,) = captured(model, {"input_ids": tokens(1, 4, 0)})
    assert torch.equal(sample.hidden, expected.hidden)


def test_forwards_are_restored(model: ToyModel) -> None:
    captured(model, {"input_ids": tokens(1, 4, 0)})
    assert not any("forward" in vars(block) for block in model.blocks)


def test_forwards_are_restored_after_an_exception(model: ToyModel) -> None:
    def batches() -> Iterator[Inputs]:
        yield {"input_ids": tokens(1, 4, 0)}
        yield {"input_ids": torch.full((1, 4), 99)}

    with pytest.raises(IndexError):
        list(capture(model, model.blocks, batches()))
    assert not any("forward" in vars(block) for block in model.blocks)


def test_forwards_are_restored_when_the_consumer_stops(model: ToyModel) -> None:
    samples = capture(model, model.blocks, ({"input_ids": tokens(1, 4, seed)} for seed in range(3)))
    next(samples)
    samples.close()  # type: ignore[attr-defined]
    assert not any("forward" in vars(block) for block in model.blocks)


def test_blocks_that_the_forward_does_not_pass_are_an_error(model: ToyModel) -> None:
    unused = nn.ModuleList([model.blocks[0], nn.Linear(8, 8)])
    with pytest.raises(AdapterError, match="ended after 1 of 2 blocks"):
        list(capture(model, unused, [{"input_ids": tokens(1, 4, 0)}]))
    assert "forward" not in vars(model.blocks[0])


def test_nothing_recorded_requires_gradients(model: ToyModel) -> None:
    (sample,) = captured(model, {"input_ids": tokens(1, 4, 0)})
    leaves = pytree.tree_leaves([(call.args, call.kwargs) for call in sample.calls])
    assert not any(leaf.requires_grad for leaf in [sample.hidden, *leaves] if isinstance(leaf, Tensor))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("with_padding", [False, True])
def test_collated_calls_give_what_single_ones_give(model: ToyModel, batch: int, with_padding: bool) -> None:
    batches = [padded(batch, 5, seed) if with_padding else {"input_ids": tokens(batch, 5, seed)} for seed in range(3)]
    samples = captured(model, *batches)
    hidden = torch.cat([sample.hidden for sample in samples])
    joined = CapturedSample(hidden, tuple(collate(calls) for calls in zip(*(s.calls for s in samples), strict=True)))
    assert all(call.batch == 3 * batch for call in joined.calls)
    expected = torch.cat([chain(model, sample) for sample in samples])
    assert_close(chain(model, joined), expected, "block")


def test_one_call_is_collated_to_itself(model: ToyModel) -> None:
    (sample,) = captured(model, {"input_ids": tokens(1, 4, 0)})
    assert collate(sample.calls[:1]) is sample.calls[0]


def test_shared_tensors_are_expanded_and_padded_masks_concatenated() -> None:
    table, gain = torch.rand(1, 4, 8), torch.rand(8)
    masks = [torch.rand(1, 4, 4) > 0.5 for _ in range(3)]
    calls = [BlockCall((gain,), {"mask": mask, "table": table, "flag": True}, batch=1) for mask in masks]
    joined = collate(calls)
    assert joined.batch == 3
    assert joined.args[0] is gain
    assert joined.kwargs["flag"] is True
    assert torch.equal(joined.kwargs["mask"], torch.cat(masks))
    assert joined.kwargs["table"].shape == (3, 4, 8)
    assert joined.kwargs["table"].data_ptr() == table.data_ptr()


def call(batch: int = 1, **kwargs: Any) -> BlockCall:
    return BlockCall((), kwargs, batch)


SHARED = torch.rand(7, 3)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (call(mask=torch.rand(1, 4, 4)), call(mask=torch.rand(1, 4, 4))),
        (call(1, mask=torch.rand(1, 4, 4)), call(2, mask=torch.rand(2, 4, 4))),
        (call(table=SHARED), call(table=SHARED)),
        (call(flag=True, mask=None), call(flag=True, mask=None)),
    ],
)
def test_calls_that_can_be_joined_have_one_signature(left: BlockCall, right: BlockCall) -> None:
    assert signature(left, torch.Size((1, 4, 8))) == signature(right, torch.Size((2, 4, 8)))


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (call(mask=torch.rand(1, 4, 4)), call(mask=torch.rand(1, 4, 5))),
        (call(mask=torch.rand(1, 4, 4)), call(mask=torch.ones(1, 4, 4, dtype=torch.bool))),
        (call(mask=torch.rand(1, 4, 4)), call(mask=None)),
        (call(table=SHARED), call(table=SHARED.clone())),
        (call(flag=True), call(flag=False)),
        (call(flag=True), call(flags=True)),
    ],
)
def test_calls_that_cannot_be_joined_differ(left: BlockCall, right: BlockCall) -> None:
    shape = torch.Size((1, 4, 8))
    assert signature(left, shape) != signature(right, shape)


def test_rotary_tables_in_three_directions_are_joined_along_the_batch() -> None:
    tables = [torch.rand(3, 1, 4, 8) for _ in range(2)]
    left, right = (call(table=table) for table in tables)
    shape = torch.Size((1, 4, 8))
    assert signature(left, shape) == signature(right, shape)
    assert torch.equal(collate([left, right]).kwargs["table"], torch.cat(tables, 1))
    assert collate([left, left]).kwargs["table"].shape == (3, 2, 4, 8)


def test_hidden_states_of_other_length_differ() -> None:
    assert signature(call(), torch.Size((1, 4, 8))) != signature(call(), torch.Size((1, 5, 8)))


def test_samples_of_other_length_or_padding_are_batched_apart(model: ToyModel) -> None:
    batches = [
        {"input_ids": tokens(1, 5, 0)},
        {"input_ids": tokens(1, 4, 1)},
        padded(1, 5, 2),
        {"input_ids": tokens(2, 5, 3)},
        padded(1, 5, 4),
        {"input_ids": tokens(1, 4, 5)},
    ]
    samples = captured(model, *batches)
    stream = Stream(torch.float32)
    for sample in samples:
        stream.append(sample.hidden)
    stream.seal()
    step = BlockStep(0, "blocks.0", nn.Identity(), stream, stream, tuple(sample.calls[0] for sample in samples))
    buckets = step.buckets(range(6))
    assert sorted(index for bucket in buckets for index in bucket) == list(range(6))
    assert [1, 5] in buckets
    assert [2, 4] in buckets
    for bucket in buckets:
        outputs = chain_first(model, step.call(bucket), stream.gather(bucket))
        alone = [chain_first(model, step.call([index]), stream.read(index)) for index in bucket]
        assert_close(outputs, torch.cat(alone), "block")
    assert list(step.batches([1, 5], batch_tokens=4)) == [[1], [5]]
    assert list(step.batches([1, 5], batch_tokens=8)) == [[1, 5]]
    assert list(step.batches([5, 1], batch_tokens=1)) == [[5], [1]]


@torch.no_grad()
def chain_first(model: ToyModel, call: BlockCall, hidden: Tensor) -> Tensor:
    """Return the output of block 0."""
    output: Tensor = model.blocks[0](hidden, *call.args, **call.kwargs)[0]
    return output


# ---- what models do between and around their blocks -----------------------------------------------


class Plain(nn.Module):
    """A block that returns hidden states alone and takes them by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor, gain: float) -> Tensor:
        return hidden_states + self.proj(hidden_states) * gain


class Between(nn.Module):
    """A model that changes hidden states between its blocks, or calls them in an order of its own."""

    def __init__(self, order: tuple[int, ...] = (0, 1, 2), added: float = 1.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(Plain() for _ in range(3))
        self.order, self.added = order, added

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        hidden = self.embed(input_ids)
        for index in self.order:
            hidden = self.blocks[index](hidden_states=hidden, gain=0.5)
            if index == 0:
                hidden = hidden + self.added * torch.arange(8.0)
        return hidden


def test_what_a_model_adds_between_two_blocks_is_part_of_the_call() -> None:
    model, inputs = Between().eval(), {"input_ids": tokens(2, 5, 0)}
    (sample,) = list(capture(model, model.blocks, [inputs]))
    assert [call.added is None for call in sample.calls] == [True, False, True]
    with torch.no_grad():
        hidden = sample.hidden
        for block, call in zip(model.blocks, sample.calls, strict=True):
            hidden = block(hidden if call.added is None else hidden + call.added, *call.args, **call.kwargs)
        assert torch.equal(hidden, model(**inputs, use_cache=False))


def test_what_is_added_is_joined_like_other_tensors() -> None:
    model = Between().eval()
    samples = list(capture(model, model.blocks, [{"input_ids": tokens(1, 5, seed)} for seed in range(3)]))
    joined = collate([sample.calls[1] for sample in samples])
    assert joined.added is not None
    assert joined.added.shape == (3, 5, 8)
    assert signature(samples[0].calls[1], torch.Size([1, 5, 8])) != signature(
        samples[0].calls[2], torch.Size([1, 5, 8])
    )


@pytest.mark.parametrize("order", [(0, 2), (0, 0, 1, 2), (1, 0, 2)], ids=str)
def test_blocks_that_are_skipped_or_repeated_are_an_error(order: tuple[int, ...]) -> None:
    model = Between(order).eval()
    with pytest.raises(AdapterError, match="called where block"):
        list(capture(model, model.blocks, [{"input_ids": tokens(1, 4, 0)}]))
    assert not any("forward" in vars(block) for block in model.blocks)
