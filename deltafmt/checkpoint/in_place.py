"""A checkpoint folder that is patched in place: the old state or the new one, whenever the process ends.

The new state is made whole under a hidden name beside the folder. Files that stay are there by hard links. Then the two
folders exchange their names in one step. A program that has the old files open goes on with the old state.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Collection
from pathlib import Path

from deltafmt.errors import StorageError, UsageError
from deltafmt.output import sync_folder

# What the lock file says once the new state is whole, where two folders cannot exchange their names in one step.
WHOLE = b"whole\n"
# The errors of a file system, or of a boundary between two, over which there are no hard links.
_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def partial_of(path: Path) -> Path:
    """Return the folder in which the new state of a folder is made."""
    return path.parent / f".{path.name}.partial"


def lock_of(path: Path) -> Path:
    """Return the lock file of whoever makes the new state of a folder."""
    return path.parent / f".{path.name}.partial.lock"


def replaced_of(path: Path) -> Path:
    """Return where the old state lies where two folders cannot exchange their names in one step."""
    return path.parent / f".{path.name}.replaced"


class PatchedFolder:
    """The files of a folder that stay as they are while its weights are replaced.

    Args:
        path: the folder.
        replaced: the paths in it of the weight files that the new state does not keep.

    Raises:
        StorageError: the folder cannot be read.
        UsageError: it holds what can be neither linked nor copied, such as a socket.
    """

    def __init__(self, path: Path, replaced: Collection[str]) -> None:
        self.path = path
        self._replaced = frozenset(replaced)
        self._found = self._look()

    def fill(self, partial: Path) -> None:
        """Bring every file that stays into the folder of the new state, which may have a newer one of the same name.

        Raises:
            StorageError: the folder changed meanwhile.
            OSError: linking or copying failed.
        """
        for name, mode in self._found.items():
            source, target = self.path / name, partial / name
            if os.path.lexists(target):
                if stat.S_ISREG(mode):
                    shutil.copymode(source, target)
                continue
            if name in self._replaced:
                continue
            if stat.S_ISDIR(mode):
                target.mkdir()
            elif stat.S_ISLNK(mode):
                os.symlink(os.readlink(source), target)
            else:
                _link(source, target)
        for name, mode in self._found.items():
            if stat.S_ISDIR(mode):
                shutil.copystat(self.path / name, partial / name)
        shutil.copystat(self.path, partial)
        self.check()

    def check(self) -> None:
        """Check that the folder holds the names that it held at first.

        Raises:
            StorageError: it does not.
        """
        if self._look() != self._found:
            raise StorageError(f"{self.path} changed while it was being patched")

    def _look(self) -> dict[str, int]:
        """Return the types of all files and folders below the folder, by their paths in it; a folder stands first."""
        found: dict[str, int] = {}
        for folder, folders, files in os.walk(self.path, onerror=_raise):
            for name in (*folders, *files):
                path = os.path.join(folder, name)
                mode = stat.S_IFMT(os.lstat(path).st_mode)
                if mode not in (stat.S_IFDIR, stat.S_IFLNK, stat.S_IFREG):
                    raise UsageError(f"{path} is no file, folder or link; write a new folder")
                found[os.path.relpath(path, self.path)] = mode
        return found


def _raise(error: OSError) -> None:
    raise error


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copy2(source, target)
        with open(target, "rb") as file:
            os.fsync(file.fileno())


def needs_recovery(path: Path) -> bool:
    """Tell whether a run that was killed has left something beside a folder."""
    return any(os.path.lexists(name) for name in (partial_of(path), replaced_of(path), lock_of(path)))


def recover(path: Path) -> bool:
    """Finish what a killed run left if the folder has no name, and remove all that it left. The caller has the lock.

    Returns:
        True if the folder is now the new state, which had no name.

    Raises:
        OSError: renaming failed.
    """
    partial, old = partial_of(path), replaced_of(path)
    finished = False
    if not path.exists() and partial.is_dir() and old.is_dir() and lock_of(path).read_bytes() == WHOLE:
        partial.rename(path)
        sync_folder(path.parent)
        finished = True
    if path.exists():
        # Without the folder, these may be all that is left of it.
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return finished
