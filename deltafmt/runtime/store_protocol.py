"""The protocol between the residency and a store, which loads, copies and drops values."""

from __future__ import annotations

import threading
from typing import Protocol, TypeVar


class Sized(Protocol):
    """Something that takes a known number of bytes."""

    @property
    def nbytes(self) -> int:
        """The number of bytes."""


class Fence(Protocol):
    """A mark in a device's work, which may still be under way; a CUDA event is one."""

    def query(self) -> bool:
        """Tell whether the work before the mark is done."""

    def synchronize(self) -> None:
        """Wait until the work before the mark is done."""


V = TypeVar("V", bound=Sized)
H = TypeVar("H", bound=Sized)


class Store(Protocol[V, H]):
    """A store of values by name; only the worker thread calls it, except for ``nbytes`` and ``fence``."""

    def nbytes(self, name: str) -> int:
        """Return the bytes that a value will take on the device."""

    def load(self, name: str, cancel: threading.Event) -> V:
        """Bring a value from its file to the device; every stream can use it when this returns."""

    def to_host(self, name: str, value: V) -> H:
        """Return a copy of a value in host memory."""

    def to_device(self, name: str, host: H) -> V:
        """Bring a value from its copy in host memory to the device."""

    def evicted(self, name: str) -> None:
        """Drop every reference to a value: its memory is reused from now on."""

    def fence(self) -> Fence | None:
        """Return a fence behind the work that the calling thread has started; None if the device has no fences."""
