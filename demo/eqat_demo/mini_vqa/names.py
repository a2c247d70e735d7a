"""Names of things: "small red circle", "large thing", and what they fit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product

from eqat_demo.mini_vqa.scenes import ATTRIBUTES, VALUES, Scene, Thing


@dataclass(frozen=True)
class Name:
    """Some attributes of a thing; what is None is left open."""

    size: str | None = None
    colour: str | None = None
    shape: str | None = None

    @cached_property
    def says(self) -> tuple[str, ...]:
        """Which attributes it tells."""
        return tuple(each for each in ATTRIBUTES if getattr(self, each) is not None)

    def fits(self, thing: Thing) -> bool:
        """Whether a thing may be called so."""
        return all(getattr(self, each) == getattr(thing, each) for each in self.says)

    def among(self, things: Iterable[Thing]) -> list[Thing]:
        """Return those that it fits."""
        return [thing for thing in things if self.fits(thing)]

    @property
    def one(self) -> str:
        """For one thing."""
        return " ".join(filter(None, (self.size, self.colour, self.shape or "thing")))

    @property
    def many(self) -> str:
        """For several."""
        return f"{self.one}{'es' if self.shape == 'cross' else 's'}"


NAMES = tuple(Name(*each) for each in product(*((None, *VALUES[attribute]) for attribute in ATTRIBUTES)))[1:]
"""All names that say something."""


@lru_cache(maxsize=1)  # most families ask about the same scene in turn
def named(scene: Scene) -> list[tuple[Name, list[Thing]]]:
    """Return every name with the things of a scene that it fits."""
    return [(name, name.among(scene.things)) for name in NAMES]


def names_of_one(scene: Scene) -> list[tuple[Name, Thing]]:
    """Return the names that fit exactly one thing of a scene, with that thing."""
    return [(name, things[0]) for name, things in named(scene) if len(things) == 1]
