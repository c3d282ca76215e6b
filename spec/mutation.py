"""Small wrong versions of this package's reader: a check that is skipped, a line that says something else.

A mutation replaces the code of functions in place, for a while, in this process. The readers that it changes are the
numpy references; the compiled loops do not run meanwhile.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import suite

from deltafmt import core
from deltafmt.checkpoint import float8
from deltafmt.errors import DeltafmtError
from deltafmt.terms.nm.index import rank


@dataclass(frozen=True)
class Skip:
    """The check is skipped that would raise a message with these words; ``{}`` stands for what is filled in.

    Attributes:
        place: a module of deltafmt, and perhaps a function of it: ``index.entries:_parse_replace``.
        words: a part of the message.
    """

    place: str
    words: str


@dataclass(frozen=True)
class Patch:
    """A piece of a module's source, which stands there once, is replaced.

    Attributes:
        module: a module of deltafmt.
        old, new: the piece, and what replaces it.
    """

    module: str
    old: str
    new: str


@dataclass(frozen=True)
class Constant:
    """A constant has another value, in every module that has imported it.

    Attributes:
        name: module and name: ``format.constants.ZSTD_CHUNK``.
        value: the other value.
    """

    name: str
    value: Any


Mutation = tuple[Skip | Patch | Constant, ...]


class NotFoundError(Exception):
    """A mutation does not fit the reader's source any more."""


@contextlib.contextmanager
def applied(mutation: Mutation) -> Iterator[None]:
    """Run a wrong reader for a while.

    Raises:
        NotFoundError: the source has no such check, piece or constant.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(core.reference_only())
        for cached in (rank.binomials, float8.values_of_codes):
            stack.callback(cached.cache_clear)
            cached.cache_clear()
        changes: dict[str, list[Skip | Patch]] = {}
        for change in mutation:
            if isinstance(change, Constant):
                _set_constant(change, stack)
            else:
                module = change.module if isinstance(change, Patch) else change.place.partition(":")[0]
                changes.setdefault(module, []).append(change)
        for name, of_module in changes.items():
            for function, code in _changed(name, tuple(of_module)):
                stack.callback(setattr, function, "__code__", function.__code__)
                function.__code__ = code
        yield


def mistaken(vector: suite.Vector, mutation: Mutation) -> bool:
    """Tell whether a wrong reader accepts a bad file, calls it what it is not, or gives a wrong result for a good one.

    It does not count that the wrong reader fails at a bad file in some other way.
    """
    try:
        with applied(mutation):
            return suite.problem(vector) is not None
    except NotFoundError:
        raise
    except Exception:  # noqa: BLE001 - of a wrong reader
        return vector.keys["expect"] == "ok"


def caught(vector: suite.Vector, mutation: Mutation) -> str | None:
    """Return in what a wrong reader differs from a vector; None if it does not."""
    with applied(mutation):
        try:
            return suite.problem(vector)
        except DeltafmtError as error:
            return f"refused: {error}"
        except Exception as error:  # noqa: BLE001 - of a wrong reader
            return f"{type(error).__name__}: {error}"


def _set_constant(change: Constant, stack: contextlib.ExitStack) -> None:
    place, _, name = change.name.rpartition(".")
    old = getattr(importlib.import_module(f"deltafmt.{place}"), name, None)
    if old is None:
        raise NotFoundError(f"no constant {change.name}")
    for module in [module for key, module in sys.modules.items() if key.startswith("deltafmt.")]:
        if getattr(module, name, None) is old:
            stack.callback(setattr, module, name, old)
            setattr(module, name, change.value)


@functools.cache
def _changed(name: str, changes: tuple[Skip | Patch, ...]) -> list[tuple[FunctionType, CodeType]]:
    """Return the functions of a module that change, with their new code."""
    module = importlib.import_module(f"deltafmt.{name}")
    path, source, before = _original(name)
    for change in changes:
        if isinstance(change, Patch):
            if source.count(change.old) != 1:
                raise NotFoundError(f"{name} has {source.count(change.old)} times: {change.old}")
            source = source.replace(change.old, change.new)
    tree = ast.parse(source)
    for change in changes:
        if isinstance(change, Skip):
            _skip(tree, change)
    after = _functions(compile(tree, path, "exec", dont_inherit=True))
    found = [
        (_function(module, qualname), code)
        for qualname, code in after.items()
        if qualname in before and _form(code) != _form(before[qualname])
    ]
    if not found:
        raise NotFoundError(f"no function of {name} changes")
    return found


@functools.cache
def _original(name: str) -> tuple[str, str, dict[str, CodeType]]:
    path = str(importlib.import_module(f"deltafmt.{name}").__file__)
    source = Path(path).read_text(encoding="utf-8")
    return path, source, _functions(compile(source, path, "exec", dont_inherit=True))


def _skip(tree: ast.Module, change: Skip) -> None:
    _, _, function = change.place.partition(":")
    found = [
        node
        for scope in ast.walk(tree)
        if isinstance(scope, ast.Module if not function else ast.FunctionDef)
        and (not function or scope.name == function)  # type: ignore[attr-defined]
        for node in ast.walk(scope)
        if isinstance(node, ast.If) and any(change.words in text for line in node.body for text in _texts(line))
    ]
    if len(found) != 1:
        raise NotFoundError(f"{change.place} has {len(found)} checks that say: {change.words}")
    found[0].test = ast.copy_location(ast.Constant(False), found[0].test)


def _texts(line: ast.stmt) -> Iterator[str]:
    """Give the messages of a statement that raises or calls, those of statements inside it left out."""
    if isinstance(line, ast.Raise | ast.Expr):
        for node in ast.walk(line):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def _functions(code: CodeType) -> dict[str, CodeType]:
    """Return the functions and methods of a module, by qualified name."""
    found = {}
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            if inner.co_flags & inspect.CO_OPTIMIZED:
                found[inner.co_qualname] = inner
            else:
                found |= _functions(inner)
    return found


def _form(code: CodeType) -> tuple[object, ...]:
    """Return what a function does, whatever its place."""
    constants = tuple(
        _form(value) if isinstance(value, CodeType) else (type(value), repr(value)) for value in code.co_consts
    )
    return code.co_code, code.co_names, code.co_varnames, constants


def _function(module: ModuleType, qualname: str) -> FunctionType:
    found: Any = module
    for part in qualname.split("."):
        found = vars(found)[part]
    while not isinstance(found, FunctionType):
        names = ("__func__", "fget", "reference", "__wrapped__")
        found = next(getattr(found, name) for name in names if hasattr(found, name))
    return found
