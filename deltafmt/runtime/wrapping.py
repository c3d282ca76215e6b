"""Wrapping a method of another library: calls reach it through a function of deltafmt."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def wrap_method(owner: Any, name: str, method: Callable[..., Any]) -> None:
    """Let calls of a method, or of a function of a module, go to another one: ``method(original, *args, **kwargs)``.

    Args:
        owner: an object, a class or a module.
        name: of its method or function.
        method: the other one.
    """
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return method(original, *args, **kwargs)

    setattr(owner, name, wrapped)
