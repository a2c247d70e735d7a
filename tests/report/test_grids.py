"""Counts over packed linears against the numbers that were packed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from eqat_mm.checkpoint.layout import to_bytes
from eqat_mm.quant.packed_linear import PackedLinear
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.report import grids as module
from eqat_mm.report.grids import Grids, by_block, linears, place_of, step_middles, together

OUT, IN, GROUP = 24, 64, 32


def packed(bits: int, *, symmetric: bool = False) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """State dict of a packed linear, and its codes, step sizes and zero points."""
    spec = QuantSpec(bits, GROUP, symmetric=symmetric)
    codes = torch.randint(2**bits, (OUT, IN), dtype=torch.uint8)
    scale = torch.rand(OUT, IN // GROUP) * 0.1 + 1e-3
    zero = torch.randint(2**bits, scale.shape).float()
    linear = PackedLinear.from_codes(codes, scale, zero, None, spec)
    return linear.state_dict(), codes, linear.weight_scale.detach(), zero


def share(where: Tensor) -> float:
    return int(where.sum()) / where.numel()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("at_once", [2**22, 2 * IN])
def test_codes_and_zero_points_are_counted(
    bits: int, at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CODES_AT_ONCE", at_once)
    state, codes, _, zero = packed(bits)
    save_file(
        {f"model.layers.7.mlp.up_proj.{name}": value for name, value in state.items()}, tmp_path / "model.safetensors"
    )
    (found,) = linears(tmp_path, QuantSpec(bits))
    assert (found.block, found.kind) == (7, "mlp.up_proj")
    assert found.grids.codes.tolist() == [int((codes == code).sum()) for code in range(2**bits)]
    assert found.grids.weights == OUT * IN
    assert found.grids.ends == (share(codes == 0), share(codes == 2**bits - 1))
    assert found.grids.border == share((zero == 0) | (zero == 2**bits - 1))


def test_whole_bytes_are_counted_as_unsigned_codes(tmp_path: Path) -> None:
    state, codes, _, _ = packed(8, symmetric=True)
    stored = to_bytes({f"layers.0.up.{name}": value for name, value in state.items()})
    save_file({name: value.contiguous() for name, value in stored.items()}, tmp_path / "model.safetensors")
    (found,) = linears(tmp_path, QuantSpec(8))
    assert found.grids.codes.tolist() == torch.bincount(codes.flatten(), minlength=256).tolist()
    assert found.grids.border is None


def test_step_sizes_are_found_to_a_percent(tmp_path: Path) -> None:
    state, _, scale, _ = packed(2)
    save_file({f"layers.0.up.{name}": value for name, value in state.items()}, tmp_path / "model.safetensors")
    (found,) = linears(tmp_path, QuantSpec(2))
    ordered = scale.flatten().sort().values
    for share in (0.05, 0.5, 0.95):
        expected = float(ordered[math.ceil(share * len(ordered)) - 1])
        assert found.grids.step(share) == pytest.approx(expected, rel=0.015)


def test_step_sizes_of_either_sign_and_beyond_the_ranges_count(tmp_path: Path) -> None:
    state, _, _, _ = packed(2, symmetric=True)
    state["weight_scale"] = torch.tensor([-0.25, 0.25, 0.0, 1e9]).repeat(OUT, 1)[:, : IN // GROUP].contiguous()
    save_file({f"layers.0.up.{name}": value for name, value in state.items()}, tmp_path / "model.safetensors")
    (found,) = linears(tmp_path, QuantSpec(2))
    assert found.grids.step(0.5) == pytest.approx(0.25, rel=0.015)
    assert int(found.grids.steps.sum()) == OUT * IN // GROUP


def test_information_is_that_of_the_distribution() -> None:
    def grids(*counts: int) -> Grids:
        return Grids(torch.tensor(counts), torch.zeros(4, dtype=torch.int64), torch.zeros(len(step_middles())))

    assert grids(5, 5, 5, 5).information == pytest.approx(2)
    assert grids(0, 9, 9, 0).information == pytest.approx(1)
    assert grids(0, 7, 0, 0).information == 0
    assert (grids(1, 2, 3, 4) + grids(4, 3, 2, 1)).codes.tolist() == [5, 5, 5, 5]


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.mlp.up_proj", (3, "mlp.up_proj")),
        ("model.language_model.layers.12.self_attn.q_proj", (12, "self_attn.q_proj")),
        ("model.layers.0.mlp.experts.17.w1", (0, "mlp.experts.*.w1")),
        ("lm_head", (None, "lm_head")),
    ],
)
def test_block_and_kind_follow_from_the_name(name: str, place: tuple[int | None, str]) -> None:
    assert place_of(name) == place


def test_linears_of_a_checkpoint_come_in_the_order_of_blocks(root: Path) -> None:
    found = list(linears(root / "e2e-qp" / "model", QuantSpec(2)))
    assert [one.block for one in found] == [0] * 7 + [1] * 7
    assert by_block(found).keys() == {0, 1}
    assert together(found).weights == sum(one.grids.weights for one in found)


def test_tuning_step_sizes_leaves_the_codes(root: Path) -> None:
    before, after = (together(list(linears(root / name / "model", QuantSpec(2)))) for name in ("block-ap", "e2e-qp"))
    assert before.codes.tolist() == after.codes.tolist()
    assert before.steps.tolist() != after.steps.tolist()


def test_grids_of_several_widths_are_joined_at_their_ends() -> None:
    two, three = (Grids(torch.tensor(codes), torch.zeros(len(codes)).long(), torch.ones(3).long()) for codes in (
        [1, 2, 3, 4], [10, 0, 0, 0, 0, 0, 5, 20],
    ))  # fmt: skip
    both = two + three
    assert both.codes.tolist() == (three + two).codes.tolist() == [11, 2, 3, 0, 0, 0, 5, 24]
    assert both.ends == (11 / 45, 24 / 45)
    assert both.border is None
