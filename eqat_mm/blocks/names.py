"""Names of tensors: in published files, which stay as they are, and of modules, which change with transformers.

The rules are the library's own, those of `from_pretrained`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, apply_renamings, rename_source_key

from eqat_mm.blocks.experts import LAYOUT, split_experts


def module_names(model: PreTrainedModel) -> Callable[[str], str]:
    """Return the function from the name of a tensor in published files to its name in `model`.

    A tensor that transformers merges with others keeps its name, unless `model` has the linear of an expert for it.
    """
    rules = _Rules(model)

    def rename(stored: str) -> str:
        renamed = rules.renamed(stored)
        names = [rules.in_model(name) for name in (renamed, *rules.of_expert(renamed), stored)]
        return next((name for name in names if name in rules.known), names[0])

    return rename


def published_names(model: PreTrainedModel) -> Callable[[str], str]:
    """Return the function from the name of a tensor in files to the one that published files of `model` have for it.

    What transformers 5 saves is a mixture of both kinds of names, and a model that was saved without its head lacks a
    prefix; engines and older readers know the published names only.
    """
    rules, in_model = _Rules(model), module_names(model)

    def publish(stored: str) -> str:
        name = in_model(stored)
        published = rules.published(rules.of_files(stored, name))
        return published if in_model(published) == name else stored

    return publish


def merged_names(model: PreTrainedModel) -> Callable[[str], list[str]]:
    """Return the function from the name of a tensor in published files to those that transformers makes of it.

    None of a tensor that is read as it is stored.
    """
    rules = _Rules(model)

    def made_of(stored: str) -> list[str]:
        rule, _, name = rules.merging(rules.renamed(stored))
        name = rules.in_model(name)
        if rule is None or name not in rules.known:
            return []
        return [name.replace(rule.target_patterns[0], target) for target in rule.target_patterns]

    return made_of


def split_as_stored(model: PreTrainedModel, weights: Iterable[str]) -> None:
    """Replace those merged experts of a model of which files hold one linear each.

    Args:
        model: as transformers builds it.
        weights: names in the files.

    Raises:
        AdapterError: experts that are laid out in another way.
    """
    made_of = merged_names(model)
    split_experts(model, {name.rpartition(".")[0] for stored in weights for name in made_of(stored)})


class _Rules:
    """What transformers does to names when it reads files into `model`."""

    def __init__(self, model: PreTrainedModel) -> None:
        rules = get_model_conversion_mapping(model)
        self.known, self._prefix = model.state_dict(), model.base_model_prefix
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        kept = get_model_conversion_mapping(model, add_legacy=False)
        back = (rule.reverse_transform() for rule in kept[::-1] if isinstance(rule, WeightRenaming))
        self._back = [rule for rule in back if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]

    def of_files(self, stored: str, name: str) -> str:
        """Return the tensor `name` of the model as it is called before merging: as files call it, if it is merged."""
        renamed = self.renamed(stored)
        if self.merging(renamed)[0] is None:
            return name
        inside = name.startswith(f"{self._prefix}.") and not renamed.startswith(f"{self._prefix}.")
        return f"{self._prefix}.{renamed}" if inside else renamed

    def published(self, name: str) -> str:
        """Return what published files call a tensor of the model."""
        return apply_renamings(name, self._back)

    def renamed(self, stored: str) -> str:
        """Return a name in files with renamed modules; whether the model is inside another one, it does not say."""
        return rename_source_key(stored, self._renamings, [])[0]

    def in_model(self, name: str) -> str:
        """Return the name with the model's prefix, or without, as the model has it."""
        return rename_source_key(name, [], [], self._prefix, self.known)[0]

    def merging(self, renamed: str) -> tuple[WeightConverter | None, int, str]:
        """Return the rule by which a tensor is merged with others, its place among them, and the name of the result."""
        for rule in self._converters:
            name, pattern = rule.rename_source_key(renamed)
            if pattern is not None:
                return rule, rule.source_patterns.index(pattern), name
        return None, 0, renamed

    def of_expert(self, renamed: str) -> list[str]:
        """Return how `experts.SplitExperts` calls a tensor, if it is one of an expert."""
        rule, place, merged = self.merging(renamed)
        path, _, parameter = merged.rpartition(".")
        numbers = re.findall(r"(?<=\.)\d+(?=\.)", renamed)
        linears = LAYOUT.get(parameter, ())
        if rule is None or not numbers or len(rule.source_patterns) != len(linears):
            return []
        return [f"{path}.{numbers[-1]}.{linears[place]}.weight"]
