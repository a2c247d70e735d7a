"""What is on a picture, as pixels: the same on every machine, because nothing is smoothed and the font is built in."""

from __future__ import annotations

from functools import singledispatch

from PIL import Image, ImageDraw, ImageFont

from eqat_demo.mini_vqa.bars import Chart
from eqat_demo.mini_vqa.scenes import RADIUS, SIDE, SQUARE, Scene, Thing
from eqat_demo.mini_vqa.words import Written

PAPER = (240, 240, 240)
INK = {
    "black": (20, 20, 20),
    "blue": (30, 60, 220),
    "green": (20, 150, 40),
    "purple": (150, 40, 170),
    "red": (220, 30, 30),
    "yellow": (235, 195, 20),
}
_BAR_WIDTH = 10
_LETTER_WIDTH, _LETTER_TOP = SQUARE // 2, 2


@singledispatch
def drawn(content: object) -> Image.Image:
    """Return the picture of a scene, a chart or a word: RGB, `SIDE` pixels wide and high."""
    raise AssertionError(content)


@drawn.register
def _scene(content: Scene) -> Image.Image:
    picture, pen = _paper()
    for thing in content.things:
        _draw(pen, thing)
    return picture


@drawn.register
def _chart(content: Chart) -> Image.Image:
    picture, pen = _paper()
    for bar in content.bars:
        left = SQUARE * bar.column + (SQUARE - _BAR_WIDTH) // 2
        pen.rectangle((left, SIDE - bar.height, left + _BAR_WIDTH - 1, SIDE - 1), INK[bar.colour])
    return picture


@drawn.register
def _word(content: Written) -> Image.Image:
    picture, pen = _paper()
    font = ImageFont.load_default_imagefont()
    for place, letter in enumerate(content.word, content.column):
        pen.text((_LETTER_WIDTH * place + 1, SQUARE * content.row + _LETTER_TOP), letter, INK[content.colour], font)
    return picture


def _paper() -> tuple[Image.Image, ImageDraw.ImageDraw]:
    picture = Image.new("RGB", (SIDE, SIDE), PAPER)
    return picture, ImageDraw.Draw(picture)


def _draw(pen: ImageDraw.ImageDraw, thing: Thing) -> None:
    radius, ink, x, y = RADIUS[thing.size], INK[thing.colour], thing.x, thing.y
    left, top, right, bottom = x - radius, y - radius, x + radius, y + radius
    if thing.shape == "circle":
        pen.ellipse((left, top, right, bottom), ink)
    elif thing.shape == "square":
        pen.rectangle((left, top, right, bottom), ink)
    elif thing.shape == "triangle":
        pen.polygon(((x, top), (right, bottom), (left, bottom)), ink)
    else:
        arm = radius // 3
        pen.rectangle((x - arm, top, x + arm, bottom), ink)
        pen.rectangle((left, y - arm, right, y + arm), ink)
