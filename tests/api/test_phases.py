"""Functions and commands are one: the same settings, the same run folders, models that are what `load` gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import HfApi

import eqat_mm
from eqat_mm.api import phases
from eqat_mm.checkpoint.manifest import read_manifest
from eqat_mm.checkpoint.verify import verify_checkpoint
from eqat_mm.cli import main, parse_job
from eqat_mm.commands.line.recipes import Recipe
from eqat_mm.errors import CheckpointError, ConfigError, DataError
from eqat_mm.plan.models import shipped_config
from eqat_mm.quant.packed_linear import PackedLinear
from eqat_mm.quant.spec import QuantSpec
from llava_adapters.aliases import ALIASES
from tests.api.conftest import FEW, STEPS, WINDOWS, Seeing, logits_of, quantized
from tests.checkpoint.files import assert_four_lines, contents
from tests.checkpoint.foreign import assert_read_alike
from tests.tiny_model import Tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*these settings are")


class Asked(Exception):
    """Carries the job that was to be run."""

    def __init__(self, job: Any) -> None:
        super().__init__()
        self.job = job


def raise_asked(job: Any) -> None:
    raise Asked(job)


@pytest.fixture
def only_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("block_ap", "e2e_qp"):
        monkeypatch.setattr(phases, name, raise_asked)


def job_of(function: Any, *given: Any, **settings: Any) -> Any:
    with pytest.raises(Asked) as asked:
        function(*given, **settings)
    return asked.value.job


def words_of(settings: dict[str, Any]) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", json.dumps(value))]


@pytest.mark.usefixtures("only_asked")
def test_conversations_of_a_calibration_are_those_of_the_command() -> None:
    job = job_of(eqat_mm.quantize, "llava-1.5-7b", conversations="mix.json", images="photos", image_share=0.25)
    words = ["--conversations.source", "mix.json", "--image_folder", "photos", "--image_share", "0.25"]
    assert job == parse_job("block-ap", ["--model", "llava-1.5-7b", *words])
    assert (job.conversations.image_folder, job.image_share) == (Path("photos"), 0.25)


# ---- the same job -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("only_asked")
@pytest.mark.parametrize("model", ["llava-1.5-7b", "llama-2-7b"])
@pytest.mark.parametrize("bits", [2, 3])
def test_every_spelling_of_a_model_gives_the_job_of_the_command(tmp_path: Path, model: str, bits: int) -> None:
    (tmp_path / "config.json").write_text(json.dumps(shipped_config(model)), encoding="utf-8")
    words = ["--quant.bits", str(bits)]
    for command, function in (
        ("block-ap", eqat_mm.quantize),
        ("e2e-qp", eqat_mm.tune),
    ):
        wanted = vars(parse_job(command, ["--model", model, *words])) | {"model": None}
        more = {"bits": bits} if function is eqat_mm.quantize else {"quant.bits": bits}
        for spelling in (model, ALIASES[model], tmp_path, str(tmp_path)):
            assert vars(job_of(function, spelling, **more)) | {"model": None} == wanted
        assert wanted["recipe_for"]


@pytest.mark.usefixtures("only_asked")
def test_a_model_in_memory_has_the_recipe_of_its_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of 7B are neither there nor written: what decides is the configuration."""
    (tmp_path / "config.json").write_text(json.dumps(shipped_config("llava-1.5-7b")), encoding="utf-8")
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(tmp_path)
        model = transformers.AutoModelForImageTextToText.from_config(config)
    monkeypatch.setattr(phases, "require_full_precision", lambda model: None)
    monkeypatch.setattr(phases, "written", lambda model, folder, processor, overwrite: folder)
    job = job_of(eqat_mm.quantize, model, bits=3, output=tmp_path / "run")
    wanted = parse_job("block-ap", ["llava-1.5-7b", "--quant.bits", "3"])
    places = {"model": str(tmp_path / "run" / "source"), "output": tmp_path / "run"}
    assert vars(job) == vars(wanted) | places
    assert job.recipe_for == ("llava-1.5",)
    assert eqat_mm.plan_for(model, gpu="h100", quiet=True)[0].fits


