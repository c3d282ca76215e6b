"""Delta files that were loaded once, kept open: a file that is deleted or replaced later is still read.

vLLM drops adapters from host memory and loads them again by their path, in the middle of a step. The path may lead
nowhere by then, or to another delta.
"""

from __future__ import annotations

import os
import stat
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from deltafmt.errors import StorageError, UsageError
from deltafmt.output import storage_error


class Identified(Protocol):
    """What was loaded from a file."""

    @property
    def content_id(self) -> str:
        """The file's content id."""


T = TypeVar("T", bound=Identified)


@dataclass(slots=True)
class _Known:
    """A file that was loaded.

    Attributes:
        path: its path.
        content_id: its content id.
        handle: the open file; None if it was closed to make room.
    """

    path: str
    content_id: str
    handle: int | None


class FileHandles:
    """The files of a worker's deltas, by the numbers of the adapters.

    Args:
        most: the number of files that are kept open; those that were not loaded for longest are closed first.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: OrderedDict[int, _Known] = OrderedDict()

    @property
    def count(self) -> int:
        """The number of open files."""
        return sum(known.handle is not None for known in self._known.values())

    def load(
        self,
        number: int,
        path: str,
        load: Callable[[str], T],
        *,
        again: bool = False,
        agree: Callable[[str], bool] = lambda _: True,
    ) -> T:
        """Load a file, and keep it open.

        Args:
            number: the adapter's number.
            path: the file.
            load: loads from a path, which is that of the open file.
            again: True to load what the path leads to now, although the adapter was loaded before. If that fails, the
                adapter stays what it was.
            agree: given the content id that was loaded, or "" if none could be, tells whether all processes of the
                engine have loaded the same. It waits for them, so it is called once, whatever else happens.

        Raises:
            StorageError: there is no such file, it is no longer the one that was loaded as this adapter, or another
                process has loaded another one or none.
            UsageError: another path was loaded as this adapter.
        """
        known = None if again else self._known.get(number)
        handle = known.handle if known is not None else None
        opened = handle is None
        asked = False
        try:
            if known is not None:
                self.check(number, path)
            if handle is None:
                handle = _open(path)
            found = load(f"/proc/self/fd/{handle}")
            if known is not None and known.content_id != found.content_id:
                raise StorageError(
                    f"{path} changed since it was loaded: content id {found.content_id[:16]}, "
                    f"not {known.content_id[:16]}; load it in place to serve the new one"
                )
            asked = True
            if not agree(found.content_id):
                raise StorageError(f"{path}: the engine's processes have not all loaded the same file; load it again")
        except BaseException:
            try:
                if not asked:
                    agree("")
            finally:
                if opened and handle is not None:
                    os.close(handle)
            raise
        if opened:
            self.forget(number)
        self._known[number] = _Known(path, found.content_id, handle)
        self._known.move_to_end(number)
        self._close_some()
        return found

    def sharing(self, number: int) -> tuple[str, set[int]]:
        """Return the content id of an adapter, and the numbers of all adapters that have it; "" and none if unknown."""
        known = self._known.get(number)
        if known is None:
            return "", set()
        return known.content_id, {other for other, one in self._known.items() if one.content_id == known.content_id}

    def path(self, number: int, given: str) -> str:
        """Return the path that was loaded as an adapter; the given one if none was."""
        known = self._known.get(number)
        return given if known is None else known.path

    def check(self, number: int, path: str) -> None:
        """Refuse an adapter's number for a second path: the engine takes it for the first delta.

        Raises:
            UsageError: another path was loaded as this adapter.
        """
        first = self.path(number, path)
        if first != path:
            raise UsageError(f"adapter {number} is {first}; give {path} a number of its own, or load it in place")

    def forget(self, number: int) -> None:
        """Close the file of an adapter."""
        known = self._known.pop(number, None)
        if known is not None and known.handle is not None:
            os.close(known.handle)

    def close(self) -> None:
        """Close all files."""
        for number in list(self._known):
            self.forget(number)

    def _close_some(self) -> None:
        spare = self.count - self._most
        for known in self._known.values():
            if spare <= 0:
                break
            if known.handle is not None:
                os.close(known.handle)
                known.handle = None
                spare -= 1


def _open(path: str) -> int:
    try:
        # Without waiting for the other end of a pipe.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise storage_error("opening", path, error) from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise StorageError(f"{path} is not a regular file")
    return handle
