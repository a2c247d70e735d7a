"""Logits and greedy tokens of folders `--to onnx` from ONNX Runtime (`jobs.py` says how it is run).

Each folder is first built into `OUTPUTS.onnx/` by onnxruntime-genai, as its card says. Inputs: `input_ids` [B, T].
Outputs: `logits` float32 [B, T, V], `generated`, what follows the first row.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jobs  # type: ignore[import-not-found]  # beside this file
import numpy as np
from safetensors.numpy import load_file, save_file

OPTIONS = ("nodes_to_exclude=/lm_head/MatMul", "shared_embeddings=false", "accuracy_level=1")


def answer(folder: str, inputs: str, outputs: str) -> None:
    rows = load_file(inputs)["input_ids"]
    forward = session(build(folder, f"{outputs}.onnx"))
    logits = np.concatenate([forward(row[None]) for row in rows])
    written = rows[:1, : jobs.PROMPT]
    for _ in range(jobs.NEW):
        written = np.concatenate([written, forward(written)[:, -1:].argmax(-1)], axis=1)
    save_file({"logits": logits, "generated": written[0, jobs.PROMPT :].copy()}, outputs)
    shutil.rmtree(f"{outputs}.onnx")


def build(folder: str, output: str) -> Path:
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", folder, "-o", output]
    command += ["-p", "int4", "-e", "cpu", "-c", f"{output}/cache", "--extra_options", *OPTIONS]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return Path(output) / "model.onnx"


def session(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    head_dim = json.loads((path.parent / "genai_config.json").read_text())["model"]["decoder"]["head_size"]
    running = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    caches = {one.name: one.shape[1] for one in running.get_inputs() if "past" in one.name}
    empty = {name: np.zeros((1, heads, 0, head_dim), np.float32) for name, heads in caches.items()}

    def forward(row: np.ndarray) -> np.ndarray:
        given = {"input_ids": row, "attention_mask": np.ones_like(row)} | empty
        logits: np.ndarray = running.run(["logits"], given)[0]
        return logits

    return forward


if __name__ == "__main__":
    jobs.do(answer)
