"""Log probabilities and greedy tokens of folders from vLLM on a CPU (`jobs.py` says how it is run).

Inputs: `input_ids` [B, T]. Outputs: `logprobs` float32 [B, T - 1] of each token behind the first, `likeliest`
[B, T - 1], and `generated`, what follows the first row. Where a job has an `image` and a `question`, only `generated`,
what follows the question, with the log probabilities of these tokens, `chosen`.
"""

from __future__ import annotations

import os
from typing import Any

import jobs  # type: ignore[import-not-found]  # beside this file

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}

import torch
from safetensors.torch import load_file, save_file
from vllm import LLM, SamplingParams


def answer(folder: str, inputs: str, outputs: str, image: str | None = None, question: str = "") -> None:
    rows = load_file(inputs)["input_ids"].tolist()
    half = {"dtype": "float16", "enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 8}
    model = LLM(folder, **half, disable_log_stats=True)
    found = {} if image else _scored(model, rows)
    prompt = _about(image, question) if image else {"prompt_token_ids": rows[0][: jobs.PROMPT]}
    (said,) = model.generate([prompt], _greedy(jobs.NEW, logprobs=1), use_tqdm=False)
    written = list(said.outputs[0].token_ids)
    chosen = [place[token].logprob for token, place in zip(written, said.outputs[0].logprobs, strict=True)]
    save_file(found | {"generated": torch.tensor(written), "chosen": torch.tensor(chosen)}, outputs)


def _greedy(tokens: int, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=tokens, **more)


def _scored(model: Any, rows: list[list[int]]) -> dict[str, torch.Tensor]:
    prompts = [{"prompt_token_ids": row} for row in rows]
    answers = model.generate(prompts, _greedy(1, prompt_logprobs=1), use_tqdm=False)
    logprobs, likeliest = [], []
    for row, said in zip(rows, answers, strict=True):
        places = list(zip(row[1:], said.prompt_logprobs[1:], strict=True))
        logprobs.append([place[token].logprob for token, place in places])
        likeliest.append([max(place, key=lambda each: place[each].logprob) for _, place in places])
    return {"logprobs": torch.tensor(logprobs), "likeliest": torch.tensor(likeliest)}


def _about(image: str, question: str) -> dict[str, Any]:
    from PIL import Image

    return {"prompt": question, "multi_modal_data": {"image": Image.open(image).convert("RGB")}}


if __name__ == "__main__":
    jobs.do(answer)
