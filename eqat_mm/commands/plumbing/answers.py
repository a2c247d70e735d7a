"""Answers to the questions of tasks, one by one: what is written beside a result, and compared with a reference's."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from eqat_eval.predictions import Predicted, divergences, predicted
from eqat_mm.errors import ConfigError
from eqat_mm.runtime.files import atomic_path, write_jsonl
from eqat_mm.runtime.progress import progress

Key = tuple[str, int]
"""Task, and number of the question."""

_WHAT = "the result of `eqat eval --tasks --likelihood true --output RESULT.json` on as many questions, or more"
_PARTS = ("answer", "ids", "log_probs")


@dataclass
class Answers:
    """What a model answered.

    Attributes:
        records: one for each question: task, question, asked, right, answer; `score` where a task is scored by exact
            match, `nll` and `kl` where they were measured.
        predicted: what was predicted where the right answers stand, as far as it was measured.
    """

    records: list[dict[str, Any]]
    predicted: dict[Key, Predicted] = field(default_factory=dict)

    def scores(self) -> dict[Key, float]:
        """Return the scores of the questions that have one."""
        return {(each["task"], each["question"]): each["score"] for each in self.records if "score" in each}

    def write(self, output: Path) -> None:
        """Write the records, and what was predicted, beside a result."""
        write_jsonl(answers_of(output), self.records)
        if self.predicted:
            tensors = {
                f"{task}/{number}/{part}": getattr(each, part)
                for (task, number), each in self.predicted.items()
                for part in _PARTS
            }
            with atomic_path(predictions_of(output)) as temporary:
                save_file(tensors, temporary)

    @classmethod
    def read(cls, output: Path) -> Answers:
        """Read what was written beside a result.

        Raises:
            ConfigError: it is not there, or not as it was written.
        """
        try:
            lines = answers_of(output).read_text("utf-8").splitlines()
            records = [json.loads(line) for line in lines]
            nll = {(each["task"], each["question"]): each["nll"] for each in records if "nll" in each}
            with safe_open(predictions_of(output), "pt") as file:
                parts = {key: [file.get_tensor(f"{key[0]}/{key[1]}/{part}") for part in _PARTS] for key in nll}
        except Exception as error:
            raise ConfigError("--reference", f"{output}: {error}", _WHAT, "evaluate the reference again") from error
        return cls(records, {key: Predicted(answer, nll[key], *rest) for key, (answer, *rest) in parts.items()})


def answers_of(output: Path) -> Path:
    """Return the file beside a result in which the answers are."""
    return output.with_name(f"{output.stem}.answers.jsonl")


def predictions_of(output: Path) -> Path:
    """Return the file beside a result in which the predictions are."""
    return output.with_name(f"{output.stem}.predictions.safetensors")


def measure_likelihoods(model: Any, answers: Answers, reference: Answers | None) -> None:
    """Find how likely the right answers are, and how far from what a reference predicted; note it in the records.

    Questions without a right answer that is a text are left out.

    Args:
        model: of lmms-eval, that was asked.
        answers: that it gave.
        reference: another model's, asked the same.

    Raises:
        ConfigError: the reference was not asked one of the questions, or reads answers as other tokens.
    """
    keyed = [(each, (each["task"], each["question"])) for each in answers.records if each["right"].strip()]
    asked = [(each, key) for each, key in keyed if key in model.asked]
    batches = model.batches([model.asked[key] for _, key in asked])
    for indices in progress(batches, what="likelihoods", total=len(batches), unit="batch"):
        batch = [asked[index] for index in indices]
        samples = [model.sample_of(model.asked[key]) for _, key in batch]
        rows = model.predictions(samples, [record["right"] for record, _ in batch])
        for (record, key), (logits_TV, answer_T) in zip(batch, rows, strict=True):
            found = predicted(logits_TV, answer_T)
            answers.predicted[key] = found
            record["nll"], record["tokens"] = found.nll, len(answer_T)
            if reference is not None:
                record["kl"] = float(divergences(_beside(reference, key), logits_TV, answer_T).sum())


def _beside(reference: Answers, key: Key) -> Predicted:
    if key in reference.predicted:
        return reference.predicted[key]
    raise ConfigError(
        "--reference", f"no prediction for question {key[1]} of {key[0]}", _WHAT, "evaluate it on these questions"
    )


def compared(task: str, answers: Answers, reference: Answers | None) -> dict[str, float]:
    """Return what is known of a task beside its score: nll, kl and flips, as far as they were measured.

    `nll` is the mean over the answers, `kl` that over their tokens, in nats; `flips` is the share of questions that are
    right in one of the two models only.
    """
    records = [each for each in answers.records if each["task"] == task]
    found = {}
    if likely := [each for each in records if "nll" in each]:
        found["nll"] = _mean(each["nll"] for each in likely)
        if all("kl" in each for each in likely):
            found["kl"] = sum(each["kl"] for each in likely) / sum(each["tokens"] for each in likely)
    if reference is not None:
        theirs = reference.scores()
        pairs = [(score, theirs[key]) for key, score in answers.scores().items() if key[0] == task and key in theirs]
        if pairs:
            found["flips"] = _mean(abs(own - other) for own, other in pairs)
    return found


def records_of(samples: Mapping[str, Sequence[Mapping[str, Any]]], score: str) -> list[dict[str, Any]]:
    """Return one record for each question, in their order, of what lmms-eval logs.

    Args:
        samples: by task.
        score: metric that tells whether an answer is right.
    """
    return [
        {
            "task": task,
            "question": sample["doc_id"],
            "asked": str(sample["arguments"][0]),
            "right": str(sample["target"]),
            "answer": sample["filtered_resps"],
        }
        | ({"score": float(sample[score])} if isinstance(sample.get(score), int | float) else {})
        for task, logged in samples.items()
        for sample in sorted(logged, key=lambda sample: sample["doc_id"])
    ]


def _mean(values: Iterable[float]) -> float:
    return float(torch.tensor(list(values), dtype=torch.float64).mean())
