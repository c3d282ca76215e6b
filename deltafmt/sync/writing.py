"""A file that appears under its name whole and on disk, or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from deltafmt.output import Bytes, storage_error, sync_folder


def write_durably(path: Path, data: Bytes, *, sync: bool = True) -> None:
    """Write a file, and replace one of the same name in one step.

    Args:
        path: the file.
        data: its bytes.
        sync: wait until they are on disk.

    Raises:
        StorageError: writing failed; the file that was there is as it was.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
        if sync:
            sync_folder(path.parent)
    except OSError as error:
        raise storage_error("cannot write", path, error) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
