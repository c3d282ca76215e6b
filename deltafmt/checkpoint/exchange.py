"""Two files or folders exchange their names in one step (renameat2 of Linux)."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

# The errors of a system or file system that cannot exchange two names.
_NO_EXCHANGE = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM)


def exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two files or folders in one step, so that neither name is ever without one.

    Returns:
        False if the system cannot do that; nothing was done then.

    Raises:
        OSError: it can, and failed.
    """
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    here, both = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename(here, os.fsencode(one), here, os.fsencode(other), both) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(other))
