"""Objects that deltas put on a module, and that must not be copied or pickled with it."""

from __future__ import annotations

from typing import NoReturn

from deltafmt.errors import UsageError


def refuse_copy(*_: object) -> NoReturn:
    """Refuse to copy or pickle a model with deltas attached.

    Raises:
        UsageError: always.
    """
    raise UsageError(
        "a model with deltas attached cannot be copied or pickled; detach the deltas first, and attach them to the copy"
    )


class Uncopied:
    """Something on a module that computes with this module's weights: a copy of the module would do so too."""

    __slots__ = ()

    def __deepcopy__(self, _memo: object) -> NoReturn:
        """Refuse to be copied with a module."""
        refuse_copy()

    def __reduce_ex__(self, _protocol: object) -> NoReturn:
        """Refuse to be pickled with a module."""
        refuse_copy()
