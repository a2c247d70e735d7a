"""`eqat llm-qat` and `eqat llm-qat-table` on the tiny model."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationMixin

from eqat_mm.checkpoint.verify import verify_checkpoint
from eqat_mm.cli import main, parse_job
from eqat_mm.commands.tables import llm_qat_table as table_module
from eqat_mm.commands.tables.llm_qat_table import QUICK_SETTINGS, LLMQATTableJob, llm_qat_table, table
from eqat_mm.commands.verbs import llm_qat as module
from eqat_mm.commands.verbs.evaluate import EvalJob, evaluate
from eqat_mm.commands.verbs.generate import GenerateJob, generate
from eqat_mm.commands.verbs.llm_qat import LLMQATJob, llm_qat
from eqat_mm.data.image_text.settings import ImageTextData
from eqat_mm.data.text.settings import TextWindows
from eqat_mm.errors import AdapterError, ConfigError, EqatError
from eqat_mm.quant.bit_widths import BitWidths
from eqat_mm.quant.kv_cache import QuantizedKVCache, cache_bytes
from eqat_mm.runtime.files import read_json
from tests.checkpoint.files import assert_four_lines, contents, same_weights
from tests.commands.jobs import llm_qat_job, rtn_job
from tests.tiny_model import Tiny
from tests.train.stopping import Stopped, stop_at_step


def measured(tiny: Tiny, model: Path) -> dict[str, Any]:
    data = tiny.windows(4, held_out=True)
    return evaluate(EvalJob(model=str(model), reference=str(tiny.folder), data=data, device="cpu"))


@pytest.fixture(scope="module")
def trained(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of LLM-QAT at 4-8-4; not to be altered."""
    folder = tmp_path_factory.mktemp("llm-qat")
    assert llm_qat(llm_qat_job(tiny, folder)) == folder / "model"
    return folder


