"""A loaded model keeps the contract of its class: `save_pretrained` and `push_to_hub` write a packed folder."""

from __future__ import annotations

import copy
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import eqat_mm
from eqat_mm.blocks.source import INDEX, open_model
from eqat_mm.checkpoint import read_manifest, verify_checkpoint
from eqat_mm.checkpoint.adapters import add_adapters
from eqat_mm.errors import CheckpointError
from eqat_mm.quant.packed_linear import PackedLinear
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.runtime.files import read_json
from eqat_mm.train.llm_qat import LLMQATConfig, prepare, store
from eqat_mm.train.rtn import run_rtn
from llava_adapters import arch_for
from tests.checkpoint.conftest import PROVENANCE, Pack, save_llama
from tests.checkpoint.files import assert_four_lines, contents, same_weights, tensors_of
from tests.checkpoint.foreign import assert_read_alike, foreign, logits_of
from tests.tiny_llava import save_tiny_llava
from tests.tiny_model import word_tokenizer

SPEC = QuantSpec(3, 32)


@torch.no_grad()
def train(model: nn.Module) -> None:
    """Change every step size, as training does, to numbers that their storage dtype has not."""
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.weight_scale.mul_(1.2345)


@torch.no_grad()
def rounded(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Logits with the step sizes as they are stored."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, PackedLinear):
            module.round_scales()
    return logits_of(twin, inputs)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("trained", [True, False])
def test_saved_and_loaded_by_us_and_by_others(
    pack: Pack, tokens: Tensor, tmp_path: Path, changes: dict[str, Any], symmetric: bool, trained: bool
) -> None:
    spec, inputs = QuantSpec(3, 32, symmetric), {"input_ids": tokens}
    base = pack(spec, **changes)
    model = eqat_mm.load(base)
    if trained:
        train(model)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(eqat_mm.load(tmp_path / "saved"), inputs), rounded(model, inputs))
    assert_read_alike(tmp_path / "saved", spec, inputs)
    assert same_weights(base, tmp_path / "saved") != trained
    manifest = verify_checkpoint(tmp_path / "saved")
    assert [stage["command"] for stage in manifest.provenance] == [PROVENANCE["command"], "save_pretrained"]
    assert manifest.stage == read_manifest(base).stage
    assert contents(base).keys() == contents(tmp_path / "saved").keys()


def test_what_came_with_the_model_comes_along(tmp_path: Path) -> None:
    save_llama(tmp_path / "full")
    word_tokenizer().save_pretrained(tmp_path / "full")
    run_rtn(open_model(tmp_path / "full", arch_for("llama")), SPEC, tmp_path, source="tiny", provenance={})
    eqat_mm.load(tmp_path / "model").save_pretrained(tmp_path / "saved")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"):
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")) == 97


@pytest.mark.parametrize("fate", ["deleted", "moved", "replaced"])
def test_the_checkpoint_that_was_loaded_is_gone(pack: Pack, tokens: Tensor, tmp_path: Path, fate: str) -> None:
    base, inputs = tmp_path / "model", {"input_ids": tokens}
    shutil.copytree(pack(), base)
    model = eqat_mm.load(base)
    train(model)
    if fate == "moved":
        base.rename(tmp_path / "elsewhere")
    else:
        shutil.rmtree(base)
    if fate == "replaced":
        shutil.copytree(pack(QuantSpec(2, 64)), base)
    with pytest.warns(UserWarning, match="saved without tokenizer"):
        model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(eqat_mm.load(tmp_path / "saved"), inputs), rounded(model, inputs))
    assert torch.equal(logits_of(foreign(tmp_path / "saved"), inputs), logits_of(foreign_of(model, tmp_path), inputs))
    before, after = tensors_of(pack()), tensors_of(tmp_path / "saved")
    assert {name: tensor.dtype for name, tensor in before.items()} == {n: t.dtype for n, t in after.items()}


