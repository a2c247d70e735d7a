"""`eqat quantize` on a tiny Llama and a tiny LLaVA: the phases are those of the single commands."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from eqat_mm.checkpoint.manifest import read_manifest
from eqat_mm.checkpoint.verify import verify_checkpoint
from eqat_mm.cli import main, parse_job
from eqat_mm.commands.tables import whole as module
from eqat_mm.commands.tables.whole import QuantizeJob
from eqat_mm.errors import ConfigError
from eqat_mm.plan import machine
from eqat_mm.runtime.files import read_json
from tests.checkpoint.files import contents
from tests.tiny_llava import save_conversations, save_tiny_llava
from tests.tiny_model import Tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*these settings are")

BLOCK_AP = """
calibration: {length: 16, count: 12}
fit: {epochs: 1, lr_weight: 2.0e-3, validation_samples: 3}
precision: float32
"""
E2E_QP = """
data: {length: 16, count: 24}
learning_rate: 2.0e-3
max_steps: 6
loss: kl
batch_size: 2
accumulation: 1
precision: float32
"""
SPOKEN = "conversations: {template: vicuna_v1}\n"


@pytest.fixture(autouse=True)
def _in_a_folder_with_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ap.yaml").write_text(BLOCK_AP, encoding="utf-8")
    Path("qp.yaml").write_text(E2E_QP, encoding="utf-8")


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA, with conversations beside it."""
    folder = tmp_path_factory.mktemp("seeing")
    save_tiny_llava(folder / "llava", dtype=torch.float32)
    save_conversations(folder, 6)
    return folder / "llava"


def words_for(model: Path, tiny: Tiny, *more: str) -> list[str]:
    spec = ["quantize", str(model), "--bits", "2", "--group_size", "32", "--text", str(tiny.text)]
    return [*spec, "--block_ap", "ap.yaml", "--data.length", "16", "--data.count", "4", *more]


def never(*_: Any, **__: Any) -> None:
    raise AssertionError("a finished phase was begun again")


