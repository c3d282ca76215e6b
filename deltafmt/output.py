"""What every output needs: errors in one line, a lock against a second writer, durable renames."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from deltafmt.errors import StorageError, UsageError

# What a sink takes.
Bytes = bytes | bytearray | memoryview

# What a file system without locks answers; writing then goes on without one.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


def reason(error: Exception) -> str:
    """Return the system's reason for an error, in lower case."""
    return (getattr(error, "strerror", None) or str(error)).lower()


def storage_error(what: str, name: object, error: Exception) -> StorageError:
    """Turn an OSError into one line that names the file and the system's reason."""
    return StorageError(f"{what} {name}: {reason(error)}")


class OutputLock:
    """A lock file beside an output that only one writer can hold.

    Args:
        path: of the lock file, which may hold the writer's own notes.
        output: what is being written, for the message.

    Raises:
        UsageError: another process holds it.
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, output: Path) -> None:
        self.path = path
        self.file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644), "a+b")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A writer that finishes removes the file; what was opened before that locks nothing.
            if os.fstat(self.file.fileno()).st_ino != os.stat(path).st_ino:
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError):
            self.file.close()
            raise UsageError(f"another process is writing {output}") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                self.file.close()
                raise

    def remove(self) -> None:
        """Remove the lock file and let go of it."""
        self.path.unlink(missing_ok=True)
        self.file.close()

    def keep(self) -> None:
        """Let go of the lock and leave the file."""
        self.file.close()


def sync_folder(path: Path) -> None:
    """Make a rename in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
