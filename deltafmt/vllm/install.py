"""Putting the plugin into vLLM's modules, once in each process."""

from __future__ import annotations

import functools
import logging
from typing import Any

from deltafmt.vllm import seam

_log = logging.getLogger("deltafmt")
_done = False


def install() -> None:
    """Put deltas into vLLM; warn and do nothing where its version is not supported."""
    global _done  # noqa: PLW0603 - vLLM may call this several times in a process
    if _done:
        return
    _done = True
    if reason := seam.refusal(seam.installed()):
        _log.warning("deltafmt serves no deltas here: %s", reason)
        return
    from deltafmt.vllm.engine import install_engine
    from deltafmt.vllm.resolver import install_resolver
    from deltafmt.vllm.worker import install_worker

    install_worker()
    install_engine()
    install_resolver()


def wrap(owner: Any, name: str, around: Any) -> None:
    """Put a function around a method or a function: ``around(own, *args, **kwargs)``."""
    own = getattr(owner, name)

    @functools.wraps(own)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(own, *args, **kwargs)

    setattr(owner, name, wrapped)
