"""Runs of Block-AP on conversations about images: several processes, killed and continued, and what a user types."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eqat_mm.cli import main
from eqat_mm.commands.plumbing import calibration
from eqat_mm.commands.plumbing.calibration import WEIGHTS, planned_work
from eqat_mm.commands.plumbing.shapes import model_shape
from eqat_mm.commands.verbs import quantize
from eqat_mm.commands.verbs.quantize import block_ap
from eqat_mm.data.text.settings import TextWindows
from eqat_mm.errors import ConfigError, DataError
from eqat_mm.runtime.ranks import ALONE, Ranks
from eqat_mm.runtime.sealed import read_sealed
from eqat_mm.train import block_ap as trainer
from eqat_mm.train.block_ap import BlockAPConfig, run_block_ap
from tests.checkpoint.files import assert_four_lines, same_weights
from tests.commands.image_bed import COUNT, CPU, FIT, SPEC, Bed
from tests.thread_ranks import in_threads, one_at_a_time
from tests.train.results import assert_same_result
from tests.train.stopping import Stopped


@pytest.mark.parametrize("weights", ["equal", "gradient"])
def test_several_processes_give_the_result_of_one(
    bed: Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: Any
) -> None:
    monkeypatch.setattr(calibration, "load_for_inference", one_at_a_time(calibration.load_for_inference))
    found = bed.found()
    config = BlockAPConfig(
        SPEC, fit=replace(FIT, batch_size=4, loss="balanced"), precision="float32", token_weights=weights
    )
    opened = [bed.open() for _ in range(3)]

    def work(ranks: Ranks) -> None:
        model, folder = opened[ranks.rank + (ranks.world > 1)], tmp_path / str(ranks.world)
        folder.mkdir(exist_ok=True)
        modalities = calibration.modalities_of(model, found, config, folder, CPU, ranks)
        options: dict[str, Any] = {"device": CPU, "source": "tiny", "provenance": {"config": {}}}
        run_block_ap(model, found.batches, config, folder, modalities=modalities, ranks=ranks, **options)

    work(ALONE)
    in_threads(2, work)
    assert_same_result(tmp_path / "1", tmp_path / "2")


def test_a_killed_run_goes_on_with_the_weights_it_began_with(
    bed: Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = block_ap(bed.job(tmp_path / "whole", token_weights="gradient"))
    plain, done = trainer.quantize_block, 0

    def stopping(*args: Any) -> Any:
        nonlocal done
        done += 1
        if done == 2:
            raise Stopped
        return plain(*args)

    monkeypatch.setattr(trainer, "quantize_block", stopping)
    with pytest.raises(Stopped):
        block_ap(bed.job(tmp_path / "killed", token_weights="gradient"))
    monkeypatch.setattr(trainer, "quantize_block", plain)
    said = read_sealed(tmp_path / "killed" / WEIGHTS)["of_kind"]
    assert [row[:2] for row in said] == [[0.0, 1.0]] * 2
    assert 0 < said[0][2] < 10
    assert said[1][2] == 0  # nothing looks at what the last block gives at an image
    monkeypatch.setattr(calibration, "gradient_weights", None)  # not computed again
    assert same_weights(whole, block_ap(bed.job(tmp_path / "killed", token_weights="gradient")))


def test_other_conversations_or_shares_are_another_run(bed: Bed, tmp_path: Path) -> None:
    block_ap(bed.job(tmp_path))
    for changes in ({"image_share": 0.75}, {"conversations": None}, {"token_weights": "gradient"}):
        with pytest.raises(ConfigError, match="as the run in this folder was started"):
            block_ap(bed.job(tmp_path, **changes))


def test_text_alone_is_what_it_was(bed: Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(quantize, "run_block_ap", lambda *args, **kwargs: given.append((args, kwargs)))
    monkeypatch.setattr(quantize.Run, "finish", lambda run: None)
    block_ap(bed.job(tmp_path, conversations=None))
    (_, batches, *_), options = given[0]
    assert [list(batch) for batch in batches] == [["input_ids"]] * COUNT
    assert options["modalities"] is None


def test_the_checkpoint_keeps_how_it_was_addressed(bed: Bed, tmp_path: Path) -> None:
    template = "{% for m in messages %}{% for p in m.content %}{{ p.get('text', '<image>') }} {% endfor %}{% endfor %}"
    (tmp_path / "mine.jinja").write_text(template)
    talks = replace(bed.talks, template=str(tmp_path / "mine.jinja"))
    made = block_ap(bed.job(tmp_path / "run", conversations=talks, fit=replace(FIT, epochs=0)))
    assert (made / "chat_template.jinja").read_text() == template


@pytest.mark.filterwarnings("ignore:.*these settings are")
def test_the_command_line(bed: Bed, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["block-ap", str(bed.model), "--output", str(tmp_path / "run"), "--quant.group_size", "32"]
    words += ["--conversations.source", bed.talks.source, "--image_folder", str(bed.folder), "--image_share", "1"]
    assert main([*words, "--calibration.count", "8", "--fit.epochs", "0", "--fit.validation_samples", "0"]) == 0
    assert "8 conversations" in capsys.readouterr().out
    assert (tmp_path / "run" / "model" / "eqat.json").is_file()


def test_weights_need_two_kinds_of_tokens(bed: Bed, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="all tokens are text") as raised:
        bed.job(tmp_path, conversations=None, token_weights="gradient")
    assert_four_lines(raised.value)


def test_text_is_asked_for_unless_there_is_none(bed: Bed, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--calibration\.source"):
        block_ap(bed.job(tmp_path, calibration=TextWindows(count=8)))
    with pytest.raises(ConfigError, match=r"--calibration\.count") as raised:
        block_ap(bed.job(tmp_path, calibration=replace(bed.text, count=None)))
    assert_four_lines(raised.value)
    with pytest.raises(DataError, match="lower --image_share"):
        block_ap(bed.job(tmp_path, calibration=TextWindows(count=30), image_share=1.0))
    assert not tmp_path.joinpath("run.json").exists()


def test_the_plan_knows_images(bed: Bed) -> None:
    shape = model_shape(str(bed.model))
    work = planned_work(shape, bed.text, bed.talks, 0.25)
    assert (work.samples, work.longest, work.images) == (COUNT, 500, 0.25)
    assert planned_work(shape, bed.text, None, 0.25).images == 0
