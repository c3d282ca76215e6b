"""Putting the plugin into vLLM's modules, once in each process."""

from __future__ import annotations

import logging

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
