"""Residency: the deltas on a device, within a budget of bytes.

If the budget has no room, the least recently used delta leaves, but never one that is in use. This module knows neither
torch nor models: a *store* loads, copies and drops the values. One worker thread runs the store's operations in the
order of the requests, so the device never holds more than the budget, and callers go on computing.

A *lease* keeps its deltas on the device. A caller gets a lease of all the deltas that it names, or of none, so two
threads cannot each hold a delta that the other waits for.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic

from deltafmt.errors import NoRoomError, UsageError
from deltafmt.runtime.eviction import drop_host_copies, victims_for
from deltafmt.runtime.leases import Item, Lease, Victim, listed
from deltafmt.runtime.store_protocol import Fence, H, Store, V


class Residency(Generic[V, H]):
    """Values on the device by name.

    Args:
        store: the store that loads, copies and drops the values.
        budget: the bytes that the device may hold; None for no limit.
        host_budget: the bytes of copies in host memory, from which an evicted value comes back quickly; 0 for none.
    """

    def __init__(self, store: Store[V, H], budget: int | None = None, host_budget: int = 0) -> None:
        if budget is not None and budget < 1:
            raise UsageError(f"budget {budget} is not a positive number of bytes")
        if host_budget < 0:
            raise UsageError(f"host budget {host_budget} is negative")
        self.budget = budget
        self.host_budget = host_budget
        self._store = store
        self._items: dict[str, Item[V, H]] = {}
        self._changed = threading.Condition()
        self._cancel = threading.Event()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="deltafmt-residency")
        self._used = 0
        self._clock = 0

    @property
    def used(self) -> int:
        """Bytes on the device, including those that are being loaded."""
        return self._used

    def resident(self) -> list[str]:
        """Return the names on the device, least recently used first."""
        with self._changed:
            found = [(item.last_use, name) for name, item in self._items.items() if item.value is not None]
        return [name for _, name in sorted(found)]

    def knows(self, name: str) -> bool:
        """Tell whether a name is known."""
        with self._changed:
            return name in self._items

    def loading(self, name: str) -> bool:
        """Tell whether a value is on its way to the device."""
        with self._changed:
            return self._item(name).loading

    def add(self, name: str) -> None:
        """Make a name known; nothing is loaded yet.

        Raises:
            UsageError: the name is known already, or its value alone exceeds the budget.
        """
        size = self._store.nbytes(name)
        with self._changed:
            self._check_open()
            if name in self._items:
                raise UsageError(f'there is a delta "{name}" already')
            if self.budget is not None and size > self.budget:
                raise UsageError(f'delta "{name}" takes {size} bytes where the budget is {self.budget}')
            self._items[name] = Item(size)

    def remove(self, name: str) -> None:
        """Forget a name and free its memory.

        Raises:
            UsageError: the name is unknown or in use.
        """
        with self._changed:
            self._check_open()
            self._changed.wait_for(lambda: not self._item(name).loading)
            item = self._item(name)
            if item.leases:
                raise UsageError(f'delta "{name}" is in use')
            del self._items[name]
            victims = [self._take(name, item)] if item.value is not None else []
            done = self._worker.submit(self._drop, victims, keep=False)
        done.result()

    def prefetch(self, name: str) -> bool:
        """Start to load a value and return at once; return False if deltas in use leave no room for it.

        Raises:
            UsageError: the name is unknown.
        """
        with self._changed:
            self._check_open()
            item = self._item(name)
            if item.value is None and not item.loading:
                if (victims := self._room([name])) is None:
                    return False
                self._start([name], victims)
            self._touch(item)
            return True

    def acquire(self, names: Iterable[str], wait: float = 0) -> Lease[V]:
        """Return a lease of values, all of which are on the device and usable by every stream.

        Args:
            names: the values' names; a name that is given twice counts once.
            wait: seconds to wait for other leases to be released, if there is no room.

        Raises:
            UsageError: a name is unknown, or the values together exceed the budget.
            NoRoomError: the deltas in use leave no room.
            DeltafmtError: loading one of the values failed.
        """
        wanted = list(dict.fromkeys(names))
        deadline = time.monotonic() + wait
        with self._changed:
            self._reserve(wanted, deadline)
            try:
                values = {name: self._await(name) for name in wanted}
            except BaseException:
                self._give_back(wanted, None)
                raise
        return Lease(values, self._release)

    def close(self) -> None:
        """Free everything and cancel the loads that are under way.

        Raises:
            UsageError: a delta is in use.
        """
        with self._changed:
            busy = [name for name, item in self._items.items() if item.leases and not item.loading]
            if busy:
                raise UsageError(f'delta "{busy[0]}" is in use')
            self._cancel.set()
            self._changed.notify_all()
        self._worker.shutdown(wait=True)
        with self._changed:
            victims = [self._take(name, item) for name, item in self._items.items() if item.value is not None]
            self._items = {}
        self._drop(victims, keep=False)

    def _check_open(self) -> None:
        if self._cancel.is_set():
            raise UsageError("the deltas are closed")

    def _item(self, name: str) -> Item[V, H]:
        if name not in self._items:
            known = ", ".join(self._items) or "none"
            raise UsageError(f'there is no delta "{name}"; known: {known}')
        return self._items[name]

    def _touch(self, item: Item[V, H]) -> None:
        self._clock += 1
        item.last_use = self._clock

    def _reserve(self, names: list[str], deadline: float) -> None:
        """Wait for room for all names, lease them all and start to load the missing ones."""
        while True:
            self._check_open()
            items = [self._item(name) for name in names]
            total = sum(item.size for item in items)
            if self.budget is not None and total > self.budget:
                raise UsageError(f"{listed(names)} take {total} bytes together where the budget is {self.budget}")
            missing = [name for name in names if self._items[name].value is None and not self._items[name].loading]
            victims = self._room(missing, keep=names)
            if victims is not None:
                break
            # A value that is being prefetched can be evicted once it has arrived: wait for it, whatever the deadline.
            if any(item.loading and not item.leases for item in self._items.values()):
                self._changed.wait()
            elif not self._changed.wait(max(deadline - time.monotonic(), 0)) and time.monotonic() >= deadline:
                busy = [name for name, item in self._items.items() if item.leases]
                raise NoRoomError(
                    f"no room for {listed(missing)}: {listed(busy)} in use hold {self._used} bytes of {self.budget}"
                )
        for item in items:
            item.leases += 1
            self._touch(item)
        self._start(missing, victims)

    def _room(self, names: list[str], keep: Sequence[str] = ()) -> list[str] | None:
        """Return the names to evict so that others fit, or None if that is impossible now."""
        return victims_for(self._items, names, self._used, self.budget, keep)

    def _start(self, names: list[str], victims: list[str]) -> None:
        taken = [self._take(name, self._items[name]) for name in victims]
        for name in names:
            item = self._items[name]
            item.loading, item.error = True, None
            self._used += item.size
            self._worker.submit(self._load, name, item, taken)
            taken = []

    def _take(self, name: str, item: Item[V, H]) -> Victim[V]:
        """Mark a value as gone; the worker drops it before anything is loaded in its place."""
        assert item.value is not None
        victim = Victim(name, item.value, item.fences)
        item.value, item.fences = None, []
        self._used -= item.size
        return victim

    def _await(self, name: str) -> V:
        item = self._items[name]
        self._changed.wait_for(lambda: not item.loading or self._cancel.is_set())
        if item.value is None:
            self._check_open()
            assert item.error is not None
            raise item.error
        return item.value

    def _release(self, names: list[str]) -> None:
        fence = self._store.fence()
        with self._changed:
            self._give_back(names, fence)

    def _give_back(self, names: list[str], fence: Fence | None) -> None:
        for name in names:
            if name in self._items:  # missing if the residency was closed in the meantime
                self._items[name].release(fence)
        self._changed.notify_all()

    def _load(self, name: str, item: Item[V, H], victims: list[Victim[V]]) -> None:
        """Drop the victims, then load a value; runs in the worker thread."""
        value: V | None = None
        error: BaseException | None = None
        try:
            self._drop(victims)
            self._check_open()
            host = item.host
            value = self._store.load(name, self._cancel) if host is None else self._store.to_device(name, host)
        except BaseException as caught:  # noqa: BLE001 - the thread that waits for the value raises it
            error = caught
            traceback.clear_frames(error.__traceback__)  # the frames would keep memory of the device alive
        with self._changed:
            item.value, item.error, item.loading = value, error, False
            self._used -= item.size
            if value is not None:
                item.size = value.nbytes
                self._used += item.size
            self._changed.notify_all()

    def _drop(self, victims: list[Victim[V]], *, keep: bool = True) -> None:
        """Drop values once the kernels that read them are done; runs in the worker thread."""
        failed: Exception | None = None
        while victims:
            victim = victims.pop()
            try:
                for fence in victim.fences:
                    fence.synchronize()
                if keep:
                    self._keep_copy(victim)
            except Exception as error:  # noqa: BLE001 - raised when the other values are dropped
                failed = failed or error
            self._store.evicted(victim.name)
        if failed is not None:
            raise failed

    def _keep_copy(self, victim: Victim[V]) -> None:
        """Copy a value to host memory, if its budget allows one such copy; runs in the worker thread."""
        size = victim.value.nbytes
        with self._changed:
            item = self._items.get(victim.name)
            if item is None or item.host is not None or size > self.host_budget:
                return
            drop_host_copies(self._items, size, self.host_budget)
        host = self._store.to_host(victim.name, victim.value)
        with self._changed:
            item.host = host
