"""Low-rank adapters on a packed model: trained alone, kept beside the packed weights, active where it is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from eqat_mm.checkpoint import adapters
from eqat_mm.checkpoint.adapters import ADAPTER, adapter_parameters, add_adapters
from eqat_mm.checkpoint.read import load
from eqat_mm.checkpoint.verify import verify_checkpoint
from eqat_mm.checkpoint.write import save_like
from eqat_mm.errors import CheckpointError, ConfigError
from eqat_mm.quant.packed_linear import PackedLinear
from eqat_mm.train.e2e_qp import E2EQPConfig, run_e2e_qp
from eqat_mm.train.end_to_end import WindowDataset, training_arguments
from eqat_mm.train.lora import LoRA
from tests.checkpoint.files import assert_four_lines, same_bytes, tensors_of
from tests.tolerances import assert_close
from tests.train.problems import CPU
from tests.train.stopping import Stopped, stop_at_step

pytest.importorskip("peft")

TOKENS = torch.tensor([[2, 3, 4, 5]])
CONFIG = E2EQPConfig(
    trains="lora",
    lora=LoRA(rank=4, alpha=8, learning_rate=5e-3),
    max_steps=4,
    batch_size=4,
    accumulation=1,
    logging_steps=1,
    save_steps=0,
    precision="float32",
)


def logits(model: transformers.PreTrainedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=TOKENS).logits
    return found


def adapted(packed: Path) -> transformers.PreTrainedModel:
    model = load(packed)
    add_adapters(model, CONFIG.lora.rank, CONFIG.lora.alpha, seed=0)
    return model


def train(windows: Tensor, packed: Path, folder: Path, config: E2EQPConfig = CONFIG) -> transformers.PreTrainedModel:
    model = adapted(packed)
    run_e2e_qp(model, WindowDataset(windows), config, training_arguments(config, folder, CPU), teacher=None)
    return model


@pytest.fixture(scope="module")
def trained(windows: Tensor, packed: Path, tmp_path_factory: pytest.TempPathFactory) -> transformers.PreTrainedModel:
    """Four steps; not to be altered."""
    return train(windows, packed, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def saved(trained: transformers.PreTrainedModel, packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its checkpoint; not to be altered."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_like(trained, folder, packed, "lora", {"config": {}})
    return folder


def test_new_adapters_add_nothing_and_depend_on_the_seed(packed: Path) -> None:
    model, again, other = adapted(packed), adapted(packed), load(packed)
    assert torch.equal(logits(model), logits(load(packed)))
    add_adapters(other, CONFIG.lora.rank, CONFIG.lora.alpha, seed=1)
    first, same, different = (adapter_parameters(each)[0] for each in (model, again, other))
    assert torch.equal(first, same)
    assert not torch.equal(first, different)


def test_an_adapter_adds_its_product_to_the_packed_linear(packed: Path) -> None:
    model = adapted(packed)
    module = model.get_submodule("model.layers.1.mlp.down_proj")
    factor_a, factor_b = module.lora_A["default"].weight, module.lora_B["default"].weight
    with torch.no_grad():
        factor_b.normal_(generator=torch.Generator().manual_seed(0))
        x = torch.randn(3, factor_a.shape[1], generator=torch.Generator().manual_seed(1))
        weight = module.base_layer.dequantize() + 8 / 4 * factor_b @ factor_a
        assert_close(module(x), x @ weight.T, "matmul")


def test_only_adapters_are_trained(trained: transformers.PreTrainedModel, packed: Path) -> None:
    names = {name for name, parameter in trained.named_parameters() if parameter.requires_grad}
    linears = [path for path, module in trained.named_modules() if isinstance(module, PackedLinear)]
    stems = {path.removesuffix(".base_layer") for path in linears}
    assert names == {f"{stem}.lora_{factor}.default.weight" for stem in stems for factor in "AB"}
    before = adapted(packed).state_dict()
    after = trained.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == names


def test_the_checkpoint_is_the_base_with_adapters_beside(saved: Path, packed: Path) -> None:
    before, after = tensors_of(packed), tensors_of(saved)
    assert before.keys() == after.keys()
    assert all(same_bytes(before[name], after[name]) for name in before)
    manifest = verify_checkpoint(saved)
    assert manifest.stage == "lora"
    assert {name for name in manifest.files if name.startswith(f"{ADAPTER}/")} == {
        f"{ADAPTER}/adapter_config.json",
        f"{ADAPTER}/adapter_model.safetensors",
    }


def test_loading_brings_the_adapters_back(trained: transformers.PreTrainedModel, saved: Path, packed: Path) -> None:
    loaded = load(saved)
    assert torch.equal(logits(loaded), logits(trained))
    assert not torch.equal(logits(loaded), logits(load(packed)))
    assert not any(parameter.requires_grad for parameter in adapter_parameters(loaded))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21 asks transformers for it
def test_peft_itself_reads_the_adapters(trained: transformers.PreTrainedModel, saved: Path, packed: Path) -> None:
    from peft import LoraConfig, PeftModel

    from eqat_mm.quant.packed_lora import PackedLoRA

    config = LoraConfig.from_pretrained(str(saved / ADAPTER))
    config._register_custom_module({PackedLinear: PackedLoRA})
    model = PeftModel.from_pretrained(load(packed), str(saved / ADAPTER), config=config)
    assert torch.equal(logits(model), logits(trained))


def test_an_altered_adapter_is_refused(trained: transformers.PreTrainedModel, packed: Path, tmp_path: Path) -> None:
    save_like(trained, tmp_path / "model", packed, "lora", {"config": {}})
    file = tmp_path / "model" / ADAPTER / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(CheckpointError, match="sha256") as raised:
        load(tmp_path / "model")
    assert_four_lines(raised.value)


def test_a_stopped_run_ends_as_an_uninterrupted_one(
    windows: Tensor,
    packed: Path,
    trained: transformers.PreTrainedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = stop_at_step(monkeypatch, 3)
    config = replace(CONFIG, save_steps=2)
    with pytest.raises(Stopped):
        train(windows, packed, tmp_path, config)
    model = train(windows, packed, tmp_path, config)
    assert len(steps) == 3 + 2
    for left, right in zip(adapter_parameters(model), adapter_parameters(trained), strict=True):
        assert torch.equal(left, right)


def test_adapters_on_adapters_are_refused(saved: Path) -> None:
    with pytest.raises(ConfigError, match="already") as raised:
        add_adapters(load(saved), 4, 8, seed=0)
    assert_four_lines(raised.value)


def test_without_peft_the_message_says_how_to_install_it(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"eqat-mm\[peft\]") as raised:
        add_adapters(load(packed), 4, 8, seed=0)
    assert_four_lines(raised.value)


@pytest.mark.parametrize("field", ["rank", "alpha", "learning_rate"])
def test_settings_out_of_range_are_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=field) as raised:
        LoRA(**{field: 0})
    assert_four_lines(raised.value)