def foreign_of(model: Any, scratch: Path) -> nn.Module:
    """The model as transformers reads it after a second saving."""
    with pytest.warns(UserWarning, match="saved without tokenizer"):
        model.save_pretrained(scratch / "again")
    return foreign(scratch / "again")


def test_into_the_folder_that_was_loaded(pack: Pack, tokens: Tensor, tmp_path: Path) -> None:
    folder, inputs = tmp_path / "model", {"input_ids": tokens}
    shutil.copytree(pack(), folder)
    (folder / "README.md").write_text("mine")
    model = eqat_mm.load(folder)
    train(model)
    model.save_pretrained(folder)
    assert torch.equal(logits_of(eqat_mm.load(folder), inputs), rounded(model, inputs))
    assert (folder / "README.md").read_text() == "mine"
    assert sorted(contents(folder)) == sorted([*contents(pack()), "README.md"])
    model.save_pretrained(folder)
    assert [stage["command"] for stage in verify_checkpoint(folder).provenance[1:]] == ["save_pretrained"] * 2
    assert torch.equal(logits_of(eqat_mm.load(folder), inputs), rounded(model, inputs))


def test_another_checkpoint_is_replaced_and_leaves_nothing(pack: Pack, tmp_path: Path) -> None:
    shutil.copytree(pack(SPEC, num_hidden_layers=3), tmp_path / "saved")
    eqat_mm.load(pack()).save_pretrained(tmp_path / "saved")
    assert contents(tmp_path / "saved").keys() == contents(pack()).keys()
    verify_checkpoint(tmp_path / "saved")


def test_a_full_precision_model_is_not_overwritten(pack: Pack, tmp_path: Path) -> None:
    save_llama(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="no packed checkpoint") as caught:
        eqat_mm.load(pack()).save_pretrained(tmp_path)
    assert_four_lines(caught.value)
    assert contents(tmp_path) == before


def test_a_failure_midway_leaves_the_folder_as_it_was(
    pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(pack(), tmp_path / "saved")
    before = contents(tmp_path / "saved")

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    model = eqat_mm.load(pack())
    monkeypatch.setattr("eqat_mm.checkpoint.write.seal", full)
    with pytest.raises(OSError, match="no space left"):
        model.save_pretrained(tmp_path / "saved")
    assert contents(tmp_path / "saved") == before


def test_changes_of_the_configuration_are_saved(pack: Pack, tmp_path: Path) -> None:
    model: Any = eqat_mm.load(pack())
    model.config.rope_parameters = model.config.rope_parameters | {"rope_theta": 5e5}
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "saved")
    config, before = read_json(tmp_path / "saved" / "config.json"), read_json(pack() / "config.json")
    assert config["rope_parameters"]["rope_theta"] == 5e5
    assert {key for key in config if config[key] != before.get(key)} == {"rope_parameters", "rope_theta"}
    assert eqat_mm.load(tmp_path / "saved").generation_config.max_new_tokens == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_llava_is_saved_with_its_processor(tmp_path: Path, dtype: torch.dtype) -> None:
    batches = save_tiny_llava(tmp_path / "full", "llava", torch.float16)
    run_rtn(open_model(tmp_path / "full", arch_for("llava")), SPEC, tmp_path, source="tiny", provenance={})
    eqat_mm.load(tmp_path / "model", dtype=dtype).save_pretrained(tmp_path / "saved")
    assert same_weights(tmp_path / "model", tmp_path / "saved")
    assert_read_alike(tmp_path / "saved", SPEC, batches[0])
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "saved")
    assert processor.chat_template == transformers.AutoProcessor.from_pretrained(tmp_path / "full").chat_template


