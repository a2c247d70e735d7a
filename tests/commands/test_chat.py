"""`eqat chat`: a conversation through a pipe, with images, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from eqat_eval.dialogue import Dialogue
from eqat_mm.checkpoint.folders import load_processor, load_tokenizer
from eqat_mm.cli import parse_job, run_command
from eqat_mm.commands.plumbing.models import load_model
from eqat_mm.commands.verbs.chat import ChatJob, talk
from eqat_mm.commands.verbs.quantize import RTNJob, rtn
from eqat_mm.errors import ConfigError, DataError
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.signals import Stopped
from tests.checkpoint.files import assert_four_lines
from tests.tiny_llava import save_tiny_llava
from tests.tiny_model import Tiny

MOST = 5
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA, and two photos beside it."""
    folder = tmp_path_factory.mktemp("chat")
    save_tiny_llava(folder / "full", dtype=torch.float32, max_position_embeddings=60)
    for name in ("red", "blue"):
        Image.new("RGB", (30, 16), name).save(folder / f"{name}.png")
    return folder / "full"


@pytest.fixture(scope="module")
def packed(full: Path) -> Path:
    return rtn(RTNJob(model=str(full), output=full.parent / "rtn", quant=QuantSpec(4, 32)))


def dialogue(folder: Path, **options: Any) -> Dialogue:
    return Dialogue(load_model(folder, torch.device("cpu")), load_processor(folder), MOST, **options)


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "eqat_mm.cli", "chat", *words, "--device", "cpu", "--max_new_tokens", str(MOST)]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "eval")))}


