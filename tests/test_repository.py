"""The repository itself: what a reader relies on and no other check sees."""

from __future__ import annotations

import ast
import importlib
import importlib.resources
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

import eqat_mm

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "eqat_mm": ROOT / "eqat_mm",
    "llava_adapters": ROOT / "llava_adapters",
    "eqat_kernels": ROOT / "kernels" / "eqat_kernels",
    "eqat_eval": ROOT / "eval" / "eqat_eval",
    "eqat_demo": ROOT / "demo" / "eqat_demo",
}
SOURCES = sorted(path for folder in PACKAGES.values() for path in folder.rglob("*.py"))
RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.yaml"))
LONGEST_FILE = 400  # lines


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def repository_files() -> tuple[Path, ...]:
    """Files git tracks or would track; without git, those outside hidden and built folders."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        skipped = {"build", "dist", "runs", "__pycache__"}
        found = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
        listed = [
            str(path) for path in found if not any(part in skipped or part.startswith(".") for part in path.parts[:-1])
        ]
    return tuple(ROOT / name for name in listed if name and (ROOT / name).is_file())


# ---- sources --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_source_file_is_documented_and_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), f"{name_of(path)} has no module docstring"
    assert len(text.splitlines()) <= LONGEST_FILE, f"{name_of(path)} is longer than {LONGEST_FILE} lines"


def test_pyproject_lists_every_package() -> None:
    files = [ROOT / folder / "pyproject.toml" for folder in (".", "demo")]
    read = [tomllib.loads(path.read_text(encoding="utf-8")) for path in files]
    listed = [name for each in read for name in each["tool"]["setuptools"]["packages"]]
    found = {
        ".".join((package, *init.parent.relative_to(folder).parts))
        for package, folder in PACKAGES.items()
        for init in folder.rglob("__init__.py")
    }
    assert found == set(listed) - {"eqat_configs"}


PROGRAMS = [path for folder in ("benchmarks", "demo", "scripts") for path in sorted((ROOT / folder).glob("*.py"))]


@pytest.mark.parametrize("path", PROGRAMS, ids=name_of)
def test_a_program_imports_what_there_is(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] in PACKAGES:
            module = importlib.import_module(str(node.module))
            missing = [each.name for each in node.names if not hasattr(module, each.name)]
            assert all(importlib.util.find_spec(f"{node.module}.{name}") for name in missing), (node.module, missing)


def test_folders_that_must_not_be_packages() -> None:
    for folder in ("kernels", "eval"):
        assert not (ROOT / folder / "__init__.py").exists()


# ---- data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_recipe_is_a_yaml_mapping(path: Path) -> None:
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(recipe, dict)
    assert recipe


def test_installed_package_finds_the_recipes() -> None:
    folder = importlib.resources.files("eqat_configs") / "recipes"
    assert {entry.name for entry in folder.iterdir()} >= {path.name for path in RECIPES}


# ---- README ---------------------------------------------------------------------------------------


def paths_named_in(markdown: str) -> set[str]:
    """Repository paths in a Markdown text: link targets and names that begin with a top-level folder."""
    folders = "|".join(sorted(re.escape(path.name) for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "."))
    names = set(re.findall(rf"(?<![\w./-])(?:{folders})/[\w./*-]*", markdown))
    links = {link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", markdown)}
    names |= {link for link in links if link and not urlsplit(link).scheme}
    return {name.rstrip(".") for name in names if not name.startswith("runs/")}


def paths_in_file_map(markdown: str) -> set[str]:
    """Paths in the fenced block under the heading that contains `map`: two spaces of indent per level."""
    section = re.search(
        r"^#+ [^\n]*\bmap\b[^\n]*\n(?:(?!#|```)[^\n]*\n)*```\w*\n(.*?)^```", markdown, re.M | re.S | re.I
    )
    found, parents = set(), [""]
    for line in section.group(1).splitlines() if section else []:
        plain = re.sub("[│├└─]", " ", line)
        if not (name := plain.split(maxsplit=1)[0:1]):
            continue
        depth = (len(plain) - len(plain.lstrip())) // 2
        if depth >= len(parents):  # the continuation of a description
            continue
        found.add(path := parents[depth] + name[0])
        if path.endswith("/"):
            parents[depth + 1 :] = [path]
    return found


def test_file_map_is_read_as_a_tree() -> None:
    tree = "a/        one\n  b/      two\n    c.py  three\n  d.py    four\ne.md      five\n"
    text = f"## File map\n\nWords.\n\n```text\n{tree}```\n"
    assert paths_in_file_map(text) == {"a/", "a/b/", "a/b/c.py", "a/d.py", "e.md"}


ROOMS = "|".join(sorted(path.name for path in (ROOT / "eqat_mm").iterdir() if path.is_dir()))
FOLDERS = (ROOT, ROOT / "docs")
DOCUMENTS = sorted(name_of(path) for folder in FOLDERS for path in folder.glob("*.md"))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_named_in_the_documents_exist(document: str) -> None:
    text, beside = (ROOT / document).read_text(encoding="utf-8"), (ROOT / document).parent
    named = {name.rstrip("/") for name in paths_named_in(text) | paths_in_file_map(text)}
    missing = {
        name for name in named if "NAME" not in name and not list(ROOT.glob(name)) and not (beside / name).exists()
    }
    modules = re.findall(rf"`((?:{ROOMS})/[\w/]+\.py)`", text)
    missing |= {name for name in modules if not any((ROOT / top / name).exists() for top in ("eqat_mm", "tests"))}
    assert not missing, f"{document} names what does not exist: {sorted(missing)}"


def test_the_version_is_the_same_wherever_it_is_said() -> None:
    changes, citation = ((ROOT / name).read_text(encoding="utf-8") for name in ("CHANGELOG.md", "CITATION.cff"))
    assert re.findall(r"^## \[(.*?)\]", changes, re.M)[0] == eqat_mm.__version__
    assert re.findall(r"^version: (.*)$", citation, re.M) == [eqat_mm.__version__]
    assert tomllib.loads((ROOT / "demo" / "pyproject.toml").read_text())["project"]["version"] == eqat_mm.__version__


def test_every_module_is_in_the_file_map() -> None:
    named = paths_in_file_map((ROOT / "docs" / "files.md").read_text(encoding="utf-8"))
    modules = [path for package in ("eqat_mm", "eval/eqat_eval") for path in (ROOT / package).rglob("*.py")]
    modules += (ROOT / "llava_adapters").glob("*.py")
    names = {str(path.relative_to(ROOT)) for path in modules if path.name != "__init__.py"}
    assert sorted(names - named) == []


# ---- nothing of the machine it was written on -----------------------------------------------------

HOME_OR_WORKSPACE = re.compile(r"(?<![\w.~*-])/(?:work|root|workspace|home/[\w-]+|Users/[\w-]+)/")


def package_sources() -> set[str]:
    """Hosts and folders this machine installs packages from."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    configured = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    configured += "\n".join(value for name, value in os.environ.items() if name.startswith(("PIP_", "UV_")))
    hosts = {urlsplit(url).hostname or "" for url in re.findall(r"\w+://[^\s'\"]+", configured)} - {"localhost", ""}
    folders = set(re.findall(r"(?:file://|(?<=['\"]))(/(?:opt|srv|mnt|data)/[\w.-]+)", configured))
    return hosts | folders


def test_no_file_names_this_machine() -> None:
    words = package_sources()
    if len(ROOT.parts) > 2:  # not for a checkout in /app or /src: too common a word
        words.add(str(ROOT))
    found = []
    for path in repository_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a binary file
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            if HOME_OR_WORKSPACE.search(line) or any(word in line for word in words):
                found.append(f"{name_of(path)}:{number}")
    assert not found, f"lines with a path or host of one machine: {found}"
