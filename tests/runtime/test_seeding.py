"""Seeds depend on names alone, and never change between versions."""

from __future__ import annotations

import torch

from eqat_mm.runtime.seeding import derive_seed, generator


def test_seeds_are_stable() -> None:
    assert derive_seed(0) == 4246866556266386882
    assert derive_seed(0, "order", 17) == 2841258024477928176


def test_seeds_differ_by_seed_and_purpose() -> None:
    seeds = {
        derive_seed(seed, purpose, block) for seed in range(3) for purpose in ("order", "noise") for block in range(20)
    }
    assert len(seeds) == 3 * 2 * 20
    assert all(0 <= seed < 1 << 63 for seed in seeds)


def test_a_generator_does_not_depend_on_what_was_drawn_before() -> None:
    first = torch.rand(4, generator=generator(7, "order", 3))
    torch.rand(100)
    assert torch.equal(torch.rand(4, generator=generator(7, "order", 3)), first)
    assert not torch.equal(torch.rand(4, generator=generator(7, "order", 4)), first)