def test_a_conversation_through_a_pipe(full: Path, packed: Path) -> None:
    red, blue = (full.parent / f"{name}.png" for name in ("red", "blue"))
    lines = [f"/image {red}", "w5 w6", "/image /nowhere.png", "w7", "/image", "/dance", f"/image {blue}"]
    lines += [f"/image {red}", "<image> w8 <image>", "<image> w9", "", "/reset", "w5 w6", "/quit", "w99"]
    done = subprocess.run(
        command(str(full), "--quantized", str(packed)),
        input="\n".join(lines),
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    heard = dialogue(packed)
    red_image, blue_image = (Image.open(path).convert("RGB") for path in (red, blue))
    heard.show(red_image)
    expected = [heard.ask("w5 w6").text, heard.ask("w7").text]
    heard.show(blue_image)
    heard.show(red_image)
    expected.append(heard.ask("<image> w8 <image>").text)
    heard.reset()
    expected.append(heard.ask("w5 w6").text)
    said = [line for line in done.stdout.splitlines()[1:] if line.strip() and not line.startswith("[")]
    assert said == [text.rstrip() for text in expected] or said == expected
    assert len(set(expected)) > 1
    for given in ("/nowhere.png is missing", "no image", "/dance", "1 <image> in the text for 0 images"):
        assert done.stderr.count(given) == 1
    assert done.stderr.count("where: ") == 4
    assert "Traceback" not in done.stderr


def test_a_line_that_is_no_text_is_refused_by_itself(packed: Path) -> None:
    with subprocess.Popen(
        command("--model", str(packed)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    ) as process:
        out, err = process.communicate(b"caf\xe9\n/image caf\xe9.png\n\xff\xfe\nw5\n", timeout=120)
    assert process.returncode == 0
    assert (err.count(b"where: "), err.count(b"not Unicode"), err.count(b"is missing")) == (3, 2, 1)
    assert b"Traceback" not in err
    assert len([line for line in out.splitlines() if line.strip()]) == 2


def test_without_an_input_there_is_nothing_to_say(packed: Path) -> None:
    words = ["bash", "-c", 'exec "$@" <&-', "-", *command("--model", str(packed))]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment(), check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)


def test_an_answer_comes_before_the_next_question(packed: Path) -> None:
    with subprocess.Popen(
        command("--model", str(packed)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert "/image PATH" in process.stdout.readline()
        for _ in range(2):
            process.stdin.write("w5\n")
            process.stdin.flush()
            assert process.stdout.readline().strip()
        process.stdin.close()
        assert process.wait(timeout=60) == 0


def lines(*words: str) -> Iterator[str]:
    return (f"{word}\n" for word in words)


def test_what_went_before_is_read_again(packed: Path) -> None:
    first, other = dialogue(packed), dialogue(packed)
    for text in ("w5", "w6"):
        first.ask(text)
    other.ask("w6")
    assert first.ask("w7").text != other.ask("w7").text
    for each in (first, other):
        each.reset()
    assert first.ask("w7").text == other.ask("w7").text


def test_a_message_that_fails_is_forgotten(packed: Path) -> None:
    first, other = dialogue(packed), dialogue(packed)
    for each in (first, other):
        each.show(Image.open(packed.parents[1] / "red.png").convert("RGB"))
    with pytest.raises(DataError) as raised:
        first.ask("<image> <image> w5")
    assert_four_lines(raised.value)
    assert first.ask("w5").text == other.ask("w5").text


def test_a_conversation_longer_than_the_model_reads_is_refused(packed: Path) -> None:
    long = dialogue(packed)
    long.ask("w5")
    with pytest.raises(DataError, match="fewer than 60") as raised:
        long.ask("w6 " * 60)
    assert_four_lines(raised.value)
    long.ask("w7")


class Interrupted:
    """A dialogue in which somebody stops the first answer."""

    def __init__(self, stop: BaseException) -> None:
        self.asked: list[str] = []
        self._stop = stop

    def ask(self, text: str, *, stream: bool) -> None:
        self.asked.append(text)
        if len(self.asked) == 1:
            raise self._stop


def test_an_answer_can_be_stopped(capsys: pytest.CaptureFixture[str]) -> None:
    stopped: Any = Interrupted(KeyboardInterrupt())
    talk(stopped, lines("w5", " /w6", "/quit", "w7"), sees=True, allow_network=False)
    assert stopped.asked == ["w5", "/w6"]
    assert "stopped" in capsys.readouterr().out


def test_a_signal_that_asks_to_end_ends_the_chat() -> None:
    with pytest.raises(Stopped):
        talk(Interrupted(Stopped(15)), lines("w5", "w6"), sees=True, allow_network=False)  # type: ignore[arg-type]


def test_a_language_model_talks_and_sees_nothing(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_tokenizer(tiny.folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ' ' + m.content + ' ' }}{% endfor %}"
    heard = Dialogue(load_model(tiny.folder, torch.device("cpu")), tokenizer, MOST)
    talk(heard, lines("w5", "/image a.png", "w6"), sees=False, allow_network=False)
    caught = capsys.readouterr()
    assert len([line for line in caught.out.splitlines() if line.strip()]) == 2
    assert "reads text only" in caught.err


def test_the_system_speaks_first(packed: Path) -> None:
    assert dialogue(packed, system="w40 w41").ask("w5").text != dialogue(packed).ask("w5").text


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no') }}"], ids=["none", "refuses"])
def test_a_model_that_cannot_chat_is_refused_before_it_is_read(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, template: str | None
) -> None:
    from eqat_mm.commands.verbs import chat as module

    tokenizer = load_tokenizer(tiny.folder)
    tokenizer.chat_template = template
    monkeypatch.setattr(module, "load_tokenizer", lambda _: tokenizer)
    monkeypatch.setattr(module, "load_model", None)
    with pytest.raises(ConfigError, match="chat template") as raised:
        module.chat(ChatJob(str(tiny.folder), device="cpu"))
    assert_four_lines(raised.value)


def test_the_words_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    job: ChatJob = parse_job("chat", ["llava-1.5-7b", "--template", "vicuna_v1", "--images", "crop"])
    assert (job.model, job.template, job.images) == ("llava-1.5-7b", "vicuna_v1", "crop")
    assert run_command("chat", ["llava-1.5-7b", "--template", "vicuna"]) == 2
    assert "--template" in capsys.readouterr().err
