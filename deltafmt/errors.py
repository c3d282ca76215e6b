"""The exception tree, and the exit code that the command line gives for each class.

::

    DeltafmtError               (exit code)
    ├── UsageError              2   an argument or a combination of arguments is wrong
    │   ├── MissingExtraError   2   an optional package is missing; names the extra that brings it
    │   └── NonFiniteError      2   a delta holds NaN or infinity and is not kept exactly
    ├── InvalidFileError        3   a file breaks its format: what, and where
    │   └── UnsupportedError    3   a valid file that needs a newer reader, or is of a kind that is not read
    ├── WrongBaseError          4   the base differs from the one that was packed against
    ├── StorageError            5   reading or writing failed: missing file, full disk
    └── CancelledError        130   the caller asked to stop

Messages start in lower case, name the offending value and where it stands, and end without a full stop.
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_INTERRUPTED = 130


class DeltafmtError(Exception):
    """Root of every error that deltafmt raises on purpose."""

    exit_code = 1


class UsageError(DeltafmtError, ValueError):
    """An argument, or a combination of arguments, is wrong."""

    exit_code = 2


class MissingExtraError(UsageError, ImportError):
    """An optional package is missing; the message names the extra that brings it."""


class NonFiniteError(UsageError):
    """A delta holds NaN or infinity; such a tensor can only be kept exactly."""


class InvalidFileError(DeltafmtError, ValueError):
    """A file breaks the rules of its format."""

    exit_code = 3


class UnsupportedError(InvalidFileError):
    """A file needs a reader newer than this one, or is of a kind that deltafmt does not read."""


class WrongBaseError(DeltafmtError, ValueError):
    """The base is not the one that the delta was computed against."""

    exit_code = 4


class StorageError(DeltafmtError, OSError):
    """Reading or writing failed."""

    exit_code = 5


class CancelledError(DeltafmtError):
    """The caller asked to stop before the work was done."""

    exit_code = EXIT_INTERRUPTED
