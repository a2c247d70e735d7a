"""All commands: what each is for, and where its job is; nothing of them is imported before one is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        place: `module:dataclass:function` of its settings and of what does the job, below `eqat_mm.commands`.
        help: what it does, in a line.
        recipe: that lies beneath what is typed, of a command of the demo.
        settings_of: command whose recipes count; its own by default.
    """

    place: str
    help: str
    recipe: str | None = None
    settings_of: str | None = None

    def load(self) -> tuple[type[Any], Callable[[Any], Any]]:
        """Return the dataclass of its settings and the function that does the job."""
        home, job, function = self.place.split(":")
        module = import_module(f"eqat_mm.commands.{home}")
        return getattr(module, job), getattr(module, function)


COMMANDS: dict[str, Command] = {
    "demo": Command(
        "tables.ladder:LadderJob:ladder",
        "quantize SmolLM2-135M to 2 bits and print the ladder of stages",
        "smollm2-135m-w2g64-demo",
    ),
    "demo-vlm": Command(
        "tables.vlm_ladder:VLMLadderJob:vlm_ladder",
        "the same for a small LLaVA, with questions about images, scored by lmms-eval",
    ),
    "plan": Command(
        "verbs.plan:PlanJob:plan", "what a run will need: memory, disk, hours by phase", settings_of="block-ap"
    ),
    "allocate": Command(
        "verbs.allocate:AllocateJob:allocate", "choose the bits of each linear for the least damage within a budget"
    ),
    "quantize": Command(
        "tables.whole:QuantizeJob:quantize", "all of it: a plan, Block-AP, E2E-QP, an evaluation and one table"
    ),
    "block-ap": Command(
        "verbs.quantize:BlockAPJob:block_ap", "train W, s, z of one block at a time and write a packed checkpoint"
    ),
    "e2e-qp": Command("verbs.tune:E2EQPJob:e2e_qp", "train the step sizes of a packed checkpoint end to end"),
    "rtn": Command("verbs.quantize:RTNJob:rtn", "round to nearest: the baseline"),
    "llm-qat": Command(
        "verbs.llm_qat:LLMQATJob:llm_qat", "train all weights with weights, activations and KV cache quantized"
    ),
    "llm-qat-table": Command(
        "tables.llm_qat_table:LLMQATTableJob:llm_qat_table",
        "rounding, SmoothQuant and LLM-QAT at several bit widths: one table",
        "smollm2-135m-llm-qat-table",
    ),
    "eval": Command(
        "verbs.evaluate:EvalJob:evaluate", "perplexity on held-out text, KL and agreement with a reference"
    ),
    "generate": Command(
        "verbs.generate:GenerateJob:generate",
        "write text, about images if given, with a packed or full-precision model",
    ),
    "chat": Command("verbs.chat:ChatJob:chat", "talk with a model, about images if shown, line by line"),
    "generate-data": Command(
        "verbs.generate_data:GenerateDataJob:generate_data",
        "let a model write its own training text, in one or several processes",
    ),
    "report": Command(
        "verbs.report:ReportJob:report",
        "one page about a run, or all runs of a model: ladder, losses, grids, provenance",
    ),
    "export": Command(
        "verbs.export:ExportJob:export", "write a packed checkpoint as the files of another engine, such as llama.cpp"
    ),
    "verify": Command(
        "verbs.verify:VerifyJob:verify",
        "check a packed checkpoint, or an export of one: files, every weight, what was not to change, logits",
    ),
    "check-run": Command(
        "verbs.check_run:CheckRunJob:check_run",
        "compare a run, finished or not, with its plan and with what is published of the same run",
    ),
    "adapter": Command("verbs.adapter:AdapterJob:adapter", "tasks as small files of step sizes: save, apply, list"),
    "check-adapter": Command(
        "verbs.check_adapter:CheckAdapterJob:check_adapter",
        "try an adapter on a tiny model of its kind: what it declares, trains and writes",
    ),
    "prepare-data": Command(
        "verbs.prepare_data:PrepareDataJob:prepare_data",
        "look through conversations once: what is wrong, how long, an index of it",
    ),
    "recipes": Command(
        "verbs.recipe_list:RecipesJob:list_recipes",
        "list the shipped settings by family of models, or print those of a model",
    ),
    "assets": Command("verbs.assets:AssetsJob:assets", "list the short names of models and data, or fetch some"),
    "completion": Command(
        "verbs.completion:CompletionJob:completion",
        "print what bash or zsh needs to complete commands, options and values",
    ),
}
