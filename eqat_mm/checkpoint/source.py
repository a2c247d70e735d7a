"""The tensors of a packed checkpoint by the names of the model's modules."""

from __future__ import annotations

from collections.abc import Callable

import transformers
from torch import Tensor

from eqat_mm.blocks.names import module_names, published_names
from eqat_mm.blocks.source import WeightSource
from eqat_mm.checkpoint.layout import PACKED_LEAVES, from_bytes
from eqat_mm.checkpoint.shards import DTYPES, Header
from eqat_mm.errors import CheckpointError


class PackedSource(WeightSource):
    """Weights as `PackedLinear` asks for them, also where the files hold them as whole bytes."""

    def read(self, name: str) -> Tensor:
        """Return one tensor in its stored dtype; see `WeightSource.read`."""
        module, _, leaf = name.rpartition(".")
        if name in self or leaf not in ("weight_packed", "weight_shape"):
            return super().read(name)
        packed, shape = from_bytes(super().read(f"{module}.weight"))
        return packed if leaf == "weight_packed" else shape

    def shards(self) -> dict[str, dict[str, tuple[str, Header]]]:
        """Return, for every file, what it calls its tensors, with their names in the model and their headers.

        Raises:
            CheckpointError: two tensors in the files have one name in the model.
        """
        found: dict[str, dict[str, tuple[str, Header]]] = {one.path.name: {} for one in self.stored}
        for name, (one, *others) in self.by_name.items():
            if others:
                raise CheckpointError(
                    where=str(others[0].path),
                    given=f"{others[0].name}, a second tensor for one place in the model",
                    allowed="one tensor for every weight",
                    do="copy or make the checkpoint again",
                )
            found[one.path.name][one.name] = (name, Header(DTYPES.get(one.dtype), one.shape))
        return found


def packed_names(model: transformers.PreTrainedModel) -> Callable[[str], str]:
    """Return the function from the name of a tensor in packed files to its name in `model`, not packed yet.

    A packed tensor goes where the weight that it stands for would go.
    """
    return _like_weights(module_names(model))


def published_packed_names(model: transformers.PreTrainedModel) -> Callable[[str], str]:
    """Return the function from the name of a tensor in packed files of `model`, empty yet, to the published one."""
    return _like_weights(published_names(model))


def _like_weights(rename: Callable[[str], str]) -> Callable[[str], str]:
    """Return `rename` for names of packed tensors, too."""

    def name(stored: str) -> str:
        module, _, leaf = stored.rpartition(".")
        return rename(f"{module}.weight").removesuffix("weight") + leaf if leaf in PACKED_LEAVES else rename(stored)

    return name
