"""The parts of the residency: its books on each value, and the leases that keep values on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Self

from deltafmt.runtime.store import Fence, H, V


@dataclass(slots=True, eq=False)
class Item(Generic[V, H]):
    """State of one name; ``size`` counts against the budget while ``value`` is set or ``loading``."""

    size: int
    value: V | None = None
    host: H | None = None
    loading: bool = False
    error: BaseException | None = None
    leases: int = 0
    last_use: int = 0
    fences: list[Fence] = field(default_factory=list)

    def release(self, fence: Fence | None) -> None:
        """Count a lease as given back; ``fence`` stands behind what used the value."""
        self.leases -= 1
        if fence is not None:
            self.fences = [*(before for before in self.fences if not before.query()), fence]


@dataclass(frozen=True, slots=True, eq=False)
class Victim(Generic[V]):
    """A value that is out of the books and still has to be dropped."""

    name: str
    value: V
    fences: list[Fence]


class Lease(Generic[V]):
    """Deltas that stay on the device until :meth:`release`; a context manager."""

    def __init__(self, values: Mapping[str, V], release: Callable[[list[str]], None]) -> None:
        self.values = dict(values)
        self._release = release

    def release(self) -> None:
        """Give them back; a second call does nothing."""
        names, self.values = list(self.values), {}
        if names:
            self._release(names)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def listed(names: list[str]) -> str:
    """Return names as a message shows them."""
    return ", ".join(f'"{name}"' for name in names)
