"""`eqat allocate`, and what is made with an allocation: both phases, resumed, checked, planned and reported."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import eqat_mm
from eqat_mm.checkpoint.manifest import read_manifest
from eqat_mm.cli import main
from eqat_mm.commands.plumbing.shapes import model_shape
from eqat_mm.commands.tables.whole import QuantizeJob, quantize
from eqat_mm.commands.verbs import allocate as module
from eqat_mm.commands.verbs.allocate import AllocateJob, allocate
from eqat_mm.commands.verbs.evaluate import bits_per_weight
from eqat_mm.commands.verbs.quantize import block_ap, rtn
from eqat_mm.commands.verbs.tune import e2e_qp
from eqat_mm.errors import CheckpointError, ConfigError
from eqat_mm.plan.storage import average_bits
from eqat_mm.quant.packed_linear import PackedLinear
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.files import read_json
from eqat_mm.runtime.progress import quietly
from tests.checkpoint.files import assert_four_lines, same_weights
from tests.commands.jobs import block_ap_job, e2e_qp_job, rtn_job
from tests.tiny_model import Tiny

BUDGET = 3.2


def allocate_job(tiny: Tiny, output: Path, **changes: Any) -> AllocateJob:
    settings: dict[str, Any] = {"average_bits": BUDGET, "group_size": 32, "calibration": tiny.windows(8)}
    return AllocateJob(**({"model": str(tiny.folder), "output": output, "device": "cpu"} | settings | changes))


@pytest.fixture(scope="module")
def allocation(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """File of an allocation; not to be altered."""
    with quietly():
        return allocate(allocate_job(tiny, tmp_path_factory.mktemp("allocation") / "mixed.json"))


def mixed(allocation: Path) -> QuantSpec:
    return QuantSpec(2, 32, symmetric=True, allocation=allocation)


def never(*_: Any, **__: Any) -> None:
    raise AssertionError("measured again")


# ---- the file -------------------------------------------------------------------------------------


def test_the_choices_are_the_best_within_the_budget(tiny: Tiny, allocation: Path) -> None:
    """Of all choices of eight units, by what was measured of each."""
    damages = read_json(allocation.parent / "tiny-llama-damage" / "result.json")["damage"]
    sizes = [64 * 128, 64 * 64, 2 * 64 * 128, 64 * 128] * 2
    costs = [[size * (bits + (bits + 16) / 32) for bits in (2, 3, 4)] for size in sizes]

    def total(of: list[list[float]], picks: tuple[int, ...]) -> float:
        return sum(each[pick] for each, pick in zip(of, picks, strict=True))

    every = itertools.product(range(3), repeat=8)
    least = min(total(damages, picks) for picks in every if total(costs, picks) <= BUDGET * sum(sizes))
    said = read_json(allocation)
    first = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    picks = tuple(said["bits"][f"layers.{block}.{path}"] - 2 for block in range(2) for path in first)
    assert total(damages, picks) == pytest.approx(least)
    assert said["average_bits"] == pytest.approx(total(costs, picks) / sum(sizes), abs=1e-4)
    assert said["average_bits"] <= BUDGET
    assert len(said["bits"]) == 14


def test_another_budget_is_not_measured_again(
    tiny: Tiny, allocation: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_measured", never)
    other = allocate(allocate_job(tiny, allocation.with_name("other.json"), average_bits=4.7))
    assert set(read_json(other)["bits"].values()) == {4}
    said = capsys.readouterr().out
    assert "4.62 bits per weight" in said
    assert "2.56 bits per weight" in said
    assert f"--quant.allocation {other}" in said
    with pytest.raises(AssertionError, match="measured again"):
        allocate(allocate_job(tiny, other, measure="gradient"))


def test_by_gradient(tiny: Tiny, tmp_path: Path) -> None:
    said = read_json(allocate(allocate_job(tiny, tmp_path / "a.json", measure="gradient", rounding="minmax")))
    assert 3.0 < said["average_bits"] <= BUDGET
    assert len(set(said["bits"].values())) > 1


def test_a_budget_below_the_fewest_bits_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        allocate(allocate_job(tiny, tmp_path / "a.json", average_bits=2.5))
    assert_four_lines(raised.value)
    assert "2.5625 (all 2 bits) to 4.6250 (all 4 bits)" in raised.value.allowed
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_a_folder_is_refused_before_anything_is_measured(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_measured", never)
    with pytest.raises(ConfigError, match="a folder"):
        allocate(allocate_job(tiny, tmp_path))


def test_damage_that_is_not_finite_is_no_choice(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_measured", lambda *_: [[1.0, float("nan"), 0.1]] * 8)
    with pytest.raises(CheckpointError, match="not finite"):
        allocate(allocate_job(tiny, tmp_path / "a.json"))
    assert not (tmp_path / "a.json").exists()


def test_a_file_that_says_something_else_is_kept(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"bits": {}}')
    job = allocate_job(tiny, tmp_path / "a.json", measure="gradient", rounding="minmax")
    with pytest.raises(ConfigError, match="says something else"):
        allocate(job)
    assert read_json(tmp_path / "a.json") == {"bits": {}}
    (tmp_path / "a.json").write_text("no JSON")
    with pytest.raises(ConfigError, match="says something else"):
        allocate(job)
    allocate(replace(job, overwrite=True))
    assert allocate(job) == tmp_path / "a.json"


# ---- what is made with it -------------------------------------------------------------------------


def widths_of(folder: Path) -> dict[str, int]:
    model = eqat_mm.load(folder)
    return {
        path.removeprefix("model."): module.layout.bits
        for path, module in model.named_modules()
        if isinstance(module, PackedLinear)
    }


def test_both_phases_keep_the_bits(
    tiny: Tiny, allocation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Folders are named after the file; stopped in the midst, Block-AP goes on from packed blocks of several widths."""
    monkeypatch.chdir(tmp_path)
    spec, table = mixed(allocation), read_json(allocation)["bits"]
    few = {"quant": spec, "calibration": tiny.windows(6)}
    undisturbed = block_ap(block_ap_job(tiny, tmp_path / "undisturbed", **few))
    with monkeypatch.context() as patch:
        patch.setattr("eqat_mm.train.block_ap.BlockWalker.advance_quantized", _stop_at(1))
        with pytest.raises(KeyboardInterrupt):
            block_ap(block_ap_job(tiny, None, **few))
    assert len(read_json(Path("runs/mixed/block-ap/state.json"))["records"]) == 1
    made = block_ap(block_ap_job(tiny, None, **few))
    assert made == Path("runs/mixed/block-ap/model")
    assert same_weights(made, undisturbed)
    tuned = e2e_qp(e2e_qp_job(tiny, None, None, quant=spec, max_steps=1))
    assert tuned == Path("runs/mixed/e2e-qp/model")
    for folder in (made, tuned):
        assert widths_of(folder) == table
        assert read_manifest(folder).spec["allocation"] == table
        assert main(["verify", str(folder), "--base", str(tiny.folder)]) == 0
        assert bits_per_weight(folder) == pytest.approx(read_json(allocation)["average_bits"], abs=0.1)
    capsys.readouterr()
    assert main(["report", "runs/mixed"]) == 0
    assert (tmp_path / "runs/mixed/report.html").is_file()


