"""What commands share in which a model writes: how it is addressed, how words are drawn, what it computes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from eqat_eval.graphed_decode import CudaGraph
from eqat_mm.data.image_text.style import AUTO, ImageShape, Style, require_template
from eqat_mm.runtime.precision import Precision
from eqat_mm.runtime.settings import PositiveOrZero, Seed, Settings, Within


@dataclass(frozen=True, kw_only=True)
class Speaking(Settings):
    """How a model writes.

    Attributes:
        system: what the system says first, in place of the chat template's own words.
        allow_network: let images be fetched that are named by an http(s) address.
        template: chat template of a vision-language model: `auto` (the one that the model was trained with),
            `vicuna_v1`, `model` (the one in its folder), or the path of a .jinja file.
        images: what becomes of images that are no squares: `pad`, `crop`, `model` (what its folder says), or `auto`
            (what the model was trained with).
        temperature: 0 is greedy.
        top_p: nucleus of the sampling.
        seed: of the sampling.
        dtype: of what is not quantized, and of matrix products; `auto` takes bfloat16 on a GPU, float32 on a CPU.
        device: what to compute on: cpu, cuda, cuda:N, or auto.
        cuda_graph: replay decode steps from a CUDA graph; `auto` does so on a GPU and says where it cannot, and on a
            CPU replays them in C where it can.
    """

    system: str | None = None
    allow_network: bool = False
    template: str = AUTO
    images: ImageShape = AUTO
    temperature: PositiveOrZero = 0.0
    top_p: Annotated[float, Within(0, 1, without=(0,))] = 1.0
    seed: Seed = 0
    dtype: Precision = "auto"
    device: str = "auto"
    cuda_graph: CudaGraph = "auto"

    def check_together(self) -> None:
        """Check that the template is there, before anything is read."""
        require_template(self.template, "--template")

    @property
    def style(self) -> Style:
        """How a vision-language model is addressed."""
        return Style(self.template, self.images)

    @property
    def decoding(self) -> dict[str, Any]:
        """Arguments of whatever generates."""
        return {name: getattr(self, name) for name in ("system", "temperature", "top_p", "seed", "cuda_graph")}
