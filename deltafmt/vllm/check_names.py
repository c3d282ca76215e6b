"""``python -m deltafmt.vllm.check_names SOURCE...``: look for the names that the plugin relies on in versions of vLLM.

A source is a wheel, or a folder that holds ``vllm/``. Nothing of it is installed or run: its files are parsed. So one
environment checks every supported version.
"""

from __future__ import annotations

import ast
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from deltafmt.vllm.seam import NAMES

Read = Callable[[str], str | None]


def missing(read: Read) -> list[str]:
    """Return the names that a version lacks, as ``module: name``.

    Args:
        read: returns the text of a file of the version, given its path, or None.
    """
    found: list[str] = []
    for module, names in NAMES.items():
        path = module.replace(".", "/")
        text = read(f"{path}.py")
        if text is None:
            text = read(f"{path}/__init__.py")
        if text is None:
            found.append(f"{module}: the module")
            continue
        defined = _defined(ast.parse(text))
        found += [f"{module}: {name}" for name in names if name not in defined]
    return found


def _defined(tree: ast.Module) -> set[str]:
    """Return what a module defines or imports, and the methods of its classes as ``Class.method``."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.update(alias.asname or alias.name for alias in node.names)
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            found.add(node.name)
            functions = (one for one in node.body if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef))
            found.update(f"{node.name}.{one.name}" for one in functions)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found.update(target.id for target in node.targets if isinstance(target, ast.Name))
    return found


def reader(source: Path) -> Read:
    """Return a function that reads the files of a wheel or a folder."""
    if source.is_dir():

        def of_folder(path: str) -> str | None:
            file = source / path
            return file.read_text(encoding="utf-8") if file.is_file() else None

        return of_folder
    wheel = zipfile.ZipFile(source)
    names = set(wheel.namelist())

    def of_wheel(path: str) -> str | None:
        return wheel.read(path).decode() if path in names else None

    return of_wheel


def main(arguments: Sequence[str]) -> int:
    """Check every source, and print one line for each; return the exit code."""
    if not arguments:
        print("name wheels of vLLM, or folders that hold vllm/", file=sys.stderr)  # noqa: T201
        return 2
    failed = False
    for argument in arguments:
        lacks = missing(reader(Path(argument)))
        failed |= bool(lacks)
        print(f"{Path(argument).name}: {'all names are there' if not lacks else 'missing ' + '; '.join(lacks)}")  # noqa: T201
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
