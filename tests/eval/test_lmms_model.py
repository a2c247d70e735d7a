"""The model `eqat` of lmms-eval: against a direct computation, against itself, and against lmms-eval's own LLaVA."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing

from eqat_demo.easy_vqa_task import FILE_VARIABLE
from eqat_mm.checkpoint.read import load
from eqat_mm.commands.plumbing.lmms import tasks_folders
from eqat_mm.commands.verbs.quantize import RTNJob, rtn
from eqat_mm.errors import CheckpointError, ConfigError, DataError
from eqat_mm.runtime.files import read_json, write_json
from llava_adapters import paligemma
from llava_adapters.tiny import IMAGE_TOKEN, VOCABULARY
from tests.checkpoint.files import assert_four_lines
from tests.commands.jobs import SPEC
from tests.eval.questions import COUNT, images, write_questions
from tests.tiny_llava import save_tiny_llava
from tests.tiny_model import save_tiny, word_tokenizer
from tests.tolerances import assert_close

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="needs lmms-eval"),
    pytest.mark.filterwarnings("ignore"),  # lmms-eval 0.7.3 and what it imports warn of much; 2026-11-23
]

QUESTIONS = ["w5", "w6 w7 w8", "w9 w10", "w11 w12 w13 w14 w15"]
ABOUT = (0, 1, None, 3)
"""Which image each question is about."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny-llava"
    save_tiny_llava(path, dtype=torch.float32)
    return path


def model_of(folder: Path, **options: Any) -> Any:
    from eqat_eval.lmms_model import EqatVLM

    return EqatVLM(str(folder), **({"device": "cpu"} | options))


def requests_of(model: Any, kind: str, second: Any, about: Sequence[int | None] = ABOUT) -> list[Any]:
    """One request about each of these images; None is none."""
    from lmms_eval.api.instance import Instance

    def to_images(index: int) -> list[Any]:
        image = about[index]
        return [] if image is None else [images()[image]]

    model.task_dict = {"tiny": {"test": list(range(len(about)))}}
    texts = [QUESTIONS[index % len(QUESTIONS)] for index in range(len(about))]
    return [
        Instance(
            kind,
            (text, *_ordered(kind, second, to_images), index, "tiny", "test"),
            0,
            {"task": "tiny", "doc_id": index, "repeats": 1},
        )
        for index, text in enumerate(texts)
    ]


def images_of(index: int) -> list[Any]:
    return [] if index == 2 else [images()[index]]


def _ordered(kind: str, second: Any, to_images: Any) -> tuple[Any, Any]:
    return (dict(second), to_images) if kind == "generate_until" else (second, to_images)


def answers(folder: Path, batch_size: int, **options: Any) -> list[str]:
    model = model_of(folder, batch_size=batch_size)
    return list(model.generate_until(requests_of(model, "generate_until", {"max_new_tokens": 6} | options)))


def test_answers_do_not_depend_on_the_batch(folder: Path) -> None:
    one_by_one = answers(folder, 1)
    assert len(set(one_by_one)) > 1
    assert answers(folder, 3) == answers(folder, 4) == one_by_one


@pytest.mark.parametrize("about", [[0, 1, 0, 1, 0, 0], [3, 3, 3], [0, 1, None, 0, 1, None]], ids=str)
def test_images_are_read_once_for_all_questions_about_them(folder: Path, about: list[int | None]) -> None:
    model, options = model_of(folder, batch_size=6), {"max_new_tokens": 6}
    seen: list[int] = []
    model.model.model.vision_tower.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    answers, losses = {}, {}
    for shares in (True, False):
        model.shares_images, before = shares, sum(seen)
        answers[shares] = model.generate_until(requests_of(model, "generate_until", options, about))
        losses[shares] = model.loglikelihood(requests_of(model, "loglikelihood", "w7 w8", about))
        pictures = [image for image in about if image is not None]
        shared = shares and None not in about
        assert sum(seen) - before == 2 * len(set(pictures) if shared else pictures)
    assert answers[True] == answers[False]
    assert [greedy for _, greedy in losses[True]] == [greedy for _, greedy in losses[False]]
    assert_close(*(torch.tensor([loss for loss, _ in losses[shares]]) for shares in (True, False)), "model")


def test_an_answer_right_behind_an_image_is_predicted_by_it(folder: Path) -> None:
    model = model_of(folder)
    samples = [("USER: w5 <image>", images()[:1])] * 2
    shared = [predicted for predicted, _ in model.predictions(samples, ["w7 w8"] * 2)]
    model.shares_images = False
    for found, (expected, _) in zip(shared, model.predictions(samples, ["w7 w8"] * 2), strict=True):
        assert_close(found, expected, "model")


