"""The packages that setuptools finds are what lies on disk, and importing deltafmt stays light."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

from setuptools import find_packages

ROOT = Path(__file__).resolve().parent.parent


def test_packages_that_setuptools_finds_are_those_on_disk() -> None:
    find = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]["find"]
    listed = find_packages(str(ROOT), include=find["include"])
    homes = {"deltafmt": "deltafmt", "kernels": "deltafmt.kernels", "tools": "deltafmt.tools"}
    found = set()
    for folder, package in homes.items():
        for path in (ROOT / folder).rglob("__init__.py"):
            parts = path.parent.relative_to(ROOT / folder).parts
            found.add(".".join((package, *parts)))
    assert sorted(listed) == sorted(found)


def test_reading_needs_neither_torch_nor_numba() -> None:
    code = (
        "import sys, deltafmt, deltafmt.tools.main, deltafmt.tools.inspect_cmd; deltafmt.open; deltafmt.verify;"
        "assert not {'torch', 'numba', 'transformers'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
