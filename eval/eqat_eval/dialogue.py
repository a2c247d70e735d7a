"""A conversation with a model, turn by turn, about images where there are some."""

from __future__ import annotations

from typing import Any

from eqat_eval.decoding import decoding
from eqat_eval.generation import GeneratedText, continued
from eqat_eval.graphed_decode import CudaGraph, uses_graph
from eqat_eval.prompts import encode_turns, said_first
from eqat_mm.data.image_text.conversations import Turn
from eqat_mm.data.image_text.prompt import Renderer
from eqat_mm.errors import DataError
from eqat_mm.runtime.seeding import derive_seed


class Dialogue:
    """What was said, and the model that answers. A turn that fails leaves everything as it was.

    Args:
        model: language or vision-language model.
        speaker: its tokenizer, or its processor.
        max_new_tokens: most tokens of an answer.
        temperature: 0 is greedy.
        top_p: nucleus of the sampling.
        seed: of the sampling.
        system: what the system says first.
        cuda_graph: replay decode steps from a CUDA graph.

    Raises:
        ConfigError: an option out of range.
    """

    def __init__(
        self,
        model: Any,
        speaker: Any,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        system: str | None = None,
        cuda_graph: CudaGraph = "auto",
    ) -> None:
        self._model = model
        self._renderer = Renderer(speaker)
        self._system = system
        self._seed = seed
        tokenizer = self._renderer.tokenizer
        self._settings = decoding(model, tokenizer, max_new_tokens, temperature=temperature, top_p=top_p)
        self._graph = uses_graph(model, cuda_graph)
        self.reset()

    def reset(self) -> None:
        """Forget what was said and shown."""
        self._turns = said_first(self._system)
        self._images: list[Any] = []
        self._shown: list[Any] = []

    def show(self, image: Any) -> None:
        """Let the next message be about an image, in mode RGB, too."""
        self._shown.append(image)

    def ask(self, text: str, *, stream: bool = False) -> GeneratedText:
        """Return the answer to a message.

        Args:
            text: the message; images come where it has `<image>`, or before it.
            stream: print the answer on stdout as it is generated.

        Raises:
            DataError: more or fewer `<image>` than images, or a conversation longer than the model can read.
            ConfigError: no chat template, or one that refuses the conversation.
            CheckpointError: the model's predictions are not finite.
        """
        images = [*self._images, *self._shown]
        turns = [*self._turns, self._renderer.asked(text, len(self._shown))]
        inputs = encode_turns(self._renderer, turns, images)
        self._require_room(inputs["input_ids"].shape[1])
        seed = derive_seed(self._seed, "turn", len(turns))
        given: dict[str, Any] = {"seed": seed, "stream": stream, "graph": self._graph}
        answer = continued(self._model, self._renderer.tokenizer, inputs, self._settings, **given)
        self._turns, self._images, self._shown = [*turns, Turn("assistant", answer.text.strip())], images, []
        return answer

    def _require_room(self, tokens: int) -> None:
        most = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if most is not None and tokens >= most:
            raise DataError(
                "conversation",
                f"{tokens:,} tokens, those of images counted",
                f"fewer than {most:,}, which is what this model can read",
                "begin anew, or say less",
            )
