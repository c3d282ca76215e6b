"""How deltas are asked for: by a path that ends in ``.deltafmt``, perhaps with the content id that it must have."""

from __future__ import annotations

import os
from typing import Final

from deltafmt.container.reader import Container
from deltafmt.errors import StorageError

SUFFIX: Final = ".deltafmt"


def is_delta(path: str) -> bool:
    """Tell whether a path that an adapter is asked for by is that of a delta."""
    return path.endswith(SUFFIX)


def delta_path(path: str) -> str:
    """Return the absolute path of a delta's file."""
    return os.path.abspath(os.path.expanduser(path))


class ContentIds:
    """Content ids of files, each read once for every state of the file."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[tuple[int, ...], str]] = {}

    def read(self, path: str) -> str:
        """Return the content id of a delta file; the index is read, and no tensor.

        Raises:
            StorageError, InvalidFileError: the file cannot be read, or its index is not valid.
        """
        try:
            found = os.stat(path)
        except OSError as error:
            raise StorageError(f"{path}: {error.strerror}") from error
        state = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
        known = self._known.get(path)
        if known is None or known[0] != state:
            with Container(path, mmap=False) as container:
                known = self._known[path] = state, container.content_id.hex()
        return known[1]
