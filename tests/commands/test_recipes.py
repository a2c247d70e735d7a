"""Recipes by what a model is and by name, and the warning where there is none for a model."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import transformers

from eqat_mm.cli import main, parse_job
from eqat_mm.commands.line.families import LEFT_OUT, families
from eqat_mm.commands.line.model_config import config_of
from eqat_mm.commands.line.recipes import (
    Recipe,
    family_of,
    find_recipe,
    fitting_recipe,
    named_recipe,
    recipe_names,
    warn_without_recipe,
)
from eqat_mm.errors import ConfigError
from eqat_mm.plan.models import shipped_config
from llava_adapters.aliases import ALIASES
from tests.checkpoint.files import assert_four_lines

MODELS = ["llama-2-13b", "llava-1.5-7b", "llava-v1.6-mistral-7b", "smollm2-135m", "demo-llava"]


def job_of(command: str, *argv: str) -> Any:
    return parse_job(command, argv)


def save_config(folder: Path, model: str, **changes: Any) -> Path:
    """A folder with the config.json of a shipped model; a text tower's keys are changed."""
    config = dict(shipped_config(model) or {})
    tower = config["text_config"] = dict(config["text_config"]) if "text_config" in config else {}
    (tower or config).update(changes)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config if tower else {**config, "text_config": None}))
    return folder


# ---- what a model is --------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["block-ap", "e2e-qp"])
@pytest.mark.parametrize("model", MODELS)
def test_every_spelling_of_a_model_gives_one_configuration(tmp_path: Path, command: str, model: str) -> None:
    folder = save_config(tmp_path / "mine", model)
    run = save_config(tmp_path / "run" / "model", model).parent
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"model: {folder}\nquant: {{bits: 3}}\n", encoding="utf-8")
    spec = ["--quant.bits", "3"]
    spellings = [
        *([name, *spec] for name in (model, ALIASES.get(model, model), str(folder), str(run))),
        ["--quant.bits=3", f"--model={model}"],
        ["--quant", "{bits: 3}", "--model", str(folder)],
        ["--config", str(mine)],
    ]
    jobs = [vars(job_of(command, *words)) | {"model": None} for words in spellings]
    assert jobs == [jobs[0]] * len(jobs)
    assert jobs[0]["recipe_for"] == (family_of(config_of(model) or {}).name,)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("model", "changes", "family"),
    [
        ("llama-2-7b", {"vocab_size": 32016}, "llama-2"),
        ("llama-2-7b", {"vocab_size": 64000}, None),
        ("llama-2-7b", {"intermediate_size": 14336}, None),
        ("llama-2-7b", {"num_hidden_layers": 31}, None),
        ("llava-1.5-7b", {"vocab_size": 50000}, "llava-1.5"),
        ("llava-1.5-7b", {"model_type": "mistral", "intermediate_size": 14336}, None),
        ("llava-v1.6-mistral-7b", {}, "llava-next"),
        ("smollm2-135m", {"hidden_size": 960}, None),
        ("llama-2-7b", {"hidden_size": "4096"}, None),
    ],
)
def test_architecture_and_sizes_make_the_family(
    tmp_path: Path, model: str, changes: dict[str, Any], family: str | None
) -> None:
    found = family_of(config_of(str(save_config(tmp_path, model, **changes))) or {})
    assert (None if found is None else found.name) == family


def test_sizes_that_a_published_llava_leaves_out_are_those_of_its_model_type() -> None:
    bare = {"model_type": "llava", "text_config": {"model_type": "llama", "vocab_size": 32064}}
    assert family_of(bare) is families()["llava-1.5"]
    for kind, sizes in LEFT_OUT.items():
        defaults = transformers.AutoConfig.for_model(kind)
        assert {name: getattr(defaults, name) for name in sizes} == sizes


