"""The parts of the residency: the state of each delta, and the leases that keep deltas on the device.

The classes know nothing of deltas: a *value* is what a store loads (:mod:`deltafmt.runtime.store_protocol`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Self

from deltafmt.runtime.store_protocol import Fence, H, V


@dataclass(slots=True, eq=False)
class Item(Generic[V, H]):
    """The state of one named value.

    Attributes:
        size: the value's bytes; they count against the budget while the value is set or loading.
        value: the value on the device, if it is there.
        host: the copy in host memory, if there is one.
        loading: True while the value is on its way to the device.
        error: the error that the last load ended with, if it failed.
        leases: the number of leases that hold the value.
        last_use: a counter that is higher for values that were used later.
        fences: work on the device that may still read the value.
    """

    size: int
    value: V | None = None
    host: H | None = None
    loading: bool = False
    error: BaseException | None = None
    leases: int = 0
    last_use: int = 0
    fences: list[Fence] = field(default_factory=list)

    def release(self, fence: Fence | None) -> None:
        """Count one lease less; ``fence`` marks the end of the work that used the value."""
        self.leases -= 1
        if fence is not None:
            self.fences = [*(before for before in self.fences if not before.query()), fence]


@dataclass(frozen=True, slots=True, eq=False)
class Victim(Generic[V]):
    """A value that was chosen to leave and still has to be dropped by the worker thread."""

    name: str
    value: V
    fences: list[Fence]


class Lease(Generic[V]):
    """Deltas that stay on the device until :meth:`release`; a context manager."""

    def __init__(self, values: Mapping[str, V], release: Callable[[list[str]], None]) -> None:
        self.values = dict(values)
        self._release = release

    def release(self) -> None:
        """Release the deltas; a second call does nothing."""
        names, self.values = list(self.values), {}
        if names:
            self._release(names)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def listed(names: list[str]) -> str:
    """Return names in quotes, joined by commas, for a message."""
    return ", ".join(f'"{name}"' for name in names)
