"""What the plugin puts into vLLM's engine, which hands requests to the scheduler.

A request whose delta cannot be loaded is refused before a step has it, because an error in a step ends the engine.
And the prefix cache tells deltas apart by their content ids, whatever they are called and wherever they lie.
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Callable
from typing import Any

from deltafmt.errors import DeltafmtError
from deltafmt.runtime.wrapping import wrap_method
from deltafmt.vllm import seam
from deltafmt.vllm.names import ContentIds, delta_path, is_delta

_log = logging.getLogger("deltafmt")


class Known:
    """The deltas that an engine has loaded, by the numbers of their adapters, and their keys in the prefix cache.

    The key of a delta is its content id. One that was loaded in the place of another gets a key that nothing shares,
    because requests that are under way have begun with the other; and so does one whose file was replaced while it was
    loaded.
    """

    def __init__(self) -> None:
        self._ids = ContentIds()
        self._keys: dict[int, str] = {}
        self._paths: dict[int, str] = {}
        self._loads = 0
        self._lock = threading.Lock()

    def key(self, lora_request: Any) -> str:
        """Return what tells a delta's blocks from all others; asked by the thread that takes requests in."""
        with self._lock:
            number = lora_request.lora_int_id
            if number not in self._keys:
                # Whoever loads a file that cannot be read says what is wrong; nothing shares its blocks.
                self._keys[number] = self._read(lora_request) or self._own(lora_request)
            return self._keys[number]

    def is_ready(self, lora_request: Any) -> bool:
        """Tell whether a delta was loaded as this adapter before."""
        with self._lock:
            return self._paths.get(lora_request.lora_int_id) == delta_path(lora_request.lora_path)

    def renew(self, lora_request: Any) -> None:
        """Give a delta a key that nothing shares, before another one is loaded in its place."""
        with self._lock:
            self._keys[lora_request.lora_int_id] = self._own(lora_request)

    def note_loaded(self, lora_request: Any, *, again: bool) -> None:
        """Note that a delta was loaded, for which :meth:`key` or :meth:`renew` was called before.

        Args:
            lora_request: the adapter.
            again: True if it was loaded in the place of the one before.
        """
        with self._lock:
            number = lora_request.lora_int_id
            self._paths[number] = delta_path(lora_request.lora_path)
            if not again and self._keys.get(number) != self._read(lora_request):
                self._keys[number] = self._own(lora_request)

    def note_failed(self, lora_request: Any) -> None:
        """Note that a delta could not be loaded; the next try reads its file anew."""
        with self._lock:
            if lora_request.lora_int_id not in self._paths:
                self._keys.pop(lora_request.lora_int_id, None)

    def _read(self, lora_request: Any) -> str | None:
        try:
            return f"deltafmt {self._ids.read(delta_path(lora_request.lora_path))}"
        except DeltafmtError:
            return None

    def _own(self, lora_request: Any) -> str:
        self._loads += 1
        return f"deltafmt {lora_request.lora_path} {self._loads}"


_known = Known()


def install_engine() -> None:
    """Put checks before the scheduler, and content ids into the keys of the prefix cache."""
    core = seam.name("vllm.v1.engine.core", "EngineCore")
    wrap_method(core, "add_lora", _add_lora)
    wrap_method(core, "add_request", _add_request)
    wrap_method(core, "remove_lora", _remove_lora)
    wrap_method(seam.name("vllm.v1.engine.llm_engine", "LLMEngine"), "add_request", _add_here)
    wrap_method(importlib.import_module("vllm.v1.core.kv_cache_utils"), "_gen_lora_extra_hash_keys", _keys)


def _keys(own: Any, request: Any) -> Any:
    lora_request = request.lora_request
    if lora_request is None or not is_delta(lora_request.lora_path):
        return own(request)
    request.deltafmt_key = getattr(request, "deltafmt_alone", None) or _known.key(lora_request)
    return [request.deltafmt_key]