@pytest.mark.parametrize("bits", ["4-8-4", "8-8-8"])
def test_a_model_of_llm_qat(tmp_path: Path, tokens: Tensor, bits: str) -> None:
    save_llama(tmp_path / "full")
    config = LLMQATConfig(bits=bits, max_steps=0)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "full", dtype=torch.float32)
    prepare(model, arch_for("llama"), config)
    opened = open_model(tmp_path / "full", arch_for("llama"))
    store(model, opened, config, tmp_path / "model", source="tiny", provenance=PROVENANCE)
    loaded = eqat_mm.load(tmp_path / "model")
    train(loaded)
    loaded.save_pretrained(tmp_path / "saved")
    again = eqat_mm.load(tmp_path / "saved")
    assert torch.equal(logits_of(again, {"input_ids": tokens}), rounded(loaded, {"input_ids": tokens}))
    assert read_manifest(tmp_path / "saved").widths.name == bits


def test_adapters_lie_beside(pack: Pack, tokens: Tensor, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model, inputs = eqat_mm.load(pack()), {"input_ids": tokens}
    add_adapters(model, rank=4, alpha=8, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "saved")
    assert same_weights(pack(), tmp_path / "saved")
    again = eqat_mm.load(tmp_path / "saved")
    assert torch.equal(logits_of(again, inputs), logits_of(model, inputs))
    assert not torch.equal(logits_of(again, inputs), logits_of(eqat_mm.load(pack()), inputs))
    again.save_pretrained(tmp_path / "twice")
    assert torch.equal(logits_of(eqat_mm.load(tmp_path / "twice"), inputs), logits_of(model, inputs))


class Uploads:
    """Stands in for the API of the hub, and nothing else: it keeps what it is given to upload."""

    def __init__(self, keep: Path) -> None:
        self.keep = keep
        self.repository = ""

    def create_repo(self, repo_id: str, **_: Any) -> Any:
        self.repository = repo_id
        return type("Url", (), {"repo_id": repo_id})

    def create_commit(self, *, operations: list[Any], **_: Any) -> str:
        for operation in operations:
            target = self.keep / operation.path_in_repo
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(operation.path_or_fileobj, target)
        return "done"


@pytest.mark.parametrize("how", ["push_to_hub", "save_pretrained"])
def test_what_is_uploaded_is_the_packed_folder(
    pack: Pack, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    uploads = Uploads(tmp_path / "hub")
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda *_, **__: uploads)
    card = type("Card", (), {"save": lambda self, path: Path(path).write_text("card")})
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: card())
    model: Any = eqat_mm.load(pack())
    train(model)
    if how == "push_to_hub":
        model.push_to_hub("me/packed")
    else:
        model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="me/packed", private=True)
    assert uploads.repository == "me/packed"
    assert (tmp_path / "hub" / "README.md").read_text() == "card"
    loaded = eqat_mm.load(tmp_path / "hub")
    assert torch.equal(logits_of(loaded, {"input_ids": tokens}), rounded(model, {"input_ids": tokens}))


def test_a_trainer_gets_the_tensors_as_they_are(pack: Pack, tmp_path: Path) -> None:
    model: Any = eqat_mm.load(pack())
    train(model)
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    assert not (tmp_path / INDEX).exists()
    stored = tensors_of(tmp_path)
    assert all(torch.equal(stored[name], tensor) for name, tensor in model.state_dict().items())


def test_of_several_processes_one_writes(pack: Pack, tmp_path: Path) -> None:
    eqat_mm.load(pack()).save_pretrained(tmp_path / "saved", is_main_process=False)
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_save_themselves(pack: Pack, tokens: Tensor, tmp_path: Path, copied: Any) -> None:
    model = eqat_mm.load(pack())
    twin = copied(model)
    train(twin)
    twin.save_pretrained(tmp_path / "saved")
    assert torch.equal(
        logits_of(eqat_mm.load(tmp_path / "saved"), {"input_ids": tokens}), rounded(twin, {"input_ids": tokens})
    )


def test_it_shows_the_class_of_transformers(pack: Pack) -> None:
    kind = type(eqat_mm.load(pack()))
    assert issubclass(kind, transformers.LlamaForCausalLM)
    assert str(kind) == str(transformers.LlamaForCausalLM)
    assert kind is type(eqat_mm.load(pack()))
