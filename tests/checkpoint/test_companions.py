"""What is copied beside the weights: files by name, from the folder itself."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import transformers

from eqat_mm.blocks.source import open_model
from eqat_mm.checkpoint.companions import copy_companions
from eqat_mm.quant.spec import QuantSpec
from eqat_mm.train.rtn import run_rtn
from llava_adapters import arch_for
from tests.checkpoint.conftest import save_llama
from tests.checkpoint.files import contents
from tests.checkpoint.foreign import foreign
from tests.tiny_model import word_tokenizer


def test_all_chat_templates_come_along_and_a_leftover_adapter_does_not(tmp_path: Path) -> None:
    full, packed = tmp_path / "full", tmp_path / "model"
    save_llama(full)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    tokenizer.save_pretrained(full)
    (full / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "elsewhere"}')
    (full / "adapter_model.safetensors").write_bytes(b"x")
    run_rtn(open_model(full, arch_for("llama")), QuantSpec(), tmp_path, source="tiny", provenance={})
    assert transformers.AutoTokenizer.from_pretrained(packed).chat_template == tokenizer.chat_template
    assert not list(packed.glob("adapter*"))
    assert foreign(packed).config.hidden_size == 64


def test_links_out_of_the_folder_and_what_is_no_file(tmp_path: Path) -> None:
    source, secret = tmp_path / "source", tmp_path / "secret"
    source.mkdir()
    secret.write_text("secret")
    (source / "vocab.json").symlink_to(secret)
    (source / "vocab.txt").symlink_to("../secret")
    (source / "LICENSE").symlink_to("/dev/full")
    (source / "merges.txt").symlink_to("nowhere")
    os.mkfifo(source / "tokenizer.json")
    (source / "tokenizer_config.json").write_text("{}")
    (source / "special_tokens_map.json").symlink_to("tokenizer_config.json")
    (source / "additional_chat_templates").symlink_to(tmp_path)
    (tmp_path / "x.jinja").write_text("secret")
    with pytest.warns(UserWarning, match="is not copied") as caught:
        copy_companions(source, tmp_path / "copy")
    assert len(caught) == 6
    assert contents(tmp_path / "copy") == {"tokenizer_config.json": b"{}", "special_tokens_map.json": b"{}"}


def test_the_cache_of_the_hub_links_to_its_own_files(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--me--tiny" / "snapshots" / "0123", tmp_path / "models--me--tiny" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "89ab").write_text(json.dumps({}))
    (snapshot / "tokenizer.json").symlink_to("../../blobs/89ab")
    copy_companions(snapshot, tmp_path / "copy")
    assert contents(tmp_path / "copy") == {"tokenizer.json": b"{}"}
    assert not (tmp_path / "copy" / "tokenizer.json").is_symlink()