@pytest.mark.usefixtures("only_asked")
def test_settings_have_the_names_of_the_options(tmp_path: Path) -> None:
    flat = job_of(eqat_mm.quantize, "llava-1.5-7b", **{"fit.epochs": 4, "seed": 3, "stream_dtype": torch.bfloat16})
    nested = job_of(
        eqat_mm.quantize, "llava-1.5-7b", settings={"fit": {"epochs": 4}, "stream_dtype": "bfloat16"}, seed=3
    )
    words = ["llava-1.5-7b", "--fit.epochs", "4", "--seed", "3", "--stream_dtype", "bfloat16"]
    assert flat == nested == parse_job("block-ap", words)
    assert flat.fit.batch_size == job_of(eqat_mm.quantize, "llava-1.5-7b").fit.batch_size
    assert job_of(eqat_mm.quantize, "m", quant=QuantSpec(3, 128, True)).quant == QuantSpec(3, 128, True)
    own = tmp_path / "own.yaml"
    own.write_text("fit: {epochs: 7}\n", encoding="utf-8")
    assert job_of(eqat_mm.quantize, "llava-1.5-7b", config=own).fit.epochs == 7
    assert job_of(eqat_mm.quantize, "m", config="llava-1.5-w3g64-block-ap").quant == QuantSpec(3, 64)


@pytest.mark.usefixtures("only_asked")
def test_names_of_other_scripts_and_several_texts() -> None:
    job = job_of(eqat_mm.tune, "llava-1.5-7b", conversations="mix.json", images=Path("im"), train_projector=False)
    assert (job.trains, job.conversations.source, job.conversations.image_folder) == ("scales", "mix.json", Path("im"))
    job = job_of(eqat_mm.tune, "llava-1.5-7b", conversations="mix.json", train_projector=True, model_max_length=99)
    assert (job.trains, job.conversations.max_length) == ("scales+projector", 99)
    texts = [Path("a.txt"), {"path": "b.txt", "weight": 3}]
    job = job_of(eqat_mm.quantize, "m", text=texts)
    assert [(each.path, each.weight) for each in job.calibration.sources] == [("a.txt", 1.0), ("b.txt", 3.0)]


