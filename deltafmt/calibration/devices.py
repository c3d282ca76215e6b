"""Names of the devices that models run on."""

from __future__ import annotations

from deltafmt.errors import UsageError


def check_device(name: str | None, what: str) -> None:
    """Refuse a name that is none of a device; None means a GPU if there is one.

    Args:
        name: ``cpu``, ``cuda`` or ``cuda:N``.
        what: what runs on it, for the message.

    Raises:
        UsageError: quotes the name.
    """
    kind, colon, number = (name or "cpu").partition(":")
    if kind not in ("cpu", "cuda") or (colon and (kind == "cpu" or not number.isdecimal())):
        raise UsageError(f"{what} device {name!r} is not cpu, cuda or cuda:N")