def _stop_at(block: int) -> Any:
    from eqat_mm.blocks.walker import BlockWalker

    advance = BlockWalker.advance_quantized

    def stop(self: BlockWalker, step: Any) -> Any:
        if step.index == block:
            raise KeyboardInterrupt
        return advance(self, step)

    return stop


def test_another_allocation_is_another_run(tiny: Tiny, allocation: Path, tmp_path: Path) -> None:
    """The content decides, not the name."""
    same, other = tmp_path / "same.json", tmp_path / "other.json"
    content = read_json(allocation)
    same.write_text(json.dumps(content))
    other.write_text(json.dumps({"bits": dict.fromkeys(content["bits"], 3)}))
    folder = rtn(rtn_job(tiny, tmp_path / "run", quant=mixed(allocation)))
    assert rtn(rtn_job(tiny, tmp_path / "run", quant=mixed(same))) == folder
    with pytest.raises(ConfigError, match=r"inputs\.allocation"):
        rtn(rtn_job(tiny, tmp_path / "run", quant=mixed(other)))


def test_a_missing_file_is_refused_before_anything_is_written(tiny: Tiny, tmp_path: Path) -> None:
    for start in (
        lambda: block_ap(block_ap_job(tiny, tmp_path / "run", quant=mixed(tmp_path / "none.json"))),
        lambda: rtn(rtn_job(tiny, tmp_path / "run", quant=mixed(tmp_path / "none.json"))),
    ):
        with pytest.raises(ConfigError) as raised:
            start()
        assert_four_lines(raised.value)
        assert "eqat allocate" in raised.value.do
    assert not list(tmp_path.iterdir())


def test_plans_count_it(tiny: Tiny, allocation: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = QuantSpec(2, 32, allocation=allocation).resolved()
    assert average_bits(model_shape(str(tiny.folder)), spec) == pytest.approx(
        read_json(allocation)["average_bits"], abs=1e-4
    )
    flags = ["--quant.allocation", str(allocation), "--quant.group_size", "32"]
    assert main(["plan", str(tiny.folder), *flags]) == 0
    assert f"{read_json(allocation)['average_bits']:.2f} bits per weight" in capsys.readouterr().out
    job = QuantizeJob(str(tiny.folder), group_size=32, allocation=allocation, text=str(tiny.text), plan=True)
    assert quantize(job) == []
    assert f"{spec.name}, in runs/mixed" in capsys.readouterr().out


def test_python_tunes_it(tiny: Tiny, allocation: Path, tmp_path: Path) -> None:
    folder = rtn(rtn_job(tiny, tmp_path / "rtn", quant=mixed(allocation)))
    few: dict[str, Any] = {"max_steps": 1, "batch_size": 2, "data.length": 16, "data.count": 8, "device": "cpu"}
    tuned = eqat_mm.tune(folder, text=str(tiny.text), quiet=True, settings=few | {"recipe_for": [str(tiny.folder)]})
    assert widths_of(tmp_path / "e2e-qp" / "model") == read_json(allocation)["bits"]
    tuned.save_pretrained(tmp_path / "saved")
    assert torch.equal(
        eqat_mm.load(tmp_path / "saved")(input_ids=torch.tensor([[3, 4]])).logits,
        tuned(input_ids=torch.tensor([[3, 4]])).logits,
    )
