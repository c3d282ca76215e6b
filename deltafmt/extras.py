"""Optional packages: whoever lacks one is told in one line which extra of deltafmt brings it."""

from __future__ import annotations

import importlib.util

from deltafmt.errors import MissingExtraError


def lacking(what: str, *packages: str, extra: str) -> str:
    """Return what to tell a user who lacks an optional package; empty if all packages can be found. Imports none.

    Args:
        what: the part of deltafmt that needs the packages, for example ``calibration``.
        packages: the names that it imports, for example ``torch``.
        extra: the extra in pyproject.toml that installs them, for example ``transformers``.

    Returns:
        For example ``calibration needs transformers: pip install 'deltafmt[transformers]'``.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"{what} needs {' and '.join(missing)}: pip install 'deltafmt[{extra}]'" if missing else ""


def need(what: str, *packages: str, extra: str) -> None:
    """Check that optional packages can be found; the arguments are those of :func:`lacking`.

    Raises:
        MissingExtraError: a package is missing.
    """
    if message := lacking(what, *packages, extra=extra):
        raise MissingExtraError(message)
