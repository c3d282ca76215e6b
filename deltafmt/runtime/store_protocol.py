"""What the residency of deltas asks of whoever loads, copies and drops them."""

from __future__ import annotations

import threading
from typing import Protocol, TypeVar


class Sized(Protocol):
    """Something that takes a known number of bytes."""

    @property
    def nbytes(self) -> int:
        """Bytes taken."""


class Fence(Protocol):
    """Work of a device that may still be under way."""

    def query(self) -> bool:
        """Tell whether it is done."""

    def synchronize(self) -> None:
        """Wait until it is done."""


V = TypeVar("V", bound=Sized)
H = TypeVar("H", bound=Sized)


class Store(Protocol[V, H]):
    """How values come and go; everything but ``nbytes`` and ``fence`` is called by the worker thread alone."""

    def nbytes(self, name: str) -> int:
        """Return the bytes that a value will take on the device."""

    def load(self, name: str, cancel: threading.Event) -> V:
        """Bring a value to the device from its file; usable by every stream when this returns."""

    def to_host(self, name: str, value: V) -> H:
        """Return a copy in host memory."""

    def to_device(self, name: str, host: H) -> V:
        """Bring a value to the device from its copy in host memory."""

    def evicted(self, name: str) -> None:
        """Forget every reference to a value; its memory is reused after this."""

    def fence(self) -> Fence | None:
        """Return a fence behind what the calling thread has started on the device, if it has one."""
