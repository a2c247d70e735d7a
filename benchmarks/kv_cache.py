"""The KV cache in integers on a real model: bytes, perplexity, and whether generation repeats itself.

    eqat llm-qat --model smollm2-135m --bits 4-8-4 --max_steps 0
    python benchmarks/kv_cache.py runs/smollm2-135m-4-8-4/rtn/model

Held-out text is read piece by piece, through a cache that stores integers and with the fake quantization of training,
and then all at once, which rounds otherwise in the last bits. Some tokens more are timed one by one: by the attention
that reads the integers, by one that is given them expanded, and behind the floats. The same model then continues a
prompt greedily, twice with integers and once as floats.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

import torch
import transformers
from torch import Tensor

import eqat_mm
from eqat_mm.blocks.attention import new_cache
from eqat_mm.checkpoint.folders import load_tokenizer
from eqat_mm.data.text.settings import TextWindows
from eqat_mm.data.text.windows import text_windows
from eqat_mm.quant.kv_cache import QuantizedKVCache, cache_bytes

TOKENS, PIECE, TIMED = 2048, 128, 24
PROMPT, WRITTEN = 64, 64


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="checkpoint with a quantized cache")
    folder = parser.parse_args().model
    model = eqat_mm.load(folder).eval()
    tokens = text_windows(
        load_tokenizer(folder), TextWindows("demo-wikipedia", part="held_out", length=TOKENS, count=1)
    )
    if new_cache(model) is None:
        parser.error(f"{folder}: its cache is not quantized")

    integers, floats = new_cache(model), transformers.DynamicCache()
    expanded = QuantizedKVCache(integers.bits)
    stored, same, fake = (
        torch.cat([read(model, piece, cache) for piece in tokens.split(PIECE, 1)], 1)
        for cache in (integers, expanded, floats)
    )
    in_16_bits = cache_bytes(floats) * 2 / floats.layers[0].keys.element_size()
    print(
        f"{TOKENS:,} tokens: {cache_bytes(integers) / 2**20:.2f} MiB of {in_16_bits / 2**20:.2f} in 16 bits,", end=" "
    )
    print(f"{cache_bytes(integers) / in_16_bits:.4f}")
    equal = torch.equal(stored, fake) and torch.equal(same, fake)
    print(f"logits of pieces equal to those of fake quantization: {equal}; perplexity", end=" ")
    print(f"{perplexity(stored, tokens):.6f}, {perplexity(fake, tokens):.6f},", end=" ")
    print(f"all at once {perplexity(read(model, tokens, None), tokens):.6f}")

    print(f"a token more: {milliseconds(model, tokens, integers):.1f} ms,", end=" ")
    print(f"integers expanded {milliseconds(model, tokens, expanded):.1f} ms,", end=" ")
    print(f"as floats {milliseconds(model, tokens, floats):.1f} ms")

    prompt = tokens[:, :PROMPT]
    first, second, fake = (write(model, prompt, cache) for cache in (new_cache(model), new_cache(model), None))
    print(f"{WRITTEN} tokens written greedily: the second time equal: {torch.equal(first, second)},", end=" ")
    print(f"equal to those of fake quantization: {torch.equal(first, fake)}")


def read(model: transformers.PreTrainedModel, tokens: Tensor, cache: transformers.Cache | None) -> Tensor:
    """Return the logits of tokens that follow those in the cache."""
    logits: Tensor = model(input_ids=tokens, past_key_values=cache, use_cache=True).logits
    return logits


def perplexity(logits: Tensor, tokens: Tensor) -> float:
    """Perplexity of one sequence."""
    return torch.nn.functional.cross_entropy(logits[0, :-1].float(), tokens[0, 1:]).exp().item()


def milliseconds(model: transformers.PreTrainedModel, tokens: Tensor, cache: transformers.Cache | None) -> float:
    """Return the time in which this thread reads one token behind those in the cache."""
    times = []
    for token in tokens[:, :TIMED].split(1, 1):
        started = time.thread_time()
        read(model, token, cache)
        times.append(time.thread_time() - started)
    return 1e3 * median(times)


def write(model: transformers.PreTrainedModel, prompt: Tensor, cache: transformers.Cache | None) -> Tensor:
    """Continue a prompt greedily."""
    options = {} if cache is None else {"past_key_values": cache}
    written: Tensor = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        min_new_tokens=WRITTEN,
        max_new_tokens=WRITTEN,
        **options,
    )
    return written


if __name__ == "__main__":
    main()
