"""The seven families of questions about a scene: what can be asked, with the answers.

Each function draws questions of one family, some of every kind; `balance` chooses among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import attrgetter
from random import Random

from eqat_demo.mini_vqa.asked import Asked
from eqat_demo.mini_vqa.names import Name, named, names_of_one
from eqat_demo.mini_vqa.scenes import ATTRIBUTES, COLOURS, SHAPES, Scene, Thing

MOST_COUNTED = 4
CLEARLY_NEARER = 6
"""Pixels: the next thing is at least so much further away than the nearest, and the furthest than the one before it."""

_DRAWS = 40
_ASKED = {"size": "What size is", "colour": "What colour is", "shape": "What shape is"}
_SIDES = {"left of": ("x", -1), "right of": ("x", 1), "above": ("y", -1), "below": ("y", 1)}
_ORDERS = {
    "left to right": ("x", False),
    "right to left": ("x", True),
    "top to bottom": ("y", False),
    "bottom to top": ("y", True),
}


def exist(scene: Scene, random: Random) -> Iterator[Asked]:
    """Is there such a thing?"""
    for name, things in named(scene):
        yield _asked("exist", name.says, f"Is there a {name.one}?", _yes(bool(things)))


def count(scene: Scene, random: Random) -> Iterator[Asked]:
    """How many are there?"""
    for name, things in named(scene):
        if len(things) <= MOST_COUNTED and len(name.says) < len(ATTRIBUTES):
            yield _asked("count", name.says, f"How many {name.many} are there?", str(len(things)))


def compare(scene: Scene, random: Random) -> Iterator[Asked]:
    """Are there more of these than of those?"""
    for names in ([Name(colour=each) for each in COLOURS], [Name(shape=each) for each in SHAPES]):
        for _ in range(_DRAWS // 2):
            one, other = random.sample(names, 2)
            here, there = (len(name.among(scene.things)) for name in (one, other))
            if here or there:
                yield from _compared(one, other, here, there)


def _compared(one: Name, other: Name, here: int, there: int) -> Iterator[Asked]:
    for words, right in (
        ("more {} than", here > there),
        ("fewer {} than", here < there),
        ("as many {} as", here == there),
    ):
        question = f"Are there {words.format(one.many)} {other.many}?"
        yield _asked("compare", (words[:2], *one.says), question, _yes(right))


def query(scene: Scene, random: Random) -> Iterator[Asked]:
    """What is the third attribute of the one thing of that name?"""
    for name, thing in names_of_one(scene):
        for attribute in ATTRIBUTES:
            if attribute not in name.says:
                question = f"{_ASKED[attribute]} the {name.one}?"
                yield _asked("query", (attribute, *name.says), question, getattr(thing, attribute))


def relate(scene: Scene, random: Random) -> Iterator[Asked]:
    """What is the colour or shape of the only one, of several such things, on that side of another?"""
    places = names_of_one(scene)
    for _ in range(_DRAWS * 3 if places else 0):
        (reference, place), side = random.choice(places), random.choice(list(_SIDES))
        attribute = random.choice(("colour", "shape"))
        name = random.choice([Name(), Name(), *_alike(scene, attribute)])
        several = name.among(each for each in scene.things if each != place)
        there = [each for each in several if is_beside(each, side, place)]
        if len(several) > 1 and len(there) == 1:
            question = f"{_ASKED[attribute]} the {name.one} {side} the {reference.one}?"
            yield _asked("relate", (attribute, *name.says), question, getattr(there[0], attribute))


def _alike(scene: Scene, attribute: str) -> list[Name]:
    """Return names of one attribute, another than that, of the things in a scene."""
    others = [each for each in ATTRIBUTES if each != attribute]
    return [Name(**{each: getattr(thing, each)}) for thing in scene.things for each in others]


def is_beside(thing: Thing, side: str, place: Thing) -> bool:
    """Whether a thing is `left of`, `right of`, `above` or `below` another."""
    axis, sign = _SIDES[side]
    return bool(sign * (getattr(thing, axis) - getattr(place, axis)) > 0)


def nearest(scene: Scene, random: Random) -> Iterator[Asked]:
    """Which thing is nearest to another, or furthest from it? None where two are about as far."""
    for reference, place in names_of_one(scene):
        others = sorted((each for each in scene.things if each != place), key=place.distance)
        far = [each.distance(place) for each in others]
        for words, found, clear in (
            ("nearest to", others[0], far[1] - far[0]),
            ("furthest from", others[-1], far[-1] - far[-2]),
        ):
            if clear >= CLEARLY_NEARER:
                answer = f"{found.colour} {found.shape}"
                yield _asked("nearest", (words,), f"What is {words} the {reference.one}?", answer)


def in_order(scene: Scene, random: Random) -> Iterator[Asked]:
    """What are the colours or shapes of all things, one after the other?"""
    for words, (axis, backwards) in _ORDERS.items():
        ordered = sorted(scene.things, key=attrgetter(axis), reverse=backwards)
        for attribute in ("colour", "shape"):
            answer = ", ".join(getattr(thing, attribute) for thing in ordered)
            yield _asked("list", (attribute, words), f"List the {attribute}s from {words}.", answer)


FAMILIES: dict[Callable[[Scene, Random], Iterator[Asked]], int] = {
    exist: 2,
    count: 3,
    compare: 2,
    query: 2,
    relate: 2,
    nearest: 1,
    in_order: 1,
}
"""The families, and how many questions of each a scene is asked."""


def _asked(family: str, form: tuple[str, ...], question: str, answer: str) -> Asked:
    return Asked(family, "/".join((family, *form)), question, answer)


def _yes(right: bool) -> str:
    return "yes" if right else "no"
