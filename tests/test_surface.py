"""The public surface: every name is there, has a docstring, and is what the pages speak of; what is missing is said."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import deltafmt
from conftest import Pair, run_cli
from deltafmt.errors import MissingExtraError, UsageError
from deltafmt.extras import lacking, need

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

# A name of the package, but not the end of a file's name such as "math.deltafmt", nor a folder's such as "/deltafmt".
DOTTED = re.compile(r"(?<![\w./-])deltafmt((?:\.[A-Za-z_]\w*)+)")
# What a file says of itself has dots too: it is written by pack and shown by inspect.
METADATA = {"deltafmt.version"}

# Put in front of Python's own path, this hides packages from a process as if they were not installed.
HIDE = """
import sys
for name in {names!r}:
    sys.modules[name] = None
"""


def resolve(path: str) -> Any:
    """Return what a dotted name stands for: the longest module, then attributes."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise AssertionError(path)


@pytest.mark.parametrize("name", deltafmt.__all__)
def test_every_public_name_is_there_and_explained(name: str) -> None:
    if name in ("torch", "transformers"):
        pytest.importorskip("torch")
    value = getattr(deltafmt, name)
    assert name in dir(deltafmt)
    if name == "__version__":
        assert re.fullmatch(r"\d+\.\d+\.\d+\w*", value)
        return
    assert value.__doc__
    assert inspect.getdoc(value), name
    members = value.__all__ if isinstance(value, ModuleType) and hasattr(value, "__all__") else []
    for member in members:
        part = getattr(value, member)
        assert not callable(part) or inspect.getdoc(part), f"{name}.{member}"


@pytest.mark.parametrize("name", ["Calibration", "DeltaFile", "torch.DeviceDelta", "torch.DeviceTensor"])
def test_what_the_classes_offer_is_explained(name: str) -> None:
    if name.startswith("torch"):
        pytest.importorskip("torch")
    kind = resolve(f"deltafmt.{name}")
    for member, value in vars(kind).items():
        if not member.startswith("_") and (callable(value) or isinstance(value, property)):
            assert inspect.getdoc(value), f"{name}.{member}"


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((ROOT / "deltafmt" / "__init__.py").read_text("utf-8"))
    (guarded,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {}
    for node in guarded.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            seen[alias.asname or alias.name] = (node.module, alias.name)
    assert sorted([*seen, "__version__"]) == sorted(deltafmt.__all__)
    homes = {name: (home, attribute) for name, (home, attribute) in deltafmt._HOMES.items()}
    assert homes.keys() == seen.keys()
    for name, (home, attribute) in homes.items():
        module, original = seen[name]
        assert (home, attribute) == ((f"{module}.{original}", None) if attribute is None else (module, original))
    assert (ROOT / "deltafmt" / "py.typed").is_file()


def test_no_other_name_is_given() -> None:
    with pytest.raises(AttributeError, match="module 'deltafmt' has no attribute 'nonsense'"):
        deltafmt.nonsense  # noqa: B018 - looking is the test


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_the_pages_speak_of_exists(page: Path) -> None:
    pytest.importorskip("torch")
    for match in DOTTED.finditer(page.read_text("utf-8")):
        name = match.group(0)
        if name not in METADATA:
            assert resolve(name) is not None, name


def run_without(names: tuple[str, ...], code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process that lacks some packages."""
    return subprocess.run(
        [sys.executable, "-c", HIDE.format(names=names) + code], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(("name", "extra"), [("torch", "torch"), ("transformers", "transformers")])
def test_without_torch_the_extra_is_named(name: str, extra: str) -> None:
    code = f"""
try:
    import deltafmt.{name}
except ImportError as error:
    print(type(error).__name__, error)
import deltafmt
try:
    deltafmt.{name}
except ImportError as error:
    print(type(error).__name__, error)
assert deltafmt.open and deltafmt.pack and deltafmt.unpack and deltafmt.plan_for_target and deltafmt.analyze
"""
    done = run_without(("torch", "transformers"), code)
    assert done.returncode == 0, done.stderr
    line = f"MissingExtraError deltafmt.{name} needs torch: pip install 'deltafmt[{extra}]'"
    assert done.stdout.splitlines() == [line, line]


@pytest.mark.parametrize("hidden", [("torch", "transformers"), ("transformers",)])
def test_commands_name_the_extra_that_is_missing(hidden: tuple[str, ...], small: Pair, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out.deltafmt"
    text.write_text("one and two are three\n")
    # Python imports a module of this name when it starts.
    (tmp_path / "sitecustomize.py").write_text(HIDE.format(names=hidden))
    env = {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])}
    needed = " and ".join(name for name in ("torch", "transformers") if name in hidden or not find_spec(name))
    for command in (
        ("pack", small.base, small.finetuned, "-o", out, "--method", "gptq", "--calibration", text),
        ("analyze", small.base, small.finetuned, "--calibration", text),
    ):
        done = run_cli(*command, env=env)
        assert done.returncode == 2, done.stderr
        assert done.stdout == b""
        line = f"deltafmt: calibration needs {needed}: pip install 'deltafmt[transformers]'\n"
        assert done.stderr.decode() == line
    assert not out.exists()


def test_an_error_that_names_an_extra_is_caught_as_either() -> None:
    assert lacking("this", "sys", extra="torch") == ""
    need("this", "sys", "json", extra="torch")
    with pytest.raises(MissingExtraError, match=r"^this needs no_such_a and no_such_b: pip install 'deltafmt\[x\]'$"):
        need("this", "sys", "no_such_a", "no_such_b", extra="x")
    assert issubclass(MissingExtraError, ImportError)
    assert issubclass(MissingExtraError, UsageError)
    assert MissingExtraError.exit_code == 2
