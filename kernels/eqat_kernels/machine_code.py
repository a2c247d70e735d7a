"""What a compiled Triton kernel needs, read from its machine code; no GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import triton


def resources(cubin: bytes) -> tuple[int, int]:
    """Return registers per thread and bytes of local memory per thread of a compiled kernel."""
    text = _read(cubin, triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage")
    found = {name: int(value) for name, value in re.findall(r"(REG|LOCAL|STACK):(\d+)", text)}
    return found["REG"], max(found["LOCAL"], found["STACK"])


def instructions(cubin: bytes) -> int:
    """Return the instructions of a kernel's largest loop, or of the whole kernel where it has none."""
    labels: dict[str, int] = {}
    loops: list[int] = []
    count = 0
    for line in _read(cubin, triton.knobs.nvidia.nvdisasm.path, "-c").splitlines():
        if label := re.match(r"(\.L_x_\d+):", line.strip()):
            labels[label[1]] = count
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            count += not instruction[1].startswith("NOP")
            target = re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction[1])
            if target and target[1] in labels:
                loops.append(count - labels[target[1]])
    whole = count if not loops or max(loops) < 2 else max(loops)
    return whole


def _read(cubin: bytes, tool: str, option: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([tool, option, str(path)], check=True, capture_output=True, text=True).stdout
