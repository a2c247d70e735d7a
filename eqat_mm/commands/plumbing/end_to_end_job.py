"""What commands share that train a whole model: text or conversations, or both, and never one of them in silence."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from eqat_mm.commands.line.model_config import sees
from eqat_mm.data.image_text.settings import ImageTextData
from eqat_mm.data.text.settings import TextWindows
from eqat_mm.errors import ConfigError
from eqat_mm.runtime.settings import Share
from eqat_mm.train.end_to_end import EndToEndConfig


@dataclass(frozen=True)
class EndToEndJob(EndToEndConfig):
    """Training of a whole model.

    Attributes:
        model: model folder, alias (`eqat assets`) or hub repository.
        output: run folder; the checkpoint is `OUTPUT/model`.
        data: text to train on; for text that the model wrote itself, its file and `part: all`.
        conversations: conversations to train on instead, about images where the model sees.
        text_share: share of text among the samples, where `data` and `conversations` are both learned from; there are
            then as many windows as that takes, whatever `data.count` says.
        text_only: train a vision-language model on text alone, whatever conversations a recipe names.
        device: what to compute on: cpu, cuda, cuda:N, or auto.
        overwrite: discard a run that is already in the output folder.
        recipe_for: models that these settings were tuned for (set by recipes).
    """

    model: str = field(kw_only=True)
    output: Path | None = None
    data: TextWindows = field(default_factory=lambda: TextWindows(count=4096))
    conversations: ImageTextData | None = None
    text_share: Share | None = None
    text_only: bool = False
    device: str = "auto"
    overwrite: bool = False
    recipe_for: tuple[str, ...] = ()

    @property
    def judged(self) -> bool:
        """Whether conversations are held out."""
        config = self.conversations
        return config is not None and bool(config.held_out or config.held_out_source)

    @property
    def judged_by_full_precision(self) -> bool:
        """Whether a full-precision model says what is wanted of them."""
        return self.judged and self.held_out_kl

    def require_judged(self) -> None:
        """Check that there is something to tell the best step by, where that one is to be kept.

        Raises:
            ConfigError: there is not.
        """
        if self.keep_best and not self.judged:
            raise ConfigError(
                where="--keep_best true",
                given="no held-out conversations",
                allowed="conversations to judge every step by",
                do="add --conversations.held_out 256, or leave --keep_best out",
            )

    def with_data_decided(self, *models: str) -> Self:
        """Return the job without conversations where it is to be trained on text alone.

        Args:
            models: that are trained, the first of which there is a configuration; they need not be there yet.

        Raises:
            ConfigError: both kinds are named and no share, or neither, a share of one kind alone, or text for a model
                that sees.
        """
        if self.text_only:
            job = replace(self, conversations=None, text_share=None)
        else:
            self._require_named(models)
            job = self
        if job.conversations is None or job.text_share is not None:
            job.data.require_source("--data.source")
        return job

    def _require_named(self, models: tuple[str, ...]) -> None:
        if self.conversations is None and sees(*models):
            raise ConfigError(
                where="--conversations.source",
                given=f"none, for {self.model}, a vision-language model",
                allowed="conversations about images, in LLaVA's format, or text alone on request",
                do="add --conversations.source FILE --conversations.image_folder FOLDER, or --text_only to train on it",
            )
        if self.conversations is None and self.text_share is not None:
            raise ConfigError(
                where=f"--text_share {self.text_share:g}",
                given="no conversations: text is all there is",
                allowed="a share of text among conversations",
                do="name these with --conversations.source FILE, or leave --text_share out",
            )
        if self.conversations is not None and self.data.source is not None and self.text_share is None:
            raise ConfigError(
                where="--data.source and --conversations.source",
                given=f"{self.data.source} and {self.conversations.source}",
                allowed="one of them, or both and the share of text among the samples",
                do="mix them with --text_share 0.1, or take one of them: --data.source null, or --text_only",
            )
