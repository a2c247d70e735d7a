"""`eqat`, a model of lmms-eval: a packed checkpoint, or a full-precision folder, that answers in batches.

Axes: B samples, T tokens, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from torch import Tensor

from eqat_eval.decoding import decoding, generated
from eqat_eval.finite import not_finite
from eqat_eval.inference import inference
from eqat_eval.shared_images import Fronts, Row, batches, digest, nothing_read, obstacle, read_fronts
from eqat_eval.windows import check_positive
from eqat_mm.checkpoint.folders import load_for_inference
from eqat_mm.checkpoint.speaker import load_speaker
from eqat_mm.data.image_text.batching import Collator
from eqat_mm.data.image_text.conversations import Turn
from eqat_mm.data.image_text.prefix import answered, has_prefix
from eqat_mm.data.image_text.prompt import Renderer
from eqat_mm.data.image_text.style import AUTO, ImageShape, Style
from eqat_mm.errors import CheckpointError, ConfigError, DataError
from eqat_mm.runtime.device import best_device
from eqat_mm.runtime.precision import Precision, unquantized_dtype
from eqat_mm.runtime.progress import progress

_DTYPES: dict[str, torch.dtype | Precision] = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class EqatVLM(lmms):  # type: ignore[misc]
    """A vision-language model behind lmms-eval's interface.

    Prompts are what the processor's chat template makes of one user message; images come where it has `<image>`, or in
    front. Questions about the same images are answered together, and the images are read once for all of them.
    Generation is greedy unless a task asks for sampling, and takes nothing from the checkpoint's generation_config.json
    but its end tokens.

    Args:
        pretrained: folder of a packed checkpoint of ours, or of a full-precision model.
        device: `auto` is the GPU of this process, or the CPU where there is none.
        dtype: auto (bfloat16 on a GPU, float32 on a CPU), float32, bfloat16 or float16, of what is not quantized.
        batch_size: questions per forward.
        template: of the conversation, see `eqat_mm.data.image_text.style`.
        images: what becomes of images that are no squares, see there.

    Attributes:
        asked: requests of `generate_until` so far, by task and number of the question.

    Raises:
        CheckpointError: not a usable model folder, or one without processor and chat template.
        ConfigError: unknown dtype or device, a batch size below 1, or a processor that contradicts the model.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        device: str = "auto",
        dtype: torch.dtype | str = "auto",
        batch_size: int | str = 1,
        template: str = AUTO,
        images: ImageShape = AUTO,
    ) -> None:
        super().__init__()
        if isinstance(dtype, str) and dtype not in _DTYPES:
            raise ConfigError("dtype", repr(dtype), ", ".join(_DTYPES), "choose one of these")
        self.batch_size = int(batch_size)
        check_positive("batch_size", self.batch_size)
        self.device = best_device(device)
        self.dtype = unquantized_dtype(_DTYPES[dtype] if isinstance(dtype, str) else dtype, self.device)
        folder = Path(pretrained)
        self.processor = _processor(folder, Style(template, images))
        self.renderer = Renderer(self.processor)
        self.model = load_for_inference(folder, self.device, self.dtype)
        self.shares_images = obstacle(self.model) is None
        self.asked: dict[tuple[str, int], Instance] = {}
        self._digests: dict[tuple[Any, ...], Hashable] = {}

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return the answer to every request, in order."""
        answers = [""] * len(requests)
        self.asked |= {(request.args[4], request.args[3]): request for request in requests}
        for indices in progress(found := self.batches(requests), what="answers", total=len(found), unit="batch"):
            batch = [requests[index] for index in indices]
            samples = [self.sample_of(request) for request in batch]
            for index, answer in zip(indices, self.generate(samples, batch[0].args[1]), strict=True):
                answers[index] = answer
        return answers

    def generate(self, samples: Sequence[tuple[str, list[Any]]], options: Mapping[str, Any]) -> list[str]:
        """Answer one batch.

        Args:
            samples: (prompt, images) of each.
            options: generation kwargs of lmms-eval; `do_sample: false` means greedy whatever the temperature.
        """
        sampled = options.get("do_sample", True)
        settings = decoding(
            self.model,
            self.processor.tokenizer,
            options.get("max_new_tokens") or 1024,
            temperature=float(options.get("temperature") or 0) if sampled else 0.0,
            top_p=options.get("top_p") or 1.0,
            num_beams=options.get("num_beams") or 1,
        )
        rows = [self.renderer.inputs(prompt, images) for prompt, images in samples]
        with inference(self.model):
            fronts = self._fronts(rows) if settings.num_beams == 1 else nothing_read(rows)
            inputs = fronts.for_generate(self._batch(fronts.rests(rows), "left"))
            tokens_BT = generated(self.model, inputs, settings)
        texts = self.processor.batch_decode(tokens_BT[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [_until(text, options.get("until") or ()) for text in texts]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return (mean negative log-likelihood of the answer's tokens, whether greedy decoding gives them), in order.

        lmms-eval takes the *lowest* value for the best choice, so this is a loss, in nats per token. The answer is
        what the chat template adds for it, an end token included.
        """
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for indices in progress(found := self.batches(requests), what="likelihoods", total=len(found), unit="batch"):
            samples, answers = [], []
            for context, answer, *where in (requests[index].args for index in indices):
                *_, doc_id, task, split = where
                known = isinstance(answer, str)
                answers.append(answer if known else str(answer(self.task_dict[task][split][doc_id])))
                samples.append(self._sample(context, *where))
            for index, result in zip(indices, self.score(samples, answers), strict=True):
                results[index] = result
        return results

    def score(self, samples: Sequence[tuple[str, list[Any]]], answers: Sequence[str]) -> list[tuple[float, bool]]:
        """Score one batch of given answers; arguments and result as in `generate` and `loglikelihood`.

        Raises:
            DataError: the tokens of an answer cannot be told from those of its prompt.
            CheckpointError: the model's predictions are not finite.
        """
        return [self._score_row(*row) for row in self.predictions(samples, answers)]

    def predictions(
        self, samples: Sequence[tuple[str, list[Any]]], answers: Sequence[str]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield for each given answer of one batch the logits at its tokens [T, V], in float32, and the tokens [T].

        Raises:
            DataError: the tokens of an answer cannot be told from those of its prompt.
        """
        told = [self._told(*sample, answer) for sample, answer in zip(samples, answers, strict=True)]
        rows, starts = [row for row, _ in told], [start for _, start in told]
        with inference(self.model):
            fronts = self._fronts(rows, starts)
            # padded on the right, so that positions are those of an unpadded sample whatever the model does with them
            inputs = fronts.for_forward(self._batch(fronts.rests(rows), "right"))
            places = [start - read for start, read in zip(starts, fronts.lengths, strict=True)]
            columns_C = torch.arange(min(places) - 1, inputs["input_ids"].shape[1] - 1, device=self.device)
            logits_BCV = self.model(**inputs, logits_to_keep=columns_C).logits
        for logits_CV, row, start, place in zip(logits_BCV, rows, starts, places, strict=True):
            answer_T = row["input_ids"][start:].to(self.device)
            yield logits_CV[place - min(places) :][: len(answer_T)].float(), answer_T

    def _told(self, prompt: str, images: list[Any], answer: str) -> tuple[dict[str, Tensor], int]:
        """Return what the model reads of a prompt and its answer, and where the answer's tokens begin."""
        row = self.renderer.inputs(self._complete(prompt, answer), images)
        ids_T, prompt_T = row["input_ids"], self.renderer.inputs(prompt, images)["input_ids"]
        start = len(prompt_T)
        if len(ids_T) <= start or not torch.equal(ids_T[:start], prompt_T):
            reason = "its first token reaches into the prompt, or it has none"
            raise _unclear(f"token ids {ids_T[start:].tolist()}", reason)
        return answered(row, start) if has_prefix(self.processor) else row, start

    def _score_row(self, predicted_TV: Tensor, answer_T: Tensor) -> tuple[float, bool]:
        loss = float(torch.nn.functional.cross_entropy(predicted_TV, answer_T))
        if not math.isfinite(loss):
            raise not_finite(self.model, f"the loss of an answer is {loss}")
        return loss, bool(torch.equal(predicted_TV.argmax(-1), answer_T))

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refuse conversations of several rounds."""
        raise ConfigError(
            "lmms-eval task",
            "one of several rounds (generate_until_multi_round)",
            "tasks of one question and one answer: generate_until, loglikelihood, multiple_choice",
            "choose another task",
        )

    def sample_of(self, request: Instance) -> tuple[str, list[Any]]:
        """Return the prompt and the images of a request of `generate_until`."""
        return self._sample(*request.args[:1], *request.args[2:])

    def _sample(self, context: str, to_images: Any, doc_id: int, task: str, split: str) -> tuple[str, list[Any]]:
        images = self._images(to_images, doc_id, task, split)
        return self.prompt(context, len(images)), images

    def _images(self, to_images: Any, doc_id: int, task: str, split: str) -> list[Any]:
        return list(to_images(self.task_dict[task][split][doc_id]) or ())

    def prompt(self, context: str, images: int) -> str:
        """Return the chat template's text for a question; a context that places its images itself keeps them there."""
        return self.renderer.text([self.renderer.asked(context, images)], answering=True)

    def _complete(self, prompt: str, answer: str) -> str:
        """Return the prompt followed by what the template writes for the answer."""
        question, given = Turn("user", ""), Turn("assistant", answer.strip())
        before = self.renderer.text([question], answering=True)
        after = self.renderer.text([question, given])
        if not after.startswith(before):
            raise _unclear(answer, "the chat template does not write it behind the prompt")
        return prompt + after.removeprefix(before).rstrip()

    def batches(self, requests: Sequence[Instance]) -> list[list[int]]:
        """Return indices of requests in batches: of the same options, and those about the same images together."""
        lengths = [len(request.args[0]) for request in requests]
        kinds = [_options(request.args[1]) for request in requests]
        images: Sequence[Hashable] = range(len(requests))
        if self.shares_images:
            looked = progress(requests, what="compare images", total=len(requests), unit="question")
            images = [self._digest(*request.args[2:]) for request in looked]
        return list(batches(lengths, kinds, images, self.batch_size))

    def _digest(self, to_images: Any, *where: Any) -> Hashable:
        """Return what tells the images of a question apart; answers and their likelihoods ask for it both."""
        if where not in self._digests:
            self._digests[where] = digest(self._images(to_images, *where))
        return self._digests[where]

    def _fronts(self, rows: list[Row], ends: Sequence[int] | None = None) -> Fronts:
        if not self.shares_images:
            return nothing_read(rows)
        return read_fronts(self.model, rows, self.processor.image_token_id, self._batch, ends)

    def _batch(self, rows: list[Row], padding_side: str) -> Row:
        batch = Collator(self.processor.tokenizer, padding_side)(rows)
        return {
            name: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for name, value in batch.items()
        }


def _options(given: Any) -> str:
    """Return what tells the options of a request apart; an answer to score is none."""
    return json.dumps(given, sort_keys=True, default=str) if isinstance(given, Mapping) else ""


def _unclear(answer: str, reason: str) -> DataError:
    return DataError(
        "lmms-eval loglikelihood",
        f"{answer}: {reason}",
        "an answer of at least one token that leaves the tokens of its prompt as they are",
        "use a task that generates, or a chat template that ends the prompt at a token's border",
    )


def _until(text: str, stops: str | Sequence[str]) -> str:
    """Return the text before the first of the stop strings."""
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.split(stop, 1)[0] if stop else text
    return text


def _processor(folder: Path, style: Style) -> Any:
    processor = load_speaker(folder, style)
    if getattr(processor, "chat_template", None):
        return processor
    raise CheckpointError(
        where=str(folder),
        given="no usable processor (a processor without chat template)",
        allowed="the folder of a vision-language model, with processor and chat template",
        do="give the folder of such a model; the processor's files belong beside the weights",
    )
