"""The format that LLaVA-1.5 was trained with, written down a second time, and records to compare it on."""

from __future__ import annotations

import json
import random
from typing import Any, NamedTuple

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import LlamaTokenizer

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
WORDS = ["what", "is", "it", "?", "a", "cat,", "red.", "How", "many\tdogs", "Antwort:", "größer", "日本", "猫", "🐈"]
WORDS += ["e\u0301", "{{ x }}", "<p>", "A.", "1.5", "USER:", "it's", "#"]
GAPS = [" ", " ", " ", " ", "  ", "\n", "\n\n", "\n \n"]


class Published(NamedTuple):
    """What a record is to be: tokens, one label for each."""

    ids: list[int]
    labels: list[int]


def published(record: dict[str, Any], tokenizer: Any, image: list[int]) -> Published:
    """Render and tokenise a record from the description of the format: rounds of a question and an answer.

    Args:
        record: in LLaVA's format, with at most one image.
        tokenizer: like Llama's.
        image: the tokens of an image.
    """
    said = [turn["value"] for turn in record["conversations"]]
    found = Published([tokenizer.bos_token_id], [-100])
    for number, (question, answer) in enumerate(zip(said[::2], said[1::2], strict=True)):
        if "<image>" in question:
            question = ("<image>\n" + question.replace("<image>", "").strip()).strip()
        prompt = (SYSTEM + " " if number == 0 else "") + f"USER: {question} ASSISTANT:"
        before, whole = (_tokens(text, tokenizer, image) for text in (prompt, f"{prompt} {answer}"))
        assert whole[: len(before)] == before
        written = [*whole[len(before) :], tokenizer.eos_token_id]
        found.ids.extend([*before, *written])
        found.labels.extend([*[-100] * len(before), *written])
    return found


def _tokens(text: str, tokenizer: Any, image: list[int]) -> list[int]:
    """Tokenise the pieces around images one by one."""
    pieces = [
        tokenizer(piece, add_special_tokens=False)["input_ids"] if piece else [] for piece in text.split("<image>")
    ]
    return [token for number, piece in enumerate(pieces) for token in ([*image, *piece] if number else piece)]


def records(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return records of one to four rounds, most with an image: before, behind or among the words of a turn."""
    draw = random.Random(seed)
    return [_record(draw, number) for number in range(count)]


def _record(draw: random.Random, number: int) -> dict[str, Any]:
    rounds = draw.choice([1, 1, 2, 3, 4])
    said = [_ends(draw, _text(draw)) for _ in range(2 * rounds)]
    record: dict[str, Any] = {"id": str(number)}
    if number % 4:
        place = draw.choice([0, 0, 0, 2 * draw.randrange(rounds)])
        said[place] = ("<image>\n{}", "{}\n<image>", "{} \n<image>\n{}", "<image>{}", "{}<image> {}", "<image>")[
            draw.randrange(6)
        ].format(said[place], _text(draw))
        record["image"] = "photo.png"
    turns = [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(said)]
    return record | {"conversations": turns}


def _text(draw: random.Random) -> str:
    text = draw.choice(WORDS)
    for _ in range(draw.randrange(9)):
        text += draw.choice(GAPS) + draw.choice(WORDS)
    return text


def _ends(draw: random.Random, text: str) -> str:
    return draw.choice(["", "", "", "\n", " ", "\n\n"]) + text + draw.choice(["", "", "", "\n", " "])


def llama_tokenizer(vocabulary: int = 700) -> Any:
    """Return a tokenizer of Llama's kind: bytes for what it does not know, a space before every piece of text."""
    backend = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    lines = [SYSTEM, "USER: ASSISTANT:", *WORDS[:8]] * 9
    backend.train_from_iterator(lines, BpeTrainer(vocab_size=vocabulary, special_tokens=special, show_progress=False))
    trained = json.loads(backend.to_str())["model"]
    more: dict[str, Any] = {"pad_token": "<unk>", "extra_special_tokens": ["<image>"], "add_bos_token": True}
    return LlamaTokenizer(trained["vocab"], merges=[tuple(merge) for merge in trained["merges"]], legacy=True, **more)
