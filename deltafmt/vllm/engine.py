"""What the plugin puts into vLLM's engine, which hands requests to the scheduler.

A request whose delta cannot be loaded is refused before a step has it, because an error in a step ends the engine.
And the prefix cache tells deltas apart by their content ids, whatever they are called and wherever they lie.
"""

from __future__ import annotations

import importlib
import logging
import threading
from typing import Any, Final

from deltafmt.errors import DeltafmtError
from deltafmt.runtime.wrapping import wrap_method
from deltafmt.vllm import seam
from deltafmt.vllm.names import ContentIds, delta_path, is_delta

_log = logging.getLogger("deltafmt")

# Adapters that are remembered; one that is forgotten is only loaded once more.
MOST_KNOWN: Final = 100_000


class Known:
    """The deltas that an engine has loaded, and what the keys of the prefix cache say of them.

    A delta that is loaded again under its name gets a new key: requests that were under way have begun with the old
    one.
    """

    def __init__(self) -> None:
        self._ids = ContentIds()
        self._keys: dict[tuple[str, str], str] = {}
        self._ready: set[tuple[int, str]] = set()
        self._loads = 0
        self._lock = threading.Lock()

    def key(self, lora_request: Any) -> str:
        """Return what tells a delta's blocks from all others; asked by the thread that takes requests in."""
        path = delta_path(lora_request.lora_path)
        named = lora_request.lora_name, path
        with self._lock:
            found = self._keys.get(named)
            if found is None:
                try:
                    found = f"deltafmt {self._ids.read(path)}"
                except DeltafmtError:
                    # Whoever loads it says what is wrong; nothing shares its blocks.
                    self._loads += 1
                    return f"deltafmt {path} {self._loads}"
                self._keep(self._keys, named, found)
            return found

    def is_ready(self, lora_request: Any) -> bool:
        """Tell whether a delta was loaded as this adapter before."""
        with self._lock:
            return (lora_request.lora_int_id, delta_path(lora_request.lora_path)) in self._ready

    def note_loaded(self, lora_request: Any, *, again: bool) -> None:
        """Note that a delta was loaded.

        Args:
            lora_request: the adapter.
            again: True if it was loaded in the place of the one before.
        """
        path = delta_path(lora_request.lora_path)
        named = lora_request.lora_name, path
        with self._lock:
            if len(self._ready) >= MOST_KNOWN:
                self._ready.clear()
            self._ready.add((lora_request.lora_int_id, path))
            if again and named in self._keys:
                # Whatever the file is by now: nothing that was computed before is found under this.
                self._loads += 1
                self._keys[named] = f"deltafmt {path} {self._loads}"

    def _keep(self, keys: dict[tuple[str, str], str], named: tuple[str, str], found: str) -> None:
        if len(keys) >= MOST_KNOWN:
            keys.pop(next(iter(keys)))
        keys[named] = found


_known = Known()


def install_engine() -> None:
    """Put checks before the scheduler, and content ids into the keys of the prefix cache."""
    core = seam.name("vllm.v1.engine.core", "EngineCore")
    wrap_method(core, "add_lora", _add_lora)
    wrap_method(core, "add_request", _add_request)
    wrap_method(seam.name("vllm.v1.engine.llm_engine", "LLMEngine"), "add_request", _add_here)
    wrap_method(importlib.import_module("vllm.v1.core.kv_cache_utils"), "_gen_lora_extra_hash_keys", _keys)


def _keys(own: Any, request: Any) -> Any:
    lora_request = request.lora_request
    if lora_request is None or not is_delta(lora_request.lora_path):
        return own(request)
    return [_known.key(lora_request)]


def _add_lora(own: Any, core: Any, lora_request: Any) -> Any:
    found = own(core, lora_request)
    if is_delta(lora_request.lora_path):
        _known.note_loaded(lora_request, again=bool(lora_request.load_inplace))
    return found


def _add_request(own: Any, core: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    lora_request = request.lora_request
    if lora_request is not None and is_delta(lora_request.lora_path) and not _known.is_ready(lora_request):
        try:
            core.model_executor.add_lora(lora_request)
            _known.note_loaded(lora_request, again=False)
        except Exception as error:
            if not isinstance(core, seam.name("vllm.v1.engine.core", "EngineCoreProc")):
                raise
            _log.error('request %s for delta "%s" is refused: %s', request.request_id, lora_request.lora_name, error)
            core._send_error_outputs_to_client([request.request_id], request.client_index)  # noqa: SLF001
            return None
    return own(core, request, *args, **kwargs)


def _add_here(own: Any, engine: Any, *args: Any, **kwargs: Any) -> Any:
    """Add a request to an engine of this process; one that the core refuses is not waited for."""
    outputs = engine.output_processor
    before = len(outputs.request_states)
    try:
        return own(engine, *args, **kwargs)
    except Exception:
        refused = list(outputs.request_states)[before:]
        if refused:
            engine.engine_core.abort_requests(outputs.abort_requests(refused, internal=True))
        raise
