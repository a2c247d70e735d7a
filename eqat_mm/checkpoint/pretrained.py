"""The class of a loaded model: transformers' own, but `save_pretrained` and `push_to_hub` write a packed checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from eqat_mm.checkpoint.origin import Origin
from eqat_mm.checkpoint.write import save_into
from eqat_mm.quant.narrow import computed_dtype
from eqat_mm.runtime.provenance import provenance

_OF_A_PUSH = ("commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")


class SavesPacked:
    """Mixed into the class of a loaded model: saving writes the packed checkpoint, not its bare tensors."""

    checkpoint_origin: Origin

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in: matrices may be narrower."""
        return computed_dtype(self) or super().dtype  # type: ignore[arg-type, misc]

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Write the packed checkpoint, which `eqat_mm.load` and transformers with compressed-tensors read.

        It has the shards and the dtypes of the checkpoint that was loaded. Files of a packed checkpoint that is in the
        folder already are replaced, other files stay.

        Args:
            save_directory: folder of the new checkpoint; it may be the one that was loaded.
            is_main_process: of several processes only one writes.
            state_dict: tensors that a trainer continues from: they are written as they are, in transformers' own way.
            push_to_hub: upload it, too, as `repo_id`, by default the name of the folder.
            **options: of an upload, as `push_to_hub` takes them; others, such as `max_shard_size`, have no effect.

        Raises:
            CheckpointError: the folder holds a model that is no packed checkpoint.
        """
        if state_dict is not None:
            super().save_pretrained(  # type: ignore[misc]
                save_directory,
                is_main_process=is_main_process,
                state_dict=state_dict,
                push_to_hub=push_to_hub,
                **options,
            )
            return
        if not is_main_process:
            return
        folder = Path(save_directory)
        save_into(self, folder, provenance("save_pretrained", {}, 0))  # type: ignore[arg-type]
        if push_to_hub:
            repository = options.get("repo_id", folder.resolve().name)
            self.push_to_hub(repository, **{key: options[key] for key in _OF_A_PUSH if key in options})  # type: ignore[attr-defined]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load tensors by their names in the model or in files, where they differ: a Trainer continues from files."""
        own = self.state_dict().keys()  # type: ignore[attr-defined]
        names = {stored: name for held in self.checkpoint_origin.shards.values() for stored, name in held.items()}
        named = {name if name in own else names.get(name, name): value for name, value in state_dict.items()}
        return super().load_state_dict(named, strict=strict, assign=assign)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Let copies and pickles find the class, which no module has."""
        return _empty, (type(self).__bases__[1],), self.__dict__


def as_packed(model: PreTrainedModel, origin: Origin) -> PreTrainedModel:
    """Return the model, which from here on saves itself as a packed checkpoint; its class keeps name and bases."""
    model.__class__ = _packed_class(type(model))  # type: ignore[arg-type]
    vars(model)["checkpoint_origin"] = origin
    return model


@cache
def _packed_class(kind: Any) -> Any:
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (SavesPacked, kind), names)


def _empty(kind: type[PreTrainedModel]) -> Any:
    packed: Any = _packed_class(kind)  # type: ignore[arg-type]
    return packed.__new__(packed)
