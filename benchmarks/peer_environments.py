"""Environments of the peers that `quality.py` compares with: one each, made from a list of exact versions.

    python benchmarks/peer_environments.py            # all of them, a minute or two
    python benchmarks/peer_environments.py hqq        # one

A list is `peers/NAME.txt`. Its packages are installed without what they depend on, into a folder of the cache
(`$EQAT_CACHE/peers`); for everything else, torch above all, the environment sees the packages of the Python that made
it. So each peer has the versions that it needs, nothing of this project's environment changes, and the gigabytes of
torch lie on the disk once.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from eqat_mm.errors import DataError
from eqat_mm.runtime.files import cache_folder, write_text

PEERS = Path(__file__).parent / "peers"
_PIN = re.compile(r"[A-Za-z0-9][\w.-]*==\w[\w.!+-]*")
_DONE = "finished"
_NO_COMPILER = {"DISABLE_CUDA": "1"}
"""What keeps hqq's setup from compiling for a GPU."""


def peer_names() -> list[str]:
    """Return the names of all lists."""
    return sorted(path.stem for path in PEERS.glob("*.txt"))


def pins_of(name: str) -> list[str]:
    """Return the exact versions on a list, as pip takes them.

    Raises:
        ValueError: a line that is none, nor a comment.
    """
    lines = (PEERS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    wrong = [pin for pin in pins if _PIN.fullmatch(pin) is None]
    if wrong:
        raise ValueError(f"{name}.txt: {wrong[0]!r} is no NAME==VERSION")
    return pins


def environment_of(name: str) -> Path:
    """Return the Python of a peer's environment, which is made where it is not there.

    Raises:
        DataError: pip failed; what it said is in the message.
    """
    pins = pins_of(name)
    versions = hashlib.sha256("\n".join([sys.version, sys.prefix, *pins]).encode()).hexdigest()
    folder = cache_folder() / "peers" / f"{name}-{versions[:12]}"
    python = folder / "bin" / "python"
    if not (folder / _DONE).is_file():
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=False, symlinks=True)
        _see_our_packages(folder)
        _install(name, python, pins)
        write_text(folder / _DONE, "\n".join(pins) + "\n")
    return python


def _see_our_packages(folder: Path) -> None:
    """Let the environment find what it lacks in that of this Python, behind its own."""
    (own,) = folder.glob("lib/python*/site-packages")
    write_text(own / "behind.pth", sysconfig.get_path("purelib") + "\n")


def _install(name: str, python: Path, pins: list[str]) -> None:
    asked = ["install", "--no-deps", "--no-input", "--disable-pip-version-check", "--ignore-installed", *pins]
    command = [sys.executable, "-m", "pip", "--python", str(python), *asked]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | _NO_COMPILER)
    if done.returncode:
        said = "\n".join(done.stderr.strip().splitlines()[-8:])
        raise DataError(
            where=f"environment of {name}",
            given=f"pip ended with status {done.returncode}:\n{said}",
            allowed=f"the versions in {PEERS.name}/{name}.txt",
            do="check the network and pip's index settings, then try again",
        )


def main() -> None:
    """Make the environments that are named, and print the Python of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *peer_names()], help="default: all")
    for name in parser.parse_args().names or peer_names():
        print(f"{name}: {environment_of(name)}")


if __name__ == "__main__":
    main()
