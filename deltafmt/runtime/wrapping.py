"""Methods of objects of transformers that calls reach through a method of ours."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def wrap_method(owner: Any, name: str, method: Callable[..., Any]) -> None:
    """Let calls of a method go to another one, which is given the first."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return method(original, *args, **kwargs)

    owner.__dict__[name] = wrapped