@pytest.mark.parametrize("text", ["[]", "{", "", '{"text_config": 3}', '{"text_config": [1]}', "[" * 100_000, '"x"'])
def test_a_config_that_is_none_has_no_recipe(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    assert fitting_recipe("block-ap", str(tmp_path), "2") is None


@pytest.mark.parametrize("model", ["nobody/nothing", "no-such-model", "", "\0", "x" * 5000, "a/b/c", "../x"])
def test_a_model_that_is_not_there_has_no_recipe(model: str) -> None:
    assert config_of(model) is None


def test_the_command_says_which_recipe_it_took_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(save_config(tmp_path / "my-llava", "llava-1.5-7b"))
    job_of("e2e-qp", folder)
    said = "settings: recipe llava-1.5-w2g64-e2e-qp, for llava with a llama tower: llava-1.5, 7b\n"
    assert capsys.readouterr().out == said
    job_of("e2e-qp", folder, "--config", "llava-1.5-w3g64-e2e-qp")
    assert capsys.readouterr().out == "settings: recipe llava-1.5-w3g64-e2e-qp, as --config says\n"
    job_of("e2e-qp", folder, "--quant.bits", "8")
    assert capsys.readouterr().out == ""


def test_bits_that_were_not_tuned_have_no_recipe() -> None:
    assert fitting_recipe("block-ap", "llava-1.5-7b", "8") is None
    assert fitting_recipe("llm-qat", "smollm2-135m", "8-8-8") is None
    assert fitting_recipe("llm-qat", "smollm2-135m", "4-8-4") == named_recipe("smollm2-135m-4-8-4-llm-qat")
    assert fitting_recipe("generate", "smollm2-135m", "2") is None


# ---- names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_has_the_name_that_finds_it(name: str) -> None:
    assert named_recipe(name) == find_recipe(name)
    assert name == named_recipe(name).name  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "bits", "group_size"),
    [
        ("llava-1.5-w2g64-block-ap", 2, 64),
        ("llava-1.5-w2g128-block-ap", 2, 128),
        ("llava-1.5-w4growe2e-qp", None, None),
        ("llava-1.5-w4grow-e2e-qp", 4, -1),
        ("llava-next-w3-e2e-qp", 3, 128),
        ("llama-2-block-ap", 2, 64),
        ("smollm2-135m-w3g32-long-e2e-qp", 3, 32),
        ("llava-1.5-w8g64-block-ap", None, None),
        ("llava-1.5-w2g48-block-ap", None, None),
        ("llava-1.5-w2g64-rtn", None, None),
        ("llava-1.5-4-8-4-block-ap", None, None),
        ("smollm2-135m-4-8-8-llm-qat", None, None),
    ],
)
def test_a_name_has_bits_and_group_size(name: str, bits: int | None, group_size: int | None) -> None:
    found = named_recipe(name)
    quant = {} if found is None else found.settings["quant"]
    assert (quant.get("bits"), quant.get("group_size")) == (bits, group_size)


@pytest.mark.parametrize("name", ["smollm2-135m-w2g64sym-block-ap", "llama-2-w4g64sym-e2e-qp"])
def test_a_name_has_a_grid(name: str) -> None:
    found, other = named_recipe(name), named_recipe(name.replace("sym", ""))
    assert found is not None
    assert other is not None
    assert found.name == name
    assert found.settings["quant"] == other.settings["quant"] | {"symmetric": True}
    assert {**found.settings, "quant": None} == {**other.settings, "quant": None}


def test_bits_choose_the_values() -> None:
    def rates(stage: str, *values: str) -> list[Any]:
        settings = [families()["smollm2-135m"].settings(stage, bits) for bits in ("2", "3", "4")]
        return [[each[values[0]] if len(values) == 1 else each[values[0]][values[1]] for each in settings]]

    assert rates("block-ap", "fit", "lr_weight") == [[2e-3, 1e-3, 4e-4]]
    assert rates("block-ap", "start", "init") == [["gptq", "refined", "refined"]]
    assert rates("long-e2e-qp", "max_steps") == [[600, 500, 400]]
    assert rates("long-e2e-qp", "data", "count") == [[2400, 2000, 1600]]
    assert rates("long-e2e-qp", "loss") == [["kl"] * 3]


def test_no_recipe_but_those_of_demos_names_a_model() -> None:
    for name in recipe_names():
        found = named_recipe(name)
        assert found is not None
        assert ("model" in found.settings) == name.endswith("-demo-vlm")
        assert found.settings.get("recipe_for", [found.family]) == [found.family]


def test_the_commands_of_a_demo_are_tuned_for_its_model() -> None:
    demo, table = job_of("demo"), job_of("llm-qat-table")
    for job in (demo.block_ap, demo.e2e_qp, demo.e2e_qp_only, table.train):
        assert (job.model, job.recipe_for) == ("smollm2-135m", ("smollm2-135m",))


def test_a_file_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own.yaml"
    own.touch()
    assert find_recipe(str(own)) == own
    monkeypatch.chdir(tmp_path)
    Path("llama-2-block-ap").touch()
    assert find_recipe("llama-2-block-ap") == Path("llama-2-block-ap")
    assert isinstance(find_recipe("llama-2-w2-block-ap"), Recipe)


