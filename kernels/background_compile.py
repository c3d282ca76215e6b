"""Kernels that are compiled beside the requests, and whether a product may launch its kernels yet.

Once a device was warmed up, no request compiles: a product whose kernels are not loaded is computed from decoded
deltas, which is slower and right, while a process beside this one compiles what is missing. A device that was not
warmed up compiles at the first launch, and a line in the log says so.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable

import torch

from deltafmt.errors import DeltafmtError
from deltafmt.kernels.compiling import compile_variants, load_variants, target_of
from deltafmt.kernels.variants import Variant, collecting, is_collecting

_log = logging.getLogger("deltafmt")


class Loaded:
    """The variants that are loaded on a device; those that are missing come by and by.

    Args:
        fetch: compiles variants and loads them; called in a thread.
    """

    def __init__(self, fetch: Callable[[list[Variant]], None]) -> None:
        self._fetch = fetch
        self._known: set[Variant] = set()
        self._wanted: dict[Variant, None] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, variants: Iterable[Variant]) -> None:
        """Note that variants are loaded."""
        with self._lock:
            self._known |= set(variants)

    def has(self, variants: Iterable[Variant]) -> bool:
        """Return True if variants are loaded; otherwise have them fetched."""
        missing = [variant for variant in variants if variant not in self._known]
        if not missing:
            return True
        with self._lock:
            new = [one for one in missing if one not in self._known and one not in self._wanted]
            self._wanted |= dict.fromkeys(new)
            if new and self._thread is None:
                self._thread = threading.Thread(target=self._work, name="deltafmt-kernels", daemon=True)
                self._thread.start()
        return False

    def join(self) -> None:
        """Wait until nothing is being fetched."""
        while (thread := self._thread) is not None:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._lock:
                batch = [one for one in self._wanted if one not in self._known]
                if not batch:
                    self._wanted.clear()
                    self._thread = None
                    return
            try:
                self._fetch(batch)
            except Exception as error:  # noqa: BLE001 - the launch itself will raise it where somebody sees it
                _log.warning("kernels could not be compiled beside the requests: %s", error)
            self.add(batch)


_loaded: dict[torch.device, Loaded] = {}


def _fetch(device: torch.device, variants: list[Variant]) -> None:
    names = ", ".join(sorted({variant.name for variant in variants}))
    _log.warning("compiling %s, which no warm-up has; requests that need it are slower until it is there", names)
    failed = next((one for one in compile_variants(variants, target_of(device)) if one.error), None)
    if failed is not None:
        raise DeltafmtError(f"{failed.variant.name}: {failed.error}")
    load_variants(variants, device)


def warmed(device: torch.device, variants: Iterable[Variant]) -> None:
    """Note that variants are loaded on a device; from now on, its products wait for no compilation."""
    if device not in _loaded:
        _loaded[device] = Loaded(lambda missing: _fetch(device, missing))
    _loaded[device].add(variants)


def may_launch(device: torch.device, launch: Callable[[], object]) -> bool:
    """Return False if a product must not launch its kernels yet, because the device's warm-up did not bring them.

    Args:
        device: where the product is made.
        launch: launches the kernels; called while variants are collected, which launches none.
    """
    loaded = _loaded.get(device)
    if loaded is None or is_collecting():
        return True
    with collecting() as found:
        launch()
    return loaded.has(found)