@pytest.fixture(scope="module")
def rounded(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of the same without training."""
    folder = tmp_path_factory.mktemp("rounded")
    llm_qat(llm_qat_job(tiny, folder, max_steps=0))
    return folder


# ---- llm-qat -------------------------------------------------------------------------------------


def test_the_run_folder(trained: Path) -> None:
    assert {path.name for path in trained.iterdir()} == {"run.json", "metrics.jsonl", "model"}
    manifest = verify_checkpoint(trained / "model")
    assert (manifest.stage, manifest.widths) == ("llm-qat", BitWidths(4, 8, 4))
    assert manifest.provenance[-1]["config"]["bits"] == "4-8-4"
    assert len((trained / "metrics.jsonl").read_text().splitlines()) == 7


def test_training_mends_what_rounding_broke(tiny: Tiny, rounded: Path, tmp_path: Path) -> None:
    trained = llm_qat(llm_qat_job(tiny, tmp_path, learning_rate=1e-3, max_steps=60, data=tiny.windows(120)))
    better, worse = measured(tiny, trained), measured(tiny, rounded / "model")
    assert better["kl"] < 0.9 * worse["kl"]
    assert better["bits_per_weight"] == worse["bits_per_weight"] < 4.3


def test_nothing_trained_is_round_to_nearest(rounded: Path) -> None:
    assert verify_checkpoint(rounded / "model").stage == "round-to-nearest"


def test_smoothing_composes_with_rounding_and_with_training(tiny: Tiny, tmp_path: Path) -> None:
    for name, steps in (("rounded", 0), ("trained", 2)):
        plain = llm_qat(llm_qat_job(tiny, tmp_path / name, max_steps=steps))
        smooth = llm_qat(llm_qat_job(tiny, tmp_path / f"{name}-smooth", max_steps=steps, smooth=0.5, smooth_samples=4))
        assert verify_checkpoint(smooth).provenance[-1]["config"]["smooth"] == 0.5
        assert not same_weights(plain, smooth)
        assert measured(tiny, smooth)["kl"] < 10


def test_labels_need_no_teacher(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, load_model = [], module.load_model

    def spy(*args: Any) -> Any:
        loaded.append(args)
        return load_model(*args)

    monkeypatch.setattr(module, "load_model", spy)
    llm_qat(llm_qat_job(tiny, tmp_path / "labels", loss="cross-entropy", max_steps=2))
    assert len(loaded) == 1
    llm_qat(llm_qat_job(tiny, tmp_path / "logits", max_steps=2))
    assert len(loaded) == 3


def test_a_finished_run_is_not_repeated(
    tiny: Tiny, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(trained)
    monkeypatch.setattr(module, "run_llm_qat", lambda *_, **__: pytest.fail("trained again"))
    assert llm_qat(llm_qat_job(tiny, trained)) == trained / "model"
    assert "already finished" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="bits"):
        llm_qat(llm_qat_job(tiny, trained, bits="4-8-8"))
    assert contents(trained) == before


def test_a_stopped_run_is_continued(tiny: Tiny, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = llm_qat_job(tiny, tmp_path, save_steps=2)
    steps = stop_at_step(monkeypatch, 4)
    with pytest.raises(Stopped):
        llm_qat(job)
    assert not (tmp_path / "model").exists()
    llm_qat(job)
    assert len(steps) == 4 + 4
    assert same_weights(tmp_path / "model", trained / "model")


def test_the_default_folders_name_the_bits(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert llm_qat(llm_qat_job(tiny, None, max_steps=0)) == Path("runs/tiny-llama-4-8-4/rtn/model")
    assert llm_qat(llm_qat_job(tiny, None, max_steps=1)) == Path("runs/tiny-llama-4-8-4/llm-qat/model")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bits": "4-8"}, "4-8"),
        ({"bits": "16-8-8"}, "weights"),
        ({"group_size": 48}, "group_size"),
        ({"group_size": 256}, "group_size"),
        ({"smooth": 1.5}, "--smooth"),
        ({"deepspeed": "zero-9"}, "zero-9"),
        ({"data": TextWindows("nowhere.txt", count=4096)}, "nowhere.txt"),
    ],
    ids=str,
)
def test_bad_settings_leave_no_folder(tiny: Tiny, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(EqatError) as raised:
        llm_qat(llm_qat_job(tiny, tmp_path / "run", **changes))
    assert_four_lines(raised.value)
    assert words in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_a_packed_model_is_refused(tiny: Tiny, rounded: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quantized already"):
        llm_qat(llm_qat_job(tiny, tmp_path, model=str(rounded / "model"), max_steps=0))
    with pytest.raises(ConfigError, match="quantized already"):
        module.open_full_precision(str(rounded / "model"), None)
    assert rtn_job(tiny, None).model == str(tiny.folder)


def test_an_unknown_adapter_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(AdapterError):
        llm_qat(llm_qat_job(tiny, tmp_path, adapter="nothing"))


# ---- what it makes is used -----------------------------------------------------------------------


def test_generation_stores_integers(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    caches, original = [], GenerationMixin.generate

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        caches.append(kwargs["past_key_values"])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "generate", spy)
    job = GenerateJob(model=str(trained / "model"), prompt="w5 w6 w7", max_new_tokens=5, device="cpu")
    written = generate(job)
    (cache,) = caches
    assert isinstance(cache, QuantizedKVCache)
    tokens = cache.get_seq_length()
    assert cache_bytes(cache) == 2 * 2 * tokens * 2 * (16 // 2 + 2)  # layers, keys and values, heads, bytes
    monkeypatch.setattr("eqat_eval.decoding.new_cache", lambda model: None)
    assert generate(job) == written
    capsys.readouterr()


# ---- the command line ----------------------------------------------------------------------------


def test_the_command_takes_bits_and_smoothing() -> None:
    job = parse_job("llm-qat", ["--model", "some", "--bits", "4-8-4", "--smooth", "0.5", "--loss", "cross-entropy"])
    assert (job.bits, job.smooth, job.loss) == ("4-8-4", 0.5, "cross-entropy")


def test_the_tuned_recipe_is_found_by_model_and_bits(capsys: pytest.CaptureFixture[str]) -> None:
    tuned = parse_job("llm-qat", ["--model", "smollm2-135m", "--bits", "4-8-4"])
    assert capsys.readouterr().out == "settings: recipe smollm2-135m-4-8-4-llm-qat, for llama: smollm2-135m, 135m\n"
    assert (tuned.bits, tuned.recipe_for) == ("4-8-4", ("smollm2-135m",))
    assert parse_job("llm-qat", ["smollm2-135m", "--bits", "8-8-8"]).recipe_for == ()


def test_settings_of_another_model_are_warned_of(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="llm-qat: these settings are the paper's"):
        llm_qat(llm_qat_job(tiny, tmp_path / "warned", recipe_for=(), max_steps=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llm_qat(llm_qat_job(tiny, tmp_path / "rounded", recipe_for=(), max_steps=0))


def test_bad_bits_on_the_command_line(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["llm-qat", "--model", str(tiny.folder), "--bits", "4-8", "--device", "cpu"]) == 2
    assert "three bit widths" in capsys.readouterr().err


# ---- the table -----------------------------------------------------------------------------------


def table_job(tiny: Tiny, output: Path, **changes: Any) -> LLMQATTableJob:
    given: dict[str, Any] = {
        "train": llm_qat_job(tiny, None, max_steps=3, smooth_samples=4),
        "bits": ("4-8-4", "8-8-8"),
        "generated": tiny.text,
        "data": tiny.windows(4, held_out=True),
        "output": output,
    }
    return LLMQATTableJob(**(given | changes))


METHODS = [
    "round-to-nearest",
    "SmoothQuant",
    "LLM-QAT, generated text",
    "LLM-QAT, real text",
    "cross entropy for KL, real text",
]


@pytest.fixture(scope="module")
def made(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Folder and rows of a table; not to be altered."""
    folder = tmp_path_factory.mktemp("table")
    return folder, llm_qat_table(table_job(tiny, folder))


def test_the_table_has_a_row_per_setting_and_method(made: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, rows = made
    wanted = [("16-16-16", "full precision"), *((bits, method) for bits in ("4-8-4", "8-8-8") for method in METHODS)]
    assert [(row["bits"], row["method"]) for row in rows] == wanted
    assert read_json(folder / "results.json")["rows"] == rows
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert all(row["kl"] > 0 for row in rows[1:])
    assert len(table(rows).splitlines()) == 1 + len(rows)


def test_a_table_is_of_text(tiny: Tiny, tmp_path: Path) -> None:
    talks = llm_qat_job(tiny, None, conversations=ImageTextData("talks.json"))
    with pytest.raises(ConfigError, match=r"talks\.json") as raised:
        table_job(tiny, tmp_path, train=talks)
    assert_four_lines(raised.value)


def test_a_table_made_again_makes_nothing_anew(
    tiny: Tiny, made: tuple[Path, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rows = made
    monkeypatch.setattr(table_module, "llm_qat", lambda _: pytest.fail("made again"))
    monkeypatch.setattr(table_module.Bench, "measure", lambda *_: pytest.fail("measured again"))
    assert llm_qat_table(table_job(tiny, folder)) == rows


def test_a_stopped_table_goes_on_where_it_stopped(
    tiny: Tiny, made: tuple[Path, list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []

    def stop_at_fourth(job: LLMQATJob) -> Path:
        runs.append(job)
        if len(runs) == 4:
            raise KeyboardInterrupt
        return llm_qat(job)

    monkeypatch.setattr(table_module, "llm_qat", stop_at_fourth)
    with pytest.raises(KeyboardInterrupt):
        llm_qat_table(table_job(tiny, tmp_path))
    assert len(read_json(tmp_path / "results.json")["rows"]) == 1 + 3
    rows = llm_qat_table(table_job(tiny, tmp_path))
    assert len(runs) == 4 + 7
    for row, expected in zip(rows, made[1], strict=True):
        assert row | {"seconds": 0} == expected | {"seconds": 0}


def test_other_settings_are_measured_again(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[LLMQATJob] = []

    def spy(job: LLMQATJob) -> Path:
        runs.append(job)
        return llm_qat(job)

    monkeypatch.setattr(table_module, "llm_qat", spy)
    job = table_job(tiny, tmp_path, bits=("4-8-4",), generated=None, train=llm_qat_job(tiny, None, max_steps=1))
    llm_qat_table(job)
    assert len(runs) == 4
    rows = llm_qat_table(replace(job, data=tiny.windows(3, held_out=True)))
    assert [run.output for run in runs[:4]] == [run.output for run in runs[4:]]
    assert read_json(tmp_path / "results.json")["tokens"] == 3 * 15
    with pytest.raises(ConfigError, match="seed"):
        llm_qat_table(replace(job, train=replace(job.train, seed=1)))
    llm_qat_table(replace(job, train=replace(job.train, seed=1), overwrite=True))
    assert len(rows) == 5


def test_quick_is_a_few_steps_of_two_settings(tiny: Tiny, tmp_path: Path) -> None:
    job = table_job(tiny, tmp_path, bits=table_module.SETTINGS, generated=None, quick=True)
    rows = llm_qat_table(replace(job, train=llm_qat_job(tiny, None, max_steps=100, data=tiny.windows(24))))
    assert {row["bits"] for row in rows[1:]} == set(QUICK_SETTINGS)
    assert torch.tensor([row["perplexity"] for row in rows]).isfinite().all()
    record = verify_checkpoint(tmp_path / "4-8-4" / "real" / "model").provenance[-1]
    assert record["config"]["max_steps"] == table_module.QUICK_STEPS
