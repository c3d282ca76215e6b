"""What is built and shipped: the packages, the wheel, the source distribution; and importing deltafmt stays light."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from setuptools import find_packages

ROOT = Path(__file__).resolve().parent.parent
HOMES = {"deltafmt": "deltafmt", "deltafmt.kernels": "deltafmt/kernels", "deltafmt.tools": "deltafmt/tools"}
# What git ignores, and git's own folder.
NOT_SOURCES = (
    ".git",
    ".venv",
    "build",
    "dist",
    "*.egg-info",
    "__pycache__",
    ".*_cache",
    ".hypothesis",
    "*.so",
    "demo-out",
)

BUILD = "import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"


def packages_on_disk() -> dict[str, Path]:
    """Return the folder of every package, found without setuptools."""
    found = {}
    for package, folder in HOMES.items():
        for path in (ROOT / folder).rglob("__init__.py"):
            parts = path.parent.relative_to(ROOT / folder).parts
            found[".".join((package, *parts))] = path.parent
    return found


def test_packages_that_setuptools_finds_are_those_on_disk() -> None:
    find = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]["find"]
    assert sorted(find_packages(str(ROOT), include=find["include"])) == sorted(packages_on_disk())


@dataclass(frozen=True)
class Built:
    """Distributions of this tree: of its files by name, their contents."""

    wheel: dict[str, bytes]
    wheel_from_sdist: dict[str, bytes]
    sdist: dict[str, bytes]


def build(kind: str, tree: Path, out: Path) -> Path:
    """Build a ``wheel`` or an ``sdist`` of a folder."""
    out.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", BUILD.format(kind=kind), str(out)],
        cwd=tree,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    (made,) = out.iterdir()
    return made


def wheel_files(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Build all of them, from a copy: what an earlier build has left in the tree would get into this one."""
    folder = tmp_path_factory.mktemp("built")
    tree = folder / "tree"
    shutil.copytree(ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(*NOT_SOURCES))
    wheel = build("wheel", tree, folder / "wheel")
    shutil.rmtree(tree)
    shutil.copytree(ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(*NOT_SOURCES))
    sdist = build("sdist", tree, folder / "sdist")
    with tarfile.open(sdist) as file:
        file.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    files = {path.relative_to(unpacked).as_posix(): path.read_bytes() for path in unpacked.rglob("*") if path.is_file()}
    return Built(wheel_files(wheel), wheel_files(build("wheel", unpacked, folder / "again")), files)


def test_wheels_from_tree_and_sdist_are_the_same(built: Built) -> None:
    assert built.wheel == built.wheel_from_sdist


def test_the_wheel_holds_every_module_and_nothing_else(built: Built) -> None:
    expected = {
        f"{package.replace('.', '/')}/{path.name}": path.read_bytes()
        for package, folder in packages_on_disk().items()
        for path in folder.glob("*.py")
    }
    found = {name: data for name, data in built.wheel.items() if ".dist-info/" not in name}
    assert found.pop("deltafmt/py.typed") == b""
    extensions = {name for name in found if name.endswith((".so", ".pyd"))}
    # Where there is no compiler the package is built without it.
    assert extensions == ({"deltafmt/_core.abi3.so"} if shutil.which("cc") or extensions else set())
    found = {name: data for name, data in found.items() if name not in extensions}
    assert found == expected
    assert {"deltafmt/kernels/products.py", "deltafmt/tools/main.py"} <= expected.keys()
    (script,) = (data for name, data in built.wheel.items() if name.endswith("entry_points.txt"))
    assert b"deltafmt = deltafmt.tools.main:main" in script


def test_the_sdist_holds_every_file_of_the_repository(built: Built) -> None:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a checkout of the repository")
    tracked, new = (listed(*options) for options in ((), ("--others", "--exclude-standard")))
    assert not tracked - built.sdist.keys()
    added = {name for name in built.sdist if not name.startswith("deltafmt.egg-info/")} - tracked - new
    assert added == {"PKG-INFO", "setup.cfg"}


def listed(*options: str) -> set[str]:
    """Return what git lists and the disk holds, by the names in an sdist: there, a link is the folder itself."""
    command = ["git", "ls-files", "-z", *options]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    return {
        f"deltafmt/{name}" if name.startswith(("kernels/", "tools/")) else name
        for name in names
        if (ROOT / name).is_file()
    }


def test_reading_needs_no_torch() -> None:
    code = (
        "import sys, deltafmt, deltafmt.tools.main, deltafmt.tools.inspect_cmd; deltafmt.open; deltafmt.verify;"
        "assert not {'torch', 'transformers'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
