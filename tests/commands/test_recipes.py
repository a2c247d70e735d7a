"""Recipes by name, and the warning where there is none for a model."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from eqat_mm.commands.recipes import recipe_path, recipes, warn_without_recipe
from eqat_mm.errors import ConfigError
from tests.checkpoint.files import assert_four_lines


def test_a_recipe_is_found_by_name_and_by_path(tmp_path: Path) -> None:
    name, path = next(iter(recipes().items()))
    assert recipe_path(name) == path
    assert recipe_path(str(path)) == path
    own = tmp_path / "own.yaml"
    own.touch()
    assert recipe_path(str(own)) == own


def test_an_unknown_recipe_lists_the_shipped_ones() -> None:
    with pytest.raises(ConfigError) as raised:
        recipe_path("smollm3")
    assert_four_lines(raised.value)
    assert all(name in raised.value.allowed for name in recipes())


def test_no_warning_where_the_settings_are_for_the_model() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_without_recipe("llama-2-7b", ("llama-2-7b", "llama-2-13b"), "block-ap")


def test_the_papers_settings_on_another_model_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="the paper's, tuned for Llama-2 7B and up, not for my-model; watch the loss"):
        warn_without_recipe("my-model", (), "block-ap")


def test_settings_of_one_model_on_another_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="tuned for llama-2-7b, not for my-model"):
        warn_without_recipe("my-model", ("llama-2-7b",), "e2e-qp")


@pytest.mark.parametrize("command", ["block-ap", "e2e-qp"])
def test_the_warning_names_a_fitting_recipe(command: str) -> None:
    with pytest.warns(UserWarning, match=f"use --config smollm2-135m-w2g64-{command}"):
        warn_without_recipe("smollm2-135m", (), command)
