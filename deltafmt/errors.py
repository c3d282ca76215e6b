"""The exception tree, and the exit code that the command line gives for each class.

::

    DeltafmtError               (exit code)
    ├── UsageError              2   an argument or a combination of arguments is wrong
    │   ├── MissingExtraError   2   an optional package is missing; names the extra that brings it
    │   ├── NonFiniteError      2   a delta holds NaN or infinity and is not stored whole
    │   ├── NoRoomError         2   the deltas in use leave no room on the device for another
    │   └── BehindError         2   a subscriber of weights could not follow, or has not answered
    ├── InvalidFileError        3   a file breaks its format: what, and where
    │   └── UnsupportedError    3   a valid file that needs a newer reader, or is of a kind that is not read
    ├── WrongBaseError          4   the base differs from the one that was packed against
    ├── StorageError            5   reading or writing failed: missing file, full disk
    └── CancelledError        130   the caller asked to stop

A message starts in lower case, names the offending value and where it stands, and ends without a full stop. It says
nothing of the command line: an error that an option would have prevented has a :class:`Remedy`.
"""

from __future__ import annotations

from typing import NamedTuple, Self

EXIT_OK = 0
EXIT_INTERRUPTED = 130


# No dataclass: importing dataclasses would add some milliseconds to ``deltafmt --help``.
class Remedy(NamedTuple):
    """A keyword argument of the function that failed, with which the call would go on.

    For example, ``pack`` refuses an output that exists with ``Remedy("force")``: ``pack(..., force=True)`` replaces it.

    Attributes:
        option: the argument's name.
        value: its value. For an argument that takes a list, such as ``exclude``, this is the item to add. None if the
            caller has to find the value, as for ``calibration``.
    """

    option: str
    value: object = True


# Characters of a message: what a file holds may be quoted in it, and a file can hold megabytes.
MAX_MESSAGE = 1000
_KEPT_BEFORE, _KEPT_AFTER = 700, 250


def shortened(message: str) -> str:
    """Return a message of one line and some hundred characters: of a longer one, its beginning and its end."""
    if not message.isprintable():  # a name in a file can hold a line feed
        message = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in message)
    if len(message) <= MAX_MESSAGE:
        return message
    left_out = len(message) - _KEPT_BEFORE - _KEPT_AFTER
    return f"{message[:_KEPT_BEFORE]} [{left_out:,} characters] {message[-_KEPT_AFTER:]}"


class DeltafmtError(Exception):
    """Root of every error that deltafmt raises on purpose.

    Args:
        message: what is wrong, and where.
        remedy: the argument that would help, if there is one.

    A message of more than 1,000 characters is cut in its middle. What is not printable in it is escaped.
    """

    exit_code = 1

    def __init__(self, message: str = "", remedy: Remedy | None = None) -> None:
        super().__init__(shortened(message))
        self.remedy = remedy

    def located(self, where: object) -> Self:
        """Return the same error with the place in front of its message: ``WHERE: MESSAGE``."""
        return type(self)(f"{where}: {self}", self.remedy)


class UsageError(DeltafmtError, ValueError):
    """An argument, or a combination of arguments, is wrong."""

    exit_code = 2


class MissingExtraError(UsageError, ImportError):
    """An optional package is missing; the message names the extra that brings it."""


class NonFiniteError(UsageError):
    """A delta holds NaN or infinity; such a tensor can only be stored whole."""


class NoRoomError(UsageError):
    """The deltas in use leave no room on the device for another; there may be room once they are given back."""


class BehindError(UsageError):
    """A subscriber of weights could not follow, or has not answered; publishing goes on once it has."""


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
