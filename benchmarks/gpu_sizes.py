"""Sizes and clocks of `gpu_day`: those of large models on a GPU, tiny ones on a CPU for a dry run."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import TypeVar

import torch
from timing import device_seconds
from torch import Tensor

from eqat_kernels import PackedLayout, pack

GROUP = 64
Value = TypeVar("Value")


class Sizes:
    """The device, and how large things are on it.

    Args:
        dry: tiny, on the CPU.
    """

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.device = torch.device("cpu" if dry else "cuda")
        self.impl = "reference" if dry else "triton"
        self.name = "dry run on a CPU" if dry else torch.cuda.get_device_name()

    def of(self, full: Value, tiny: Value) -> Value:
        """Return one of two values."""
        return tiny if self.dry else full

    def layers(self, *shapes: tuple[int, int]) -> list[tuple[int, int]]:
        """Return (O, I) of layers; a dry run takes one small one."""
        return [(16, 64)] if self.dry else list(shapes)

    def random(self, *shape: int) -> Tensor:
        """Draw normal numbers, bfloat16."""
        return torch.randn(*shape, device=self.device, dtype=torch.bfloat16)

    def packed(self, outputs: int, inputs: int, bits: int) -> tuple[Tensor, Tensor, Tensor, PackedLayout]:
        """Draw a packed layer, asymmetric, in groups of 64."""
        codes = torch.randint(0, 1 << bits, (outputs, inputs), dtype=torch.uint8, device=self.device)
        scale = (torch.rand(outputs, inputs // GROUP, device=self.device) + 0.5) / 64
        zero = torch.randint(0, 1 << bits, (inputs // GROUP, outputs), dtype=torch.uint8, device=self.device)
        return pack(codes, bits), scale, pack(zero, bits).T.contiguous(), PackedLayout(bits, GROUP, outputs, inputs)

    def synchronize(self) -> None:
        """Wait for the device."""
        if not self.dry:
            torch.cuda.synchronize()

    def empty_cache(self) -> None:
        """Give freed memory back, and forget the peak."""
        if not self.dry:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gb(self) -> float:
        """Return the most memory that was allocated since `empty_cache`, in GB."""
        return 0.0 if self.dry else torch.cuda.max_memory_allocated() / 1e9

    def wall_s(self, function: Callable[[], object]) -> float:
        """Return the seconds of a call, the device waited for."""
        self.synchronize()
        begun = time.perf_counter()
        function()
        self.synchronize()
        return time.perf_counter() - begun

    def device_us(self, function: Callable[[], object], repetitions: int = 10) -> float:
        """Return the median device time of a call with a cold second-level cache."""
        if self.dry:
            function()
            return self.wall_s(function) * 1e6
        return device_seconds(function, repetitions) * 1e6

    def graph_us(self, function: Callable[[], object], repetitions: int = 10) -> float:
        """Return the median device time of a call replayed as a CUDA graph."""
        function()
        if self.dry:
            return self.wall_s(function) * 1e6
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        graph.replay()
        times = [self.wall_s(graph.replay) * 1e6 for _ in range(repetitions)]
        return median(times)