def test_questions_about_the_same_images_are_in_one_batch() -> None:
    from eqat_eval.shared_images import batches

    lengths, images = [5, 9, 3, 4, 9, 1], ["a", "b", "b", "a", "c", "c"]
    assert list(batches(lengths, [""] * 6, images, 2)) == [[1, 2], [4, 5], [0, 3]]
    assert list(batches(lengths, ["x", "y", "x", "x", "y", "x"], images, 8)) == [[2, 5, 0, 3], [1, 4]]


def test_images_are_told_apart_by_what_they_show() -> None:
    from eqat_eval.shared_images import digest

    first, second = images()[:2]
    assert digest([first]) == digest([first.copy()]) != digest([second])
    assert digest([first, second]) != digest([second, first])
    assert digest([]) == digest([]) != digest([first.resize((8, 32))])
    assert digest(["a.mp4"]) != digest(["a.mp4"])


@pytest.mark.parametrize(
    ("asked", "dtype"), [("auto", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)]
)
def test_the_dtype_is_that_of_model_and_pixels(folder: Path, asked: str, dtype: torch.dtype) -> None:
    model = model_of(folder, dtype=asked)
    assert model.model.lm_head.weight.dtype is dtype
    assert (
        model._batch([model.renderer.inputs(model.prompt("w5", 1), images()[:1])], "left")["pixel_values"].dtype
        is dtype
    )


def test_the_image_is_seen(folder: Path) -> None:
    model = model_of(folder)
    prompt = model.prompt("w5", 1)
    black, white = (Image.new("RGB", (16, 16), colour) for colour in ("black", "white"))
    losses = [model.score([(prompt, [image])], ["w7"])[0][0] for image in (black, white)]
    assert losses[0] != losses[1]


@torch.no_grad()
def test_an_answer_behind_a_prompt_that_sees_itself_whole_does_not_see_what_comes(tmp_path: Path) -> None:
    paligemma.tiny()[0].save_pretrained(tmp_path)
    paligemma.processor().save_pretrained(tmp_path)
    model, (image, *_) = model_of(tmp_path), images()
    tensors: Any = {"images_kwargs": {"return_tensors": "pt"}}
    told = paligemma.processor()(text=["<image>w5 w6"], suffix=["w7 w8 w9"], images=[image], **tensors)
    given = {name: torch.as_tensor(value) for name, value in told.items() if name != "labels"}
    logits = model.model(**given, use_cache=False).logits[0, -5:-2]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([7, 8, 9]))
    ((loss, _),) = model.score([(model.prompt("w5 w6", 1), [image])], ["w7 w8 w9"])
    assert loss == pytest.approx(float(expected), rel=1e-5)


def test_an_answer_ends_at_a_stop_string(folder: Path) -> None:
    whole = answers(folder, 4)
    stop = whole[0].split()[1]
    assert answers(folder, 4, until=[stop]) == [text.split(stop)[0] for text in whole]


def test_do_sample_false_is_greedy_at_any_temperature(folder: Path) -> None:
    assert answers(folder, 4, temperature=5.0, do_sample=False) == answers(folder, 4)
    assert answers(folder, 4, temperature=5.0) != answers(folder, 4)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_likelihood_is_that_of_one_forward(folder: Path, batch_size: int) -> None:
    model = model_of(folder, batch_size=batch_size)
    found = model.loglikelihood(requests_of(model, "loglikelihood", "w7 w8"))
    expected = [direct_loss(model, index) for index in range(len(QUESTIONS))]
    assert_close(torch.tensor([loss for loss, _ in found]), torch.tensor([loss for loss, _ in expected]), "model")
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def direct_loss(model: Any, index: int) -> tuple[float, bool]:
    has_image = index != 2
    text = f"USER: {'<image> ' if has_image else ''}{QUESTIONS[index]} ASSISTANT: w7 w8 </s>"
    inputs = model.processor(text=text, images=[images()[index]] if has_image else None, return_tensors="pt")
    with torch.inference_mode():
        logits_TV = model.model(**inputs).logits[0, -4:-1]
    answer_T = inputs["input_ids"][0, -3:]
    chosen_T = logits_TV.log_softmax(-1)[torch.arange(3), answer_T]
    return -float(chosen_T.mean()), torch.equal(logits_TV.argmax(-1), answer_T)


def test_the_greedy_answer_is_known_as_such(folder: Path) -> None:
    model = model_of(folder)
    sample = (model.prompt("w5", 1), images()[:1])
    inputs = model._batch([model.renderer.inputs(*sample)], "left")
    with torch.inference_mode():
        first = model.model(**inputs).logits[0, -1].argmax()
    model._complete = lambda prompt, answer: prompt + answer
    assert model.score([sample], [model.processor.tokenizer.decode(first)])[0][1]


def test_a_packed_checkpoint_answers(folder: Path, tmp_path: Path) -> None:
    packed = rtn(RTNJob(model=str(folder), output=tmp_path / "packed", quant=SPEC))
    model = model_of(packed, batch_size=4)
    assert torch.equal(next(load(packed).parameters()), next(model.model.parameters()))
    assert answers(packed, 4) == answers(packed, 1)


