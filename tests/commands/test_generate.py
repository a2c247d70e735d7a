"""`eqat generate` with images."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image

from eqat_mm.cli import parse_job
from eqat_mm.commands.generate import GenerateJob, generate
from eqat_mm.commands.models import load_model
from eqat_mm.commands.quantize import RTNJob, rtn
from eqat_mm.errors import ConfigError, DataError
from eqat_mm.quant.spec import QuantSpec
from tests.checkpoint.files import assert_four_lines
from tests.tiny_llava import save_tiny_llava
from tests.tiny_model import Tiny


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
    settings = {"prompt": "w5 w17", "image": images, "max_new_tokens": 6, "device": "cpu"}
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
        (["--image", "a.png"], Path("a.png")),
        (["--image", "[a.png, b.png]"], (Path("a.png"), Path("b.png"))),
    ],
    ids=["one", "list"],
)
def test_images_on_the_command_line(words: list[str], expected: tuple[Path, ...] | Path) -> None:
    job: GenerateJob = parse_job("generate", GenerateJob, ["--model", "llava-1.5-7b", *words])
    assert job.image == expected


@pytest.mark.parametrize(("word", "expected"), [("true", True), ("false", False), ("auto", "auto")])
def test_a_graph_on_the_command_line(word: str, expected: object) -> None:
    job: GenerateJob = parse_job("generate", GenerateJob, ["--cuda_graph", word])
    assert job.cuda_graph == expected
    assert GenerateJob().cuda_graph == "auto"
