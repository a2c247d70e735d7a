"""llama.cpp's server over a GGUF file and its mmproj: `python llama_cpp_images.py FILE MMPROJ REQUEST ANSWER`.

Needs `xllamacpp` alone. A request is a JSON list of `image` (path of a PNG), `question` and `tokens`; the answer one of
texts.
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

import xllamacpp  # type: ignore[import-not-found]


def started(file: Path, mmproj: Path) -> Any:
    """Return a server on one thread."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.mmproj.path = str(file), str(mmproj)
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = 1024, 1, False
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.use_jinja = True
    return xllamacpp.Server(parameters)


def answer(server: Any, asked: dict[str, Any]) -> str:
    """Return what a model says about an image, the most likely words of it."""
    data = base64.b64encode(Path(asked["image"]).read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        {"type": "text", "text": asked["question"]},
    ]
    request = {"messages": [{"role": "user", "content": content}], "max_tokens": asked["tokens"], "temperature": 0}
    said = server.handle_chat_completions(request)
    return str((said if isinstance(said, dict) else json.loads(said))["choices"][0]["message"]["content"])


def main() -> None:
    """Answer a request."""
    file, mmproj, request, answers = map(Path, sys.argv[1:])
    server = started(file, mmproj)
    said = [answer(server, asked) for asked in json.loads(request.read_text(encoding="utf-8"))]
    answers.write_text(json.dumps(said), encoding="utf-8")


if __name__ == "__main__":
    main()
