"""llama.cpp over a GGUF file, in a process of its own: `python llama_cpp.py LIBRARIES FILE REQUEST.json ANSWER.npz`.

LIBRARIES holds the shared objects of a prebuilt llama.cpp v0.5.0, as `@node-llama-cpp/linux-x64` has them. Needs numpy
alone. A request has `windows` (token ids, one length), `texts` to tokenize, `prompts` to continue by `tokens` tokens;
the answer `logits` [n, T, V] float32, and as JSON `ids` and `written`.
"""

from __future__ import annotations

import ctypes
import json
import sys
from ctypes import POINTER, c_bool, c_byte, c_char_p, c_float, c_int8, c_int32, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import numpy as np


class Parameters(ctypes.Structure):
    """Of a model or a context: more bytes than any release has; they are the last argument, so the rest is not read."""

    _fields_ = [("bytes", c_byte * 1024)]


class Batch(ctypes.Structure):
    """Tokens of one call."""

    _fields_ = [
        ("count", c_int32),
        ("token", POINTER(c_int32)),
        ("embedding", POINTER(c_float)),
        ("position", POINTER(c_int32)),
        ("sequences", POINTER(c_int32)),
        ("sequence", POINTER(POINTER(c_int32))),
        ("wanted", POINTER(c_int8)),
    ]


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_model_default_params": (Parameters, []),
    "llama_context_default_params": (Parameters, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, Parameters]),
    "llama_init_from_model": (c_void_p, [c_void_p, Parameters]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_vocab_is_eog": (c_bool, [c_void_p, c_int32]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_batch_init": (Batch, [c_int32, c_int32, c_int32]),
    "llama_decode": (c_int32, [c_void_p, Batch]),
    "llama_get_logits_ith": (POINTER(c_float), [c_void_p, c_int32]),
    "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
}
_LENGTH = 512
_DEFAULTS = [512, 2048, 512, 1, 0, 0, 1, 4, 4]
"""Of a context: tokens of it, of a batch, of a part of it; sequences; three of no concern; threads, twice."""


class Reader:
    """A model in llama.cpp, on one thread."""

    def __init__(self, libraries: Path, file: Path) -> None:
        self.library = _library(libraries)
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self.library, name)
            function.restype, function.argtypes = result, arguments
        self.library.llama_backend_init()
        parameters = self.library.llama_model_default_params()
        self.model = self.library.llama_model_load_from_file(str(file).encode(), parameters)
        assert self.model, f"llama.cpp does not read {file}"
        self.context = self.library.llama_init_from_model(self.model, self._context_parameters())
        self.vocabulary = self.library.llama_model_get_vocab(self.model)
        self.size = self.library.llama_vocab_n_tokens(self.vocabulary)
        self.batch = self.library.llama_batch_init(_LENGTH, 0, 1)

    def _context_parameters(self) -> Parameters:
        """Return the defaults with room for a window and its logits: sizes are the first numbers of them."""
        parameters = self.library.llama_context_default_params()
        numbers = ctypes.cast(ctypes.byref(parameters), POINTER(c_uint32))
        assert list(numbers[:9]) == _DEFAULTS, "another layout of the parameters than that of v0.5.0"
        numbers[0] = numbers[1] = numbers[2] = _LENGTH
        numbers[7] = numbers[8] = 1  # threads
        return parameters

    def logits(self, ids: list[int], begin: int = 0) -> np.ndarray:
        """Return the logits behind every token of a text, or of what follows `begin` tokens, float32 [T, V]."""
        return np.stack([np.ctypeslib.as_array(row, (self.size,)).copy() for row in self.read(ids, begin)])

    def read(self, ids: list[int], begin: int = 0) -> list[Any]:
        """Return the same as pointers to a row for each token, valid until it reads again."""
        if begin == 0:
            self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)
        self.batch.count = len(ids)
        for place, token in enumerate(ids):
            self.batch.token[place], self.batch.position[place] = token, begin + place
            self.batch.sequences[place], self.batch.wanted[place] = 1, 1
            self.batch.sequence[place][0] = 0
        assert self.library.llama_decode(self.context, self.batch) == 0, "llama.cpp cannot decode"
        return [self.library.llama_get_logits_ith(self.context, place) for place in range(len(ids))]

    def ids(self, text: str, special: bool) -> list[int]:
        """Return the tokens of a text, those that begin every text among them; special ones are read where asked."""
        found = (c_int32 * (len(text.encode()) + 8))()
        raw = text.encode()
        count = self.library.llama_tokenize(self.vocabulary, raw, len(raw), found, len(found), True, special)
        return list(found[:count])

    def written(self, prompt: list[int], tokens: int) -> list[int]:
        """Return the most likely tokens behind a prompt, up to one that ends a text."""
        logits, found = self.logits(prompt), list[int]()
        while len(found) < tokens:
            found.append(int(logits[-1].argmax()))
            if self.library.llama_vocab_is_eog(self.vocabulary, found[-1]):
                break
            logits = self.logits(found[-1:], len(prompt) + len(found) - 1)
        return found


def _library(folder: Path) -> Any:
    """Load llama.cpp, with the fastest computing library that this processor runs."""
    ggml = ctypes.CDLL(str(next(folder.glob("libggml.v*.so"))), ctypes.RTLD_GLOBAL)
    ggml.ggml_backend_load_all_from_path.argtypes = [c_char_p]
    ggml.ggml_backend_load_all_from_path(str(folder).encode())
    return ctypes.CDLL(str(next(folder.glob("libllama.v*.so"))), ctypes.RTLD_GLOBAL)


def main() -> None:
    """Answer a request."""
    libraries, file, request, answer = map(Path, sys.argv[1:])
    asked = json.loads(request.read_text(encoding="utf-8"))
    reader = Reader(libraries, file)
    windows = [reader.logits(window) for window in asked.get("windows", [])]
    said = {
        "ids": [reader.ids(text, special=True) for text in asked.get("texts", [])],
        "written": [reader.written(prompt, asked["tokens"]) for prompt in asked.get("prompts", [])],
    }
    np.savez(answer, logits=np.stack(windows) if windows else np.zeros(0), said=json.dumps(said))


if __name__ == "__main__":
    main()