@pytest.mark.usefixtures("only_asked")
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"fit.epochz": 4}, "did you mean --fit.epochs?"),
        ({"epochs": 4}, "--fit.epochs"),
        ({"bit": 4}, "--quant.bits"),
        ({"settings": {"fit": {"epoch": 1}}}, "--fit.epochs"),
        ({"bits": 5}, "2, 3, 4, 8"),
        ({"bits": "three"}, "2, 3, 4, 8"),
        ({"fit.epochs": -1}, "an integer of 0 or more"),
        ({"bits": 3, "quant.bits": 2}, "quant.bits twice"),
        ({"settings": {"seed": 1}, "seed": 2}, "seed twice"),
        ({"help": True}, "help in Python"),
        ({"print_config": None}, "print_config in Python"),
        ({"processor": "p"}, "a model in memory"),
        ({"config": "no-such-recipe"}, "--config"),
    ],
)
def test_wrong_settings_are_four_lines(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        eqat_mm.quantize("m", output=tmp_path / "run", **settings)
    assert_four_lines(raised.value)
    assert words in str(raised.value)
    assert not any(tmp_path.iterdir())


def test_without_text_it_says_so(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"calibration\.source"):
        eqat_mm.quantize(tiny.folder, output=tmp_path / "run")
    with pytest.raises(DataError, match="nothing"):
        eqat_mm.quantize(tiny.folder, text=tmp_path / "nothing.txt", output=tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()


# ---- the same run -----------------------------------------------------------------------------------


def stopped(*_: Any, **__: Any) -> None:
    raise Asked(None)


def command_words(tiny: Tiny, output: Path) -> list[str]:
    given = {"quant.bits": 2, "quant.group_size": 32, "calibration.length": 16, "calibration.count": 12}
    given |= {f"fit.{name}": value for name, value in FEW["fit"].items()}
    places = ["--calibration.source", str(tiny.text), "--output", str(output), "--precision", "float32"]
    return ["block-ap", str(tiny.folder), *words_of(given), *places]


def test_begun_by_the_command_ended_in_python(
    tiny: Tiny, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(
            "eqat_mm.checkpoint.write.CheckpointWriter.finish", lambda *_, **__: (_ for _ in ()).throw(Asked(0))
        )
        with pytest.raises(Asked):
            main(command_words(tiny, output))
    assert not (output / "model" / "eqat.json").exists()
    capsys.readouterr()
    quantized(tiny, output)
    assert "block 1/2" not in capsys.readouterr().out
    assert same_files(output / "model", packed / "model")
    assert main(command_words(tiny, output)) == 0
    assert f"already finished: {output / 'model'}" in capsys.readouterr().out


def same_files(one: Path, other: Path) -> bool:
    return read_manifest(one).files == read_manifest(other).files


def test_ended_by_the_command_is_ended(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command_words(tiny, tmp_path / "run")) == 0
    before = contents(tmp_path / "run")
    model = quantized(tiny, tmp_path / "run")
    assert f"already finished: {tmp_path / 'run' / 'model'}" in capsys.readouterr().out
    assert contents(tmp_path / "run") == before
    assert torch.equal(logits_of(model), logits_of(eqat_mm.load(tmp_path / "run")))
    with pytest.raises(ConfigError, match="seed"):
        quantized(tiny, tmp_path / "run", seed=1)


def test_e2e_qp_goes_on_too(tiny: Tiny, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "tuned"
    model = eqat_mm.tune(eqat_mm.load(packed), text=tiny.text, output=output, settings=STEPS | WINDOWS)
    words = ["--quant.group_size", "32", "--quantized", str(packed / "model"), "--data.source", str(tiny.text)]
    words += ["--output", str(output), "--data.length", "16", "--data.count", "24"]
    capsys.readouterr()
    assert (
        main(
            [
                "e2e-qp",
                str(tiny.folder),
                *words,
                *words_of({k: v for k, v in STEPS.items() if k != "precision"}),
                "--precision",
                "float32",
            ]
        )
        == 0
    )
    assert "already finished" in capsys.readouterr().out
    assert torch.equal(logits_of(model), logits_of(eqat_mm.load(output)))
    assert not torch.equal(logits_of(model), logits_of(eqat_mm.load(packed)))


def test_the_default_folders_are_those_of_the_commands(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = eqat_mm.quantize(tiny.folder, bits=2, group_size=32, text=tiny.text, settings=FEW, quiet=True)
    assert Path("runs/tiny-llama-w2g32/block-ap/model/eqat.json").is_file()
    eqat_mm.tune(model, text=tiny.text, settings=STEPS | WINDOWS)
    assert Path("runs/tiny-llama-w2g32/e2e-qp/model/eqat.json").is_file()
    with pytest.raises(CheckpointError, match="2 runs: block-ap, e2e-qp"):
        eqat_mm.load("runs/tiny-llama-w2g32")


# ---- what comes back --------------------------------------------------------------------------------


def test_it_is_a_packed_model_that_generates_and_is_saved(tiny: Tiny, packed: Path, tmp_path: Path) -> None:
    model: Any = quantized(tiny, packed)
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 14
    answer = model.generate(torch.arange(2, 6)[None], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert answer.shape == (1, 7)
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits_of(eqat_mm.load(tmp_path / "out")), logits_of(model))
    assert_read_alike(tmp_path / "out", QuantSpec(2, 32), {"input_ids": torch.arange(2, 12)[None]})
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("w5")["input_ids"] == [5]


def test_what_is_pushed_is_loaded_from_the_folder(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two calls of `huggingface_hub.HfApi` that reach the network are replaced, and nothing else."""

    def create_repo(self: HfApi, repo_id: str, **_: Any) -> Any:
        return type("Url", (), {"repo_id": repo_id})

    def create_commit(self: HfApi, repo_id: str, operations: list[Any], **_: Any) -> str:
        for operation in operations:
            target = tmp_path / repo_id / operation.path_in_repo
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(Path(operation.path_or_fileobj).read_bytes())
        return "done"

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    model: Any = eqat_mm.load(packed)
    model.push_to_hub("me/tiny-w2")
    assert torch.equal(logits_of(eqat_mm.load(tmp_path / "me" / "tiny-w2")), logits_of(model))


def test_quiet_says_nothing(tiny: Tiny, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = quantized(tiny, tmp_path / "run", quiet=True)
    eqat_mm.tune(model, text=tiny.text, settings=STEPS | WINDOWS, quiet=True)
    eqat_mm.plan_for(tiny.folder, quiet=True)
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")
    quantized(tiny, packed)
    assert "already finished" in capsys.readouterr().out


# ---- tune -------------------------------------------------------------------------------------------


def test_tune_finds_what_a_model_was_made_from(
    tiny: Tiny, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phases, "e2e_qp", raise_asked)
    jobs = [
        job_of(eqat_mm.tune, model, text="t.txt")
        for model in (eqat_mm.load(packed), packed, str(packed / "model"), packed.parent)
    ]
    for job in jobs:
        assert (job.model, job.quant, job.quantized) == (str(tiny.folder), QuantSpec(2, 32), packed / "model")
        assert job.output == packed.parent / "e2e-qp"
    eqat_mm.load(packed).save_pretrained(tmp_path / "saved")  # type: ignore[operator]
    job = job_of(eqat_mm.tune, tmp_path / "saved", text="t.txt", source="elsewhere", trains="lora")
    assert (job.model, job.output) == ("elsewhere", Path("runs/elsewhere-w2g32/lora"))


def test_tune_beside_a_run_folder_of_ones_own(
    tiny: Tiny, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized(tiny, tmp_path / "mine", quiet=True)
    monkeypatch.setattr(phases, "e2e_qp", raise_asked)
    assert job_of(eqat_mm.tune, tmp_path / "mine", text="t.txt").output == tmp_path / "mine-e2e-qp"


def test_the_recipe_is_found_where_the_source_is_gone(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phases, "e2e_qp", raise_asked)
    monkeypatch.setattr("eqat_mm.commands.line.taken.fitting_recipe", fitting_recipe_of([str(packed / "model")]))
    job = job_of(eqat_mm.tune, packed, source="gone/away", text="t.txt")
    assert (job.model, job.seed) == ("gone/away", 7)


def fitting_recipe_of(known: list[str]) -> Any:
    """A recipe for the models of these names."""
    recipe = Recipe("tiny-e2e-qp", "e2e-qp", "tiny", {"seed": 7})
    return lambda command, model, *_: recipe if model in known else None


def test_a_model_that_is_not_packed_is_not_tuned(tiny: Tiny) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny.folder)
    with pytest.raises(ConfigError, match="quantize it first") as raised:
        eqat_mm.tune(model, text=tiny.text)
    assert_four_lines(raised.value)


def test_five_lines_on_a_llava(seeing: Seeing, tmp_path: Path) -> None:
    model: Any = eqat_mm.quantize(
        seeing.folder, bits=4, group_size=32, text=seeing.text, output=tmp_path / "x", settings=FEW
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = STEPS | {"batch_size": 2}
    model = eqat_mm.tune(model, conversations=seeing.conversations, train_projector=True, settings=settings)
    assert model.checkpoint_origin.folder == tmp_path / "x-e2e-qp" / "model"
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {"projector" in name or name.endswith("weight_scale") for name in changed} == {True}
    assert any("projector" in name for name in changed)
    found = eqat_mm.evaluate(model, text=seeing.text, settings={"data.length": 16, "data.count": 4})
    assert found.kl is not None
    assert found.kl > 0
    model.save_pretrained(tmp_path / "out")
    assert verify_checkpoint(tmp_path / "out").stage == "e2e-qp"
    assert torch.equal(logits_of(eqat_mm.load(tmp_path / "out")), logits_of(model))
    with pytest.raises(ConfigError, match="text_only"):
        eqat_mm.tune(tmp_path / "x", text=seeing.text, settings=settings)


# ---- plan -------------------------------------------------------------------------------------------


def test_a_plan_is_that_of_the_command(capsys: pytest.CaptureFixture[str], tiny: Tiny) -> None:
    found = eqat_mm.plan_for("llava-1.5-7b", bits=3, gpu="4090")
    said = capsys.readouterr().out
    assert main(["plan", "llava-1.5-7b", "--quant.bits", "3", "--gpu", "4090"]) == 0
    assert capsys.readouterr().out == said
    assert [verdict.phase.name for verdict in found][:2] == ["Block-AP", "E2E-QP, text"]
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny.folder)
    ours, theirs = (eqat_mm.plan_for(each, gpu="4090", quiet=True) for each in (model, tiny.folder))
    assert [each.phase.gpu for each in ours] == [each.phase.gpu for each in theirs]