def test_all_of_it_then_nothing_again(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = words_for(tiny.folder, tiny, "--e2e_qp", "qp.yaml")
    assert main(words) == 0
    said = capsys.readouterr().out
    root = Path(f"runs/{tiny.folder.name}-w2g32")
    assert said.index("plan of") < said.index("E2E-QP, text") < said.index("== Block-AP") < said.index("the model:")
    rows = read_json(root / "results.json")["rows"]
    assert [row["stage"] for row in rows] == ["full precision", "Block-AP", "Block-AP + E2E-QP"]
    assert rows[2]["kl"] < rows[1]["kl"]
    assert rows[1]["bits_per_weight"] == pytest.approx(2.5625)
    assert said.count("Block-AP + E2E-QP  ") == 1
    assert f"the model: {root / 'e2e-qp' / 'model'}" in said
    assert verify_checkpoint(root / "e2e-qp" / "model").stage == "e2e-qp"
    for line in said.partition("next:\n")[2].splitlines():
        if line.startswith("  eqat "):
            command, *rest = shlex.split(line)[1:]
            assert parse_job(command, rest)
    before = contents(root / "e2e-qp" / "model")
    for name in ("verbs.quantize.run_block_ap", "verbs.tune.run_e2e_qp", "tables.rungs.Bench.row"):
        monkeypatch.setattr(f"eqat_mm.commands.{name}", never, raising=True)
    assert main(words) == 0
    assert read_json(root / "results.json")["rows"] == rows
    assert contents(root / "e2e-qp" / "model") == before


def module_of(command: str) -> Any:
    from eqat_mm.commands.line.commands import COMMANDS

    return COMMANDS[command].load()[0]


def test_phases_are_those_of_the_single_commands(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = ["--quant.group_size", "32"]
    assert (
        main(["block-ap", str(tiny.folder), *spec, "--config", "ap.yaml", "--calibration.source", str(tiny.text)]) == 0
    )
    assert main(["e2e-qp", str(tiny.folder), *spec, "--config", "qp.yaml", "--data.source", str(tiny.text)]) == 0
    for name in ("verbs.quantize.run_block_ap", "verbs.tune.run_e2e_qp"):
        monkeypatch.setattr(f"eqat_mm.commands.{name}", never)
    capsys.readouterr()
    assert main(words_for(tiny.folder, tiny, "--e2e_qp", "qp.yaml")) == 0
    assert capsys.readouterr().out.count("already finished") == 2


def test_stopped_it_goes_on(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    words = words_for(tiny.folder, tiny, "--e2e_qp", "qp.yaml", "--output", "mine")
    with monkeypatch.context() as patch:
        patch.setattr("eqat_mm.commands.verbs.tune.run_e2e_qp", stop)
        assert main(words) == 130
    assert sorted(path.name for path in Path("mine").iterdir()) == ["block-ap", "e2e-qp", "eval", "results.json"]
    monkeypatch.setattr("eqat_mm.commands.verbs.quantize.run_block_ap", never)
    capsys.readouterr()
    assert main(words) == 0
    assert Path("mine/e2e-qp/model/eqat.json").is_file()


def test_a_plan_alone_writes_nothing(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(tmp_path)
    assert main(words_for(tiny.folder, tiny, "--plan")) == 0
    said = capsys.readouterr().out
    assert all(phase in said for phase in ("Block-AP", "E2E-QP, text", "evaluation"))
    assert "==" not in said
    assert main(["quantize", "llava-1.5-7b", "--bits", "3", "--text", "texts/", "--plan"]) == 0  # nothing is downloaded
    assert "settings: recipe llava-1.5-w3g64-block-ap" in capsys.readouterr().out
    assert contents(tmp_path) == before


def test_what_does_not_fit_is_refused(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(tmp_path)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    assert main(words_for(tiny.folder, tiny)) == 2
    said = capsys.readouterr()
    assert "short of disk" in said.out
    assert "ResourceError" in said.err
    assert contents(tmp_path) == before


def test_a_llava_without_conversations_is_told(
    tiny: Tiny, seeing: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words_for(seeing, tiny, "--output", "x")) == 0
    said = capsys.readouterr().out
    assert "E2E-QP, the second phase, is left out" in said
    assert [row["stage"] for row in read_json(Path("x/results.json"))["rows"]] == ["full precision", "Block-AP"]
    again = said.partition("next:\n  ")[2].splitlines()[0]
    monkeypatch.setattr("eqat_mm.commands.verbs.quantize.run_block_ap", never)
    mix = str(seeing.parent / "mix.json")
    words = shlex.split(again.replace("FILE.json", mix).replace("FOLDER", str(seeing.parent)))
    assert main([*words[1:], "--e2e_qp", "qp.yaml"]) == 0
    assert verify_checkpoint(Path("x/e2e-qp/model")).stage == "e2e-qp"
    assert len(read_json(Path("x/results.json"))["rows"]) == 3


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--conversations", "no-such.json"], "no-such.json"),
        (["--data_path", "no-such.json", "--image_folder", "."], "no-such.json"),
        (["--data.count", "4000"], "text"),
        (["--e2e_qp", "late.yaml", "--conversations", "MIX"], "warmup_steps"),
        (["--block_ap", "no-such-recipe"], "no-such-recipe"),
        (["--text_only"], "unknown option"),
    ],
    ids=str,
)
def test_what_the_last_phase_lacks_is_told_before_the_first(
    tiny: Tiny, seeing: Path, capsys: pytest.CaptureFixture[str], more: list[str], words: str
) -> None:
    Path("late.yaml").write_text("epochs: 1\nwarmup_steps: 500\n", encoding="utf-8")
    mix = str(seeing.parent / "mix.json")
    assert main(words_for(seeing, tiny, "--output", "x", *(mix if word == "MIX" else word for word in more))) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert "== " not in said.out
    assert not list(Path("x").glob("*/model"))


@pytest.mark.parametrize("share", [None, 0.5], ids=["conversations alone", "with text among them"])
def test_a_language_model_is_tuned_on_conversations_too(tiny: Tiny, share: float | None) -> None:
    turns = [{"from": "human", "value": "w5 w6"}, {"from": "gpt", "value": "w7 w8"}]
    Path("mix.json").write_text(json.dumps([{"id": "0", "conversations": turns}] * 6), encoding="utf-8")
    Path("qp.yaml").write_text(E2E_QP + SPOKEN + ("" if share is None else f"text_share: {share}\n"), encoding="utf-8")
    assert main(words_for(tiny.folder, tiny, "--e2e_qp", "qp.yaml", "--conversations", "mix.json")) == 0
    run = read_json(Path(f"runs/{tiny.folder.name}-w2g32/e2e-qp/run.json"))["config"]
    assert (run["conversations"]["source"], run["text_share"]) == ("mix.json", share)
    assert run["data"]["source"] == (None if share is None else str(tiny.text))


def test_the_symmetric_grid_is_that_of_both_phases(tiny: Tiny) -> None:
    assert main(words_for(tiny.folder, tiny, "--e2e_qp", "qp.yaml", "--symmetric", "true")) == 0
    for phase in ("block-ap", "e2e-qp"):
        assert read_manifest(Path(f"runs/{tiny.folder.name}-w2g32sym/{phase}/model")).spec["symmetric"]


def test_a_language_model_without_text_is_refused(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", str(tiny.folder)]) == 2
    assert "--text" in capsys.readouterr().err


def test_under_a_launcher_it_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError) as raised:
        module.quantize(QuantizeJob(model="llava-1.5-7b"))
    assert "torchrun --nproc_per_node 4 -m eqat_mm block-ap --model llava-1.5-7b" in raised.value.do
    assert "deepspeed --num_gpus 4 --module eqat_mm e2e-qp" in raised.value.do