def test_an_unknown_recipe_is_answered_with_near_ones() -> None:
    with pytest.raises(ConfigError) as raised:
        find_recipe("llava-1.5-w2g64-blok-ap")
    assert_four_lines(raised.value)
    assert raised.value.do == "did you mean llava-1.5-w2g64-block-ap?"
    with pytest.raises(ConfigError) as raised:
        find_recipe("zzz")
    assert all(name in raised.value.allowed for name in recipe_names())


# ---- above and beneath ------------------------------------------------------------------------------


def test_a_file_of_ones_own_lies_above_the_recipe_and_beneath_flags(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("fit: {epochs: 7, batch_size: 3}\n", encoding="utf-8")
    for words in (["--config", str(own), "--fit.batch_size", "5"], ["--fit.batch_size", "5", "--config", str(own)]):
        job = job_of("block-ap", "llava-1.5-7b", *words)
        assert (job.fit.epochs, job.fit.batch_size, job.stream_dtype) == (7, 5, "bfloat16")


def test_a_named_recipe_keeps_the_model(tmp_path: Path) -> None:
    folder = save_config(tmp_path / "mine", "mistral-7b")
    for words in (["--config", "llava-1.5-w3g64-block-ap", str(folder)],):
        with pytest.raises(ConfigError):
            job_of("block-ap", *words)  # a first word is the model, a later one is nothing
    job = job_of("block-ap", "--config", "llava-1.5-w3g64-block-ap", "--model", str(folder))
    assert (job.model, job.quant.bits, job.fit.lr_weight) == (str(folder), 3, 1e-5)


def test_without_a_model_a_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--config", "llava-1.5-w3g64-block-ap"], ["--quant.bits", "3"]):
        assert main(["block-ap", *words]) == 2
        said = capsys.readouterr()
        assert "no model" in said.err
        assert "eqat block-ap --model" in said.err


# ---- eqat recipes -----------------------------------------------------------------------------------


def test_recipes_are_listed_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in recipe_names())
    assert "llava-1.5  (llava: 7b, 13b)" in said
    assert main(["recipes", "llava-1.5-w2g32-block-ap"]) == 0
    by_name = capsys.readouterr().out
    assert by_name.startswith("# llava-1.5-w2g32-block-ap\n")
    assert "group_size: 32" in by_name
    folder = save_config(tmp_path, "llava-1.5-7b")
    assert main(["recipes", str(folder), "--bits", "4"]) == 0
    printed = capsys.readouterr().out
    assert "# llava-1.5-w4g64-block-ap\n" in printed
    assert "# llava-1.5-w4g64-e2e-qp\n" in printed
    assert "w3" not in printed


@pytest.mark.parametrize(
    ("words", "do"),
    [
        (["llava-1.5-w2g64-blok-ap"], "did you mean llava-1.5-w2g64-block-ap?"),
        (["mistral-7b"], "train with the paper's settings"),
        (["llava-1.5-7b", "--bits", "8"], "eqat recipes llava-1.5-7b"),
    ],
)
def test_recipes_that_are_not_there(capsys: pytest.CaptureFixture[str], words: list[str], do: str) -> None:
    assert main(["recipes", *words]) == 2
    assert do in capsys.readouterr().err


# ---- the warning ------------------------------------------------------------------------------------


def test_no_warning_where_the_settings_are_for_the_model(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_without_recipe("llama-2-7b", ("llama-2",), "block-ap")
        warn_without_recipe(str(save_config(tmp_path, "llava-1.5-13b")), ("llava-1.5",), "block-ap")
        warn_without_recipe("my-model", ("my-model",), "block-ap")


def test_the_papers_settings_on_another_model_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="the paper's, tuned for Llama-2 7B and up, not for my-model; watch the loss"):
        warn_without_recipe("my-model", (), "block-ap")


def test_settings_of_one_family_on_another_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="tuned for llama-2, not for my-model"):
        warn_without_recipe("my-model", ("llama-2",), "e2e-qp")


@pytest.mark.parametrize("command", ["block-ap", "e2e-qp"])
def test_the_warning_names_a_fitting_recipe(command: str) -> None:
    with pytest.warns(UserWarning, match=f"use --config smollm2-135m-w2g64-{command}"):
        warn_without_recipe("smollm2-135m", (), command)
