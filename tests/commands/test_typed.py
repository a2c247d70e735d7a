"""Words of a command line: dashes, names of other scripts, and what stands for what."""

from __future__ import annotations

from typing import Any

import pytest

from eqat_mm.cli import main, parse_job
from eqat_mm.commands.line.commands import COMMANDS
from eqat_mm.commands.line.elsewhere import ALIASES, ANSWERS, SAME_ANYWAY
from eqat_mm.commands.line.outline import options_of
from eqat_mm.errors import ConfigError
from tests.checkpoint.files import assert_four_lines


def job_of(command: str, *argv: str) -> Any:
    return parse_job(command, argv)


def test_dashes_and_underscores_are_one() -> None:
    one = job_of("block-ap", "m", "--quant.group-size", "32", "--batch-tokens=64", "--overwrite")
    assert one == job_of("block-ap", "m", "--quant.group_size", "32", "--batch_tokens=64", "--overwrite")
    assert job_of("e2e-qp", "m", "--train-projector") == job_of("e2e-qp", "m", "--train_projector")
    assert main(["block_ap", "--no-such"]) == main(["block-ap", "--no-such"]) == 2


def test_what_llava_users_type_means_the_same_here() -> None:
    theirs = (
        "--model_name_or_path llava-1.5-7b --data_path mix.json --image_folder images --bf16 True --output_dir out "
        "--num_train_epochs 2 --per_device_train_batch_size 3 --gradient_accumulation_steps 5 --model_max_length 512 "
        "--learning_rate 1e-4 --save_steps 7 --deepspeed zero3.json --gradient_checkpointing True "
        "--lazy_preprocess True --resume --max_grad_norm 0.5 --mm_projector_lr 2e-5 --logging_steps 1"
    )
    ours = (
        "--model llava-1.5-7b --conversations.source mix.json --conversations.image_folder images --precision bfloat16 "
        "--output out --epochs 2 --batch_size 3 --accumulation 5 --conversations.max_length 512 --learning_rate 1e-4 "
        "--save_steps 7 --deepspeed zero3.json --gradient_checkpointing true --clip_norm 0.5 --lr_projector 2e-5 "
        "--logging_steps 1"
    )
    assert job_of("e2e-qp", *theirs.split()) == job_of("e2e-qp", *ours.split())


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--bf16"], "precision", "bfloat16"),
        (["--bf16=False"], "precision", "float32"),
        (["--bf16", "--epochs", "2"], "precision", "bfloat16"),
        (["--lora_enable", "True"], "trains", "lora"),
        (["--tune-mm-mlp-adapter", "True"], "trains", "projector"),
        (["--train-projector"], "trains", "scales+projector"),
        (["--train_projector=false"], "trains", "scales"),
        (["--lr=0.5"], "learning_rate", 0.5),
        (["--resume_from_checkpoint", "True"], "trains", "scales"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_a_name_of_elsewhere_has_its_value_here(words: list[str], name: str, value: Any) -> None:
    assert getattr(job_of("e2e-qp", "m", *words), name) == value


@pytest.mark.parametrize("name", sorted(ANSWERS))
def test_what_has_no_like_is_answered(name: str) -> None:
    with pytest.raises(ConfigError) as raised:
        job_of("e2e-qp", "m", f"--{name}", "no")
    assert_four_lines(raised.value)
    assert raised.value.do == ANSWERS[name]


@pytest.mark.parametrize("command", ["block-ap", "e2e-qp", "rtn", "plan"])
def test_bits_are_those_of_the_weights(command: str) -> None:
    job = job_of(command, "m", "--bits", "3", "--group-size", "128")
    assert (job.quant.bits, job.quant.group_size) == (3, 128)


def test_every_name_of_elsewhere_stands_for_an_option_of_some_command() -> None:
    options = {option.name for command in COMMANDS.values() for option in options_of(command.load()[0])}
    assert {ours for alias in ALIASES.values() for ours in alias.options} <= options
    assert {*ALIASES, *ANSWERS} & options == {"bits", "group_size"}, "what only some commands call so"
    assert not set(ALIASES) & set(SAME_ANYWAY)


def test_a_flag_of_elsewhere_takes_true_or_false() -> None:
    with pytest.raises(ConfigError) as raised:
        job_of("e2e-qp", "m", "--bf16", "perhaps")
    assert_four_lines(raised.value)
    assert "--precision" in raised.value.do
    assert raised.value.allowed == "true, false"


def test_a_name_of_elsewhere_that_a_command_has_not_is_unknown() -> None:
    with pytest.raises(ConfigError, match="unknown option --data_path"):
        job_of("rtn", "m", "--data_path", "x")
