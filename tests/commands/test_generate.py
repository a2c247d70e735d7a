"""`eqat generate` with images."""

from __future__ import annotations

import base64
import io
import math
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from eqat_mm.cli import parse_job, run_command
from eqat_mm.commands.plumbing.models import load_model
from eqat_mm.commands.verbs import generate as generate_module
from eqat_mm.commands.verbs.generate import ANSWER, CONTINUATION, GenerateJob, generate
from eqat_mm.commands.verbs.quantize import RTNJob, rtn
from eqat_mm.errors import ConfigError, DataError
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.files import read_json, write_json
from tests.checkpoint.files import assert_four_lines
from tests.tiny_llava import save_tiny_llava
from tests.tiny_model import Tiny, tiny_llama


@pytest.fixture(scope="module", params=["llava", "llava_next"])
def full(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny vision-language model in full precision."""
    folder = tmp_path_factory.mktemp("full") / request.param
    save_tiny_llava(folder, request.param, dtype=torch.float32)
    return folder


@pytest.fixture(scope="module")
def packed(full: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, packed."""
    return rtn(RTNJob(model=str(full), output=tmp_path_factory.mktemp("packed"), quant=QuantSpec(4, 32)))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A red and a blue image."""
    folder = tmp_path_factory.mktemp("photos")
    paths = [folder / "red.png", folder / "blue.png"]
    for path in paths:
        Image.new("RGB", (16, 16), path.stem).save(path)
    return paths


def job_of(model: Path, *images: Path, **options: object) -> GenerateJob:
    settings = {"prompt": "w5 w17", "image": [*map(str, images)], "max_new_tokens": 6, "device": "cpu"}
    return GenerateJob(str(model), **(settings | options))  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1, 2])
def test_it_writes_what_the_model_says_of_the_images(
    packed: Path, photos: list[Path], capsys: pytest.CaptureFixture[str], count: int
) -> None:
    text = generate(job_of(packed, *photos[:count]))
    assert text.strip() in capsys.readouterr().out
    processor = transformers.AutoProcessor.from_pretrained(packed)
    images = [Image.open(path) for path in photos[:count]]
    inputs = processor(text=["USER: " + "<image> " * count + "w5 w17 ASSISTANT: "], images=images, return_tensors="pt")
    model = load_model(packed, torch.device("cpu"))
    written = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)  # type: ignore[operator]
    assert text == processor.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_image_matters(packed: Path, photos: list[Path]) -> None:
    def score(path: Path) -> torch.Tensor:
        processor = transformers.AutoProcessor.from_pretrained(packed)
        inputs = processor(text=["<image> w5"], images=[Image.open(path)], return_tensors="pt")
        with torch.no_grad():
            logits: torch.Tensor = load_model(packed, torch.device("cpu"))(**inputs).logits[0, -1]
        return logits

    red, blue = map(score, photos)
    assert math.isfinite(red.sum())
    assert not torch.equal(red, blue)


def test_in_bfloat16(full: Path, packed: Path, photos: list[Path]) -> None:
    """Pixels come as float32, and the model takes them."""
    assert isinstance(generate(job_of(packed, *photos, dtype="bfloat16")), str)
    assert isinstance(generate(job_of(full, photos[0], dtype="bfloat16")), str)


def test_full_precision_and_words_alone(full: Path, photos: list[Path]) -> None:
    assert isinstance(generate(job_of(full, photos[0])), str)
    assert isinstance(generate(job_of(full, chat=True)), str)
    assert isinstance(generate(job_of(full)), str)


def test_a_text_only_model_refuses_images(tiny: Tiny, photos: list[Path]) -> None:
    with pytest.raises(ConfigError, match="reads text only") as raised:
        generate(job_of(tiny.folder, photos[0]))
    assert_four_lines(raised.value)


@pytest.mark.parametrize("kind", ["missing", "unreadable"])
def test_an_image_that_cannot_be_read_is_refused(packed: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "photo.png"
    if kind == "unreadable":
        path.write_bytes(b"not an image")
    with pytest.raises(DataError, match=kind) as raised:
        generate(job_of(packed, path))
    assert_four_lines(raised.value)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--image", "a.png"], "a.png"),
        (["--image", "[a.png, b.png]"], ["a.png", "b.png"]),
        (["--image", "a.png", "--image", "b.png"], ["a.png", "b.png"]),
        (["--image=a.png", "--image=b=.png", "--image", "c d.png"], ["a.png", "b=.png", "c d.png"]),
        (["--image", "[a.png, b.png]", "--image", "c.png"], ["a.png", "b.png", "c.png"]),
        (["--image", "a.png", "b.png", "--seed", "3"], ["a.png", "b.png"]),
        (["--image=a.png", "b.png", "--chat", "--image", "c.png", "d.png"], ["a.png", "b.png", "c.png", "d.png"]),
        (["--image", "https://here/a.png"], "https://here/a.png"),
        ([], []),
    ],
    ids=lambda words: " ".join(words) or "none",
)
def test_images_on_the_command_line(words: list[str], expected: list[str] | str) -> None:
    job: GenerateJob = parse_job("generate", ["--model", "llava-1.5-7b", *words])
    assert job.image == expected


def test_images_given_one_by_one_are_all_seen(
    full: Path, photos: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", str(full), "--prompt", "w5 <image> w17 <image>", "--max_new_tokens", "6", "--device", "cpu"]
    assert run_command("generate", [*flags, "--image", str(photos[0]), "--image", str(photos[1])]) == 0
    written = capsys.readouterr().out.splitlines()[0]
    assert written.strip() == generate(job_of(full, *photos, prompt="w5 <image> w17 <image>")).strip()
    assert run_command("generate", [*flags, "--image", str(photos[1])]) == 2


@pytest.mark.parametrize(
    "image",
    [
        "https://here/a.png",
        "http://here/a.png",
        "HTTPS://HERE/a.png",
        "file:///a",
    ],
)
def test_addresses_are_refused(full: Path, image: str) -> None:
    with pytest.raises(DataError, match="path of a file") as raised:
        generate(GenerateJob(str(full), image=image, device="cpu"))
    assert_four_lines(raised.value)
    assert raised.value.given.startswith(image[:40])


def test_an_image_in_base64_is_the_image(full: Path, photos: list[Path]) -> None:
    data = f"data:image/png;base64,{base64.b64encode(photos[0].read_bytes()).decode()}"
    assert generate(job_of(full, photos[0])) == generate(GenerateJob(**(vars(job_of(full)) | {"image": [data]})))


def test_the_system_speaks_first(full: Path, photos: list[Path]) -> None:
    processor = transformers.AutoProcessor.from_pretrained(full)
    inputs = processor(
        text=["ASSISTANT: w40 USER: <image> w5 w17 ASSISTANT: "], images=[Image.open(photos[0])], return_tensors="pt"
    )
    model = load_model(full, torch.device("cpu"))
    written = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)  # type: ignore[operator]
    expected = processor.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert generate(job_of(full, photos[0], system="w40")) == expected  # this template calls the system so


@pytest.mark.parametrize(
    ("options", "most"),
    [({"chat": True}, ANSWER), ({}, CONTINUATION), ({"chat": True, "max_new_tokens": 3}, 3)],
    ids=str,
)
def test_an_answer_may_be_longer_than_a_continuation(
    full: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object], most: int
) -> None:
    seen: list[int] = []

    def watched(
        model: object, inputs: dict[str, torch.Tensor], settings: transformers.GenerationConfig, *_: object
    ) -> object:
        seen.append(settings.max_new_tokens)
        return inputs["input_ids"]

    monkeypatch.setattr("eqat_eval.generation.generated", watched)
    generate(GenerateJob(str(full), "w5", device="cpu", cuda_graph=False, **options))  # type: ignore[arg-type]
    assert seen == [most]


@pytest.mark.parametrize("prompt", ["<image>\nw5 w17", "<image> w5 w17"])
def test_an_image_in_the_prompt_is_the_image(full: Path, photos: list[Path], prompt: str) -> None:
    placed = generate(job_of(full, photos[0], prompt=prompt))
    assert placed == generate(job_of(full, photos[0]))


def test_an_image_stays_where_the_prompt_has_it(full: Path, photos: list[Path]) -> None:
    processor = transformers.AutoProcessor.from_pretrained(full)
    text = ["USER: w5 <image> w17 ASSISTANT: "]
    inputs = processor(text=text, images=[Image.open(photos[0])], return_tensors="pt")
    model = load_model(full, torch.device("cpu"))
    written = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)  # type: ignore[operator]
    expected = processor.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert generate(job_of(full, photos[0], prompt="w5 <image> w17")) == expected


@pytest.mark.parametrize(("prompt", "count"), [("<image> and <image>", 1), ("<image>", 2), ("<image>", 0)])
def test_more_or_fewer_places_than_images_are_refused(
    full: Path, photos: list[Path], monkeypatch: pytest.MonkeyPatch, prompt: str, count: int
) -> None:
    monkeypatch.setattr(generate_module, "load_model", None)  # it is not read
    with pytest.raises(DataError, match=f"for {count} images") as raised:
        generate(job_of(full, *photos[:count], prompt=prompt))
    assert_four_lines(raised.value)


@pytest.fixture
def copied(full: Path, tmp_path: Path) -> Path:
    """A copy of the model that a test may change."""
    return Path(shutil.copytree(full, tmp_path / full.name))


def test_a_processor_from_before_there_was_a_config(full: Path, copied: Path, photos: list[Path]) -> None:
    stored = read_json(copied / "processor_config.json")
    write_json(copied / "preprocessor_config.json", stored["image_processor"] | {"processor_class": _class_of(full)})
    (copied / "processor_config.json").unlink()
    assert generate(job_of(copied, photos[0])) == generate(job_of(full, photos[0]))


def _class_of(folder: Path) -> str:
    return type(transformers.AutoProcessor.from_pretrained(folder)).__name__


@pytest.mark.parametrize(
    "change",
    [{"patch_size": 4}, {"vision_feature_select_strategy": "full"}, {"num_additional_image_tokens": 4}],
    ids=str,
)
def test_a_processor_of_another_model_is_refused(
    copied: Path, photos: list[Path], monkeypatch: pytest.MonkeyPatch, change: dict[str, object]
) -> None:
    write_json(copied / "processor_config.json", read_json(copied / "processor_config.json") | change)
    monkeypatch.setattr(generate_module, "load_model", None)  # it is not read
    with pytest.raises(ConfigError, match="processor and model") as raised:
        generate(job_of(copied, photos[0]))
    assert_four_lines(raised.value)


@pytest.mark.parametrize("template", ["{% for %}", "{{ 1 / 0 }}", "{% include 'x' %}", "{{ ''.__class__.__mro__ }}"])
def test_a_template_that_fails_is_four_lines(copied: Path, capsys: pytest.CaptureFixture[str], template: str) -> None:
    (copied / "chat_template.jinja").write_text(template, encoding="utf-8")
    assert run_command("generate", ["--model", str(copied), "--chat", "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert "chat template" in said
    assert "Traceback" not in said


LEAKS: list[dict[str, object]] = [
    {"stop_strings": ["w9"]},
    {"cache_implementation": "static"},
    {"suppress_tokens": list(range(2, 90))},
    {"bad_words_ids": [[token] for token in range(2, 90)]},
    {"guidance_scale": 1.5},
    {"temperature": 0.9, "top_p": 0.6, "max_length": 4},
]


@pytest.mark.parametrize("leak", LEAKS, ids=lambda leak: "+".join(leak))
def test_settings_of_the_checkpoint_change_nothing(full: Path, copied: Path, leak: dict[str, object]) -> None:
    write_json(copied / "generation_config.json", read_json(copied / "generation_config.json") | leak)
    assert generate(job_of(copied)) == generate(job_of(full))


def test_a_terminal_that_lacks_a_character_shows_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every word of this model is one that Windows' code page does not have."""
    model = tiny_llama()
    model.save_pretrained(tmp_path / "model")
    backend = Tokenizer(WordLevel({chr(0x65E5 + token): token for token in range(97)}, unk_token="日"))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="日").save_pretrained(tmp_path / "model")
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="cp1252"))
    flags = ["--model", str(tmp_path / "model"), "--prompt", "旧", "--max_new_tokens", "4", "--device", "cpu"]
    assert run_command("generate", flags) == 0
    assert written.getvalue().startswith(b"?")


@pytest.mark.parametrize(("word", "expected"), [("true", True), ("false", False), ("auto", "auto")])
def test_a_graph_on_the_command_line(word: str, expected: object) -> None:
    job: GenerateJob = parse_job("generate", ["m", "--cuda_graph", word])
    assert job.cuda_graph == expected
    assert GenerateJob("m").cuda_graph == "auto"