def test_both_models_of_lmms_eval_answer_alike(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("decord")
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    write_questions(tmp_path / "questions.parquet")
    monkeypatch.setenv(FILE_VARIABLE, str(tmp_path / "questions.parquet"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    theirs = f"pretrained={folder},device=cpu,dtype=float32,device_map=cpu"
    said = {}
    for name, model, arguments in (("eqat", model_of(folder, batch_size=4), ""), ("llava_hf", "llava_hf", theirs)):
        tasks = TaskManager(include_path=tasks_folders(), include_defaults=False)
        found = simple_evaluate(
            model=model, model_args=arguments, tasks=["easy_vqa"], task_manager=tasks, bootstrap_iters=0
        )
        assert found["n-samples"]["easy_vqa"]["effective"] == COUNT
        said[name] = [sample["filtered_resps"] for sample in found["samples"]["easy_vqa"]]
    assert said["eqat"] == said["llava_hf"]


def test_a_context_may_place_its_images(folder: Path) -> None:
    model = model_of(folder)
    assert model.prompt("w5 <image> w6 <image>", 2) == "USER: w5  <image>  w6 <image> ASSISTANT: "
    assert model.prompt("<image>\nw5", 1) == model.prompt("w5", 1) == "USER: <image> w5 ASSISTANT: "
    with pytest.raises(DataError, match="2 <image> in the text for 1 images") as raised:
        model.prompt("<image> <image>", 1)
    assert_four_lines(raised.value)


@pytest.mark.parametrize(
    "leak",
    [{"stop_strings": ["w"]}, {"suppress_tokens": list(range(2, 90))}, {"repetition_penalty": 9.0}, {"num_beams": 3}],
    ids=lambda leak: "+".join(leak),
)
def test_settings_of_the_checkpoint_change_nothing(folder: Path, leak: dict[str, Any]) -> None:
    model = model_of(folder, batch_size=4)
    for name, value in leak.items():
        setattr(model.model.generation_config, name, value)
    requests = requests_of(model, "generate_until", {"max_new_tokens": 6})
    assert list(model.generate_until(requests)) == answers(folder, 4)


@pytest.mark.parametrize("padding", [None, "a token without a row"])
def test_a_batch_is_padded_without_a_padding_token(folder: Path, tmp_path: Path, padding: str | None) -> None:
    changed = Path(shutil.copytree(folder, tmp_path / "changed"))
    tokenizer = word_tokenizer({IMAGE_TOKEN: "<image>"})
    if padding is not None:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
        assert tokenizer.pad_token_id == VOCABULARY
    tokenizer.save_pretrained(changed)
    assert answers(changed, 4) == answers(changed, 1) == answers(folder, 1)


def test_what_the_tokenizer_appends_is_no_part_of_a_prompt(folder: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(folder, tmp_path / "changed"))
    tokenizer = word_tokenizer({IMAGE_TOKEN: "<image>"})
    tokenizer.pad_token = "<unk>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save_pretrained(changed)
    assert answers(changed, 4) == answers(folder, 4)
    losses = []
    for each in (changed, folder):
        model = model_of(each, batch_size=4)
        losses.append(model.loglikelihood(requests_of(model, "loglikelihood", "w7 w8")))
    assert losses[0] == losses[1]


def test_a_processor_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(folder, tmp_path / "changed"))
    settings = read_json(changed / "processor_config.json")
    write_json(changed / "processor_config.json", settings | {"patch_size": 4})
    with pytest.raises(ConfigError, match="patch_size 4") as raised:
        model_of(changed)
    assert_four_lines(raised.value)


@pytest.mark.parametrize("kind", ["generate_until", "loglikelihood"])
def test_predictions_that_are_not_finite_end_the_evaluation(folder: Path, kind: str) -> None:
    model = model_of(folder, batch_size=4)
    model.model.lm_head.weight[3, 4] = torch.nan
    second = {"max_new_tokens": 6} if kind == "generate_until" else "w7"
    with pytest.raises(CheckpointError, match=r"lm_head\.weight holds NaN") as raised:
        getattr(model, kind)(requests_of(model, kind, second))
    assert_four_lines(raised.value)


def test_the_manifest_names_the_class() -> None:
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    from eqat_eval.lmms_manifest import EQAT
    from eqat_eval.lmms_model import EqatVLM

    registry = ModelRegistryV2()
    registry.register_manifest(EQAT)
    assert registry.get_model_class("eqat") is EqatVLM


def test_unusable_options_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="float32, bfloat16, float16"):
        model_of(folder, dtype="int8")
    with pytest.raises(ConfigError, match="batch_size"):
        model_of(folder, batch_size=0)


def test_a_language_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no usable processor"):
        model_of(save_tiny(tmp_path).folder)


def test_several_rounds_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="several rounds"):
        model_of(folder).generate_until_multi_round([])
