"""What a loaded model keeps of its checkpoint, so that it can be written again, wherever the folder is by then."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from eqat_mm.blocks.source import WeightSource
from eqat_mm.checkpoint.manifest import Manifest, read_manifest
from eqat_mm.checkpoint.match import needless
from eqat_mm.checkpoint.shards import Header
from eqat_mm.checkpoint.spelling import without_stale
from eqat_mm.errors import CheckpointError


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a model was loaded from.

    Attributes:
        folder: of the checkpoint; it may be gone since.
        manifest: of the checkpoint.
        config: content of its config.json.
        settings: the model's configuration as it was loaded.
        generation: the model's generation settings as they were loaded.
        shards: file -> name of a tensor in it -> its name in the model.
        published: name of a tensor in a file -> its name in published files of such a model.
        dtypes: name of a tensor in the model -> dtype in the file.
    """

    folder: Path
    manifest: Manifest
    config: dict[str, Any]
    settings: dict[str, Any]
    generation: dict[str, Any] | None
    shards: dict[str, dict[str, str]]
    published: dict[str, str]
    dtypes: dict[str, torch.dtype]

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        folder: Path,
        manifest: Manifest,
        config: dict[str, Any],
        shards: dict[str, dict[str, tuple[str, Header]]],
        published: dict[str, str],
    ) -> Origin:
        """Note what `model`, which was just filled from `shards`, as `PackedSource` gives them, was loaded from."""
        headers = dict(each for held in shards.values() for each in held.values())
        ignored = needless(model, headers)
        return cls(
            folder=folder.absolute(),
            manifest=manifest,
            config=config,
            settings=model.config.to_dict(),
            generation=None if model.generation_config is None else model.generation_config.to_dict(),
            shards={file: {stored: name for stored, (name, _) in held.items()} for file, held in shards.items()},
            published=published,
            dtypes={
                name: header.dtype
                for name, header in headers.items()
                if header.dtype is not None and name not in ignored
            },
        )

    def config_of(self, model: PreTrainedModel) -> dict[str, Any]:
        """Return the content of config.json with what was changed in the model's configuration since."""
        now = model.config.to_dict()
        return without_stale(self.config, {key: now[key] for key in now if now[key] != self.settings.get(key)})

    def unchanged(self) -> WeightSource | None:
        """Return the weights of the checkpoint as they were loaded; None where it is gone or another by now."""
        try:
            same = read_manifest(self.folder).files == self.manifest.files
            return WeightSource(self.folder) if same else None
        except CheckpointError:
            return None
