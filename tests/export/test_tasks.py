"""Tasks of one base, exported into every format, as readers of these formats that know nothing of tasks read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import eqat_mm
from eqat_mm import adapters
from eqat_mm.checkpoint.step_sizes import read_step_sizes
from eqat_mm.cli import main
from eqat_mm.export.gguf.language import row_order
from eqat_mm.export.gguf.names import gguf_name
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.files import read_json
from tests.checkpoint.foreign import foreign, packed_linears
from tests.export.foreign_layouts import Grid, from_gptq, from_matmul_nbits, from_mlx
from tests.export.made import packed, packed_llava
from tests.export.weights import arrays

BITS, GROUP, HEAD = 4, 32, 16
Weights = dict[str, Tensor]
"""Of the quantized linears, by their paths, float32 [O, I]."""


@dataclass(frozen=True)
class Task:
    """A base with a task applied, and the weights that a model has in memory once it is switched to the task."""

    folder: Path
    weights: Weights
    file: Path


@torch.no_grad()
def of_transformers(folder: Path, paths: Mapping[str, Tensor]) -> Weights:
    """Return what `from_pretrained` gives, after a forward, before which it may still be packed."""
    model = foreign(folder)
    model(input_ids=torch.tensor([[5, 6]]))
    return {path: model.get_parameter(f"{path}.weight").detach() for path in paths}


def of_gguf(folder: Path, paths: Mapping[str, Tensor]) -> Weights:
    tensors = {one.name: one for file in folder.glob("*.gguf") for one in gguf.GGUFReader(file).tensors}
    found = {}
    for path in paths:
        one = tensors[str(gguf_name(f"{path}.weight"))]
        value = torch.from_numpy(gguf.quants.dequantize(one.data, one.tensor_type).copy())
        order = row_order(f"{path}.weight", len(value), HEAD)
        found[path] = value if order is None else value[order.argsort()]
    return found


def by_numpy(read: Callable[[Any], Grid]) -> Callable[[Path, Mapping[str, Tensor]], Weights]:
    def weights(folder: Path, paths: Mapping[str, Tensor]) -> Weights:
        tensors = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
        found = {}
        for path in paths:
            own = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{path}.")}
            grid = read(arrays(own))
            found[path] = torch.from_numpy(((grid.codes - grid.zeros) * grid.steps).astype(np.float32))
        return found

    return weights


READERS: dict[str, Callable[[Path, Mapping[str, Tensor]], Weights]] = {
    "gguf": of_gguf,
    "mlx": by_numpy(lambda tensors: from_mlx(tensors, BITS, GROUP)),
    "onnx": by_numpy(lambda tensors: from_matmul_nbits(tensors, BITS, GROUP)),
    "gptq": by_numpy(lambda tensors: from_gptq(tensors, BITS)),
}
EXACT = [("symmetric", "gguf"), ("asymmetric", "mlx"), ("asymmetric", "onnx"), ("asymmetric", "gptq")]


def saved(base: Path, folder: Path, seed: int, **parts: bool) -> Path:
    """Return a task whose step sizes, and projector, differ from those of the base, each by a factor of its own."""
    model, draw = eqat_mm.load(base), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        trained = [*eqat_mm.train_only(model), *(model.model.multi_modal_projector.parameters() if parts else ())]
        for parameter in trained:
            parameter.mul_(0.75 + torch.rand(parameter.shape, generator=draw))
    return adapters.save(model, folder / f"task-{seed}.safetensors", **parts)


def applied(base: Path, file: Path) -> Task:
    model, whole = eqat_mm.load(base), file.with_suffix("")
    adapters.switch(model, adapters.add(model, file))
    weights = {path: linear.dequantize(torch.float32).detach() for path, linear in packed_linears(model).items()}
    assert main(["adapter", "apply", str(base), str(file), "--output", str(whole)]) == 0
    return Task(whole, weights, file)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Task]]:
    """Two tasks of a base, by its grid."""
    found = {}
    for grid in ("symmetric", "asymmetric"):
        folder = tmp_path_factory.mktemp(grid)
        base = packed(folder, QuantSpec(BITS, GROUP, symmetric=grid == "symmetric"))
        found[grid] = [applied(base, saved(base, folder, seed)) for seed in (1, 2)]
    return found


@pytest.mark.parametrize("grid", ["symmetric", "asymmetric"])
def test_transformers_reads_the_weights_of_a_task(grid: str, tasks: dict[str, list[Task]]) -> None:
    one, two = (task.weights for task in tasks[grid])
    assert len(one) == 14
    assert all(not torch.equal(one[path], two[path]) for path in one)
    for task in tasks[grid]:
        entry = read_json(task.folder / "config.json")["quantization_config"]
        dtype = torch.bfloat16 if entry.get("dequantize") else torch.float32  # of the step sizes, in which it rounds
        assert_same(
            of_transformers(task.folder, one), {path: each.to(dtype).float() for path, each in task.weights.items()}
        )


@pytest.mark.parametrize(("grid", "form"), EXACT)
def test_an_export_has_the_weights_of_its_task(
    grid: str, form: str, tasks: dict[str, list[Task]], tmp_path: Path
) -> None:
    for number, task in enumerate(tasks[grid]):
        out = tmp_path / str(number)
        assert main(["export", str(task.folder), "--to", form, "--output", str(out)]) == 0
        assert_same(READERS[form](out / "model", task.weights), task.weights)


def test_the_card_names_base_and_task(tasks: dict[str, list[Task]], tmp_path: Path) -> None:
    task, _ = tasks["symmetric"]
    assert main(["export", str(task.folder), "--to", "gguf", "--output", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "model" / "README.md").read_text(encoding="utf-8")
    assert "`--action apply --paths model task-1.safetensors`" in card


def test_a_task_without_its_base_is_refused(
    tasks: dict[str, list[Task]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task, _ = tasks["symmetric"]
    assert main(["export", str(task.file), "--to", "gguf", "--output", str(tmp_path / "out")]) == 2
    assert "eqat adapter apply" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_export_has_the_projector_of_its_task(tmp_path: Path) -> None:
    base = packed_llava(tmp_path, QuantSpec(BITS, GROUP, symmetric=True))
    task = applied(base, saved(base, tmp_path, 1, projector=True))
    assert main(["export", str(task.folder), "--to", "gguf", "--output", str(tmp_path / "out")]) == 0
    trained = read_step_sizes(task.file).tensors["model.multi_modal_projector.linear_1.weight"]
    (seen,) = (tmp_path / "out" / "model").glob("mmproj*.gguf")
    (held,) = (one for one in gguf.GGUFReader(seen).tensors if one.name == "mm.0.weight")
    values = torch.from_numpy(gguf.quants.dequantize(held.data, held.tensor_type).copy())
    assert torch.equal(values, trained.float())


def assert_same(found: Weights, expected: Weights) -> None:
    for path, weight in expected.items():
        assert torch.equal(found[path], weight), path
