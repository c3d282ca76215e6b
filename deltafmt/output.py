"""Parts that every output needs: errors in one line, a lock against a second writer, durable renames."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path

from deltafmt.errors import StorageError, UsageError

# The types of bytes that a sink takes.
Bytes = bytes | bytearray | memoryview

# The errors of a file system that has no locks; writing then goes on without a lock.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)

# The errors of a file system that cannot sync a folder.
_NO_FOLDER_SYNC = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)


def reason(error: Exception) -> str:
    """Return the system's reason for an error in lower case, such as "no space left on device"."""
    return (getattr(error, "strerror", None) or str(error)).lower()


def storage_error(what: str, name: object, error: Exception) -> StorageError:
    """Return a StorageError whose one line names the failed step, the file and the system's reason."""
    return StorageError(f"{what} {name}: {reason(error)}")


def check_path(path: Path) -> None:
    """Refuse a path that no file can have, such as one with a name of 300 letters.

    Raises:
        StorageError: says why the system refuses it.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:  # a zero byte is no OSError
        raise storage_error("cannot write", path, error) from error


class OutputLock:
    """A lock file beside an output; only one writer can hold it.

    Args:
        path: the lock file, which may hold the writer's own notes.
        output: the output that is being written, for the message.

    Raises:
        UsageError: another process holds the lock.
        OSError: the lock file cannot be opened.
    """

    def __init__(self, path: Path, output: Path) -> None:
        self.path = path
        self.file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644), "a+b")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A writer that finishes removes the file. Whoever opened it before that holds a lock on nothing.
            if os.fstat(self.file.fileno()).st_ino != os.stat(path).st_ino:
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError):
            self.file.close()
            raise UsageError(f"another process is writing {output}") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                self.file.close()
                raise

    def note(self, data: bytes) -> None:
        """Write a note into the lock file, in the place of an earlier one, and sync it to disk.

        Raises:
            OSError: writing failed.
        """
        self.file.truncate(0)
        self.file.write(data)
        self.file.flush()
        os.fsync(self.file.fileno())

    def remove(self) -> None:
        """Remove the lock file and release the lock."""
        self.path.unlink(missing_ok=True)
        self.file.close()

    def keep(self) -> None:
        """Release the lock and leave the file."""
        self.file.close()


def sync_folder(path: Path) -> None:
    """Sync a folder to disk, so that a rename in it survives a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems, of network and of user space, cannot sync a folder.
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


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