def _name_anew(request: Any) -> None:
    """Make the names of a request's blocks again if another delta has its adapter's number now.

    They were made when the request came. The other delta's blocks must not be found by them. Nobody may find those that
    a request fills which has begun with one delta and goes on with the other.
    """
    key = _known.key(request.lora_request)
    if getattr(request, "deltafmt_key", None) not in (None, key):
        if request.num_computed_tokens:
            request.deltafmt_alone = f"{key} {request.request_id}"
        request.block_hashes = []
        request.update_block_hashes()


def _load(load: Callable[[Any], Any], lora_request: Any, *, again: bool) -> Any:
    """Load a delta, and note it.

    Raises:
        Exception: what loading it raised.
    """
    if again:
        _known.renew(lora_request)
    else:
        _known.key(lora_request)
    try:
        found = load(lora_request)
    except Exception:
        _known.note_failed(lora_request)
        raise
    _known.note_loaded(lora_request, again=again)
    return found


def _kinds(core: Any) -> dict[int, bool]:
    """Return the numbers of what was loaded, each with whether it is a delta."""
    found: dict[int, bool] = core.__dict__.setdefault("deltafmt_kinds", {})
    return found


def _check_number(core: Any, lora_request: Any) -> None:
    """Refuse a number of an adapter that belongs to a delta already, and the other way round.

    A worker would take one for the other: it asks whether it has an adapter of the number, and not of the path.

    Raises:
        ValueError: names the path.
    """
    wanted = is_delta(lora_request.lora_path)
    if _kinds(core).get(lora_request.lora_int_id, wanted) != wanted:
        first = "an adapter" if wanted else "a delta"
        raise ValueError(
            f"number {lora_request.lora_int_id} is that of {first}; give {lora_request.lora_path} a number of its own"
        )


def _take_number(core: Any, lora_request: Any) -> None:
    """Note whose number it is, of an adapter that was loaded or that a step is going to load."""
    _kinds(core)[lora_request.lora_int_id] = is_delta(lora_request.lora_path)


def _requests_of(core: Any, number: int) -> list[Any]:
    """Return the requests under way for an adapter."""
    given = core.scheduler.requests.values()
    return [one for one in given if one.lora_request is not None and one.lora_request.lora_int_id == number]


def _add_lora(own: Any, core: Any, lora_request: Any) -> Any:
    _check_number(core, lora_request)
    again = bool(lora_request.load_inplace)
    if not is_delta(lora_request.lora_path) or (_known.is_ready(lora_request) and not again):
        found = own(core, lora_request)
        _take_number(core, lora_request)
        return found
    found = _load(lambda given: own(core, given), lora_request, again=again)
    _take_number(core, lora_request)
    for request in _requests_of(core, lora_request.lora_int_id):
        _name_anew(request)
    return found


def _remove_lora(own: Any, core: Any, number: int) -> Any:
    """Remove an adapter, and free its number unless a request has it, for which a step loads the adapter again."""
    found = own(core, number)
    if not _requests_of(core, number):
        _kinds(core).pop(number, None)
    return found


def _add_request(own: Any, core: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    lora_request = request.lora_request
    if lora_request is None:
        return own(core, request, *args, **kwargs)
    try:
        _check_number(core, lora_request)
        if not is_delta(lora_request.lora_path):
            found = own(core, request, *args, **kwargs)
            _take_number(core, lora_request)
            return found
        if not _known.is_ready(lora_request):
            _load(core.model_executor.add_lora, lora_request, again=False)
        _take_number(core, lora_request)
    except Exception as error:
        if not isinstance(core, seam.name("vllm.v1.engine.core", "EngineCoreProc")):
            raise
        _log.error('request %s for "%s" is refused: %s', request.request_id, lora_request.lora_name, error)
        core._send_error_outputs_to_client([request.request_id], request.client_index)  # noqa: SLF001
        return None
    _name_anew(request)
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
