"""The choice of the values that leave the device or host memory: the least recently used first, never one in use."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from deltafmt.runtime.leases import Item
from deltafmt.runtime.store_protocol import H, V


def victims_for(
    items: Mapping[str, Item[V, H]], names: Collection[str], used: int, budget: int | None, keep: Collection[str] = ()
) -> list[str] | None:
    """Return the names of the values to evict from the device, so that other values fit.

    Args:
        items: every known value's state, by name.
        names: the values that need room.
        used: the bytes on the device now.
        budget: the bytes that the device may hold; None for no limit.
        keep: values that must stay.

    Returns:
        The names to evict, least recently used first; None if even all idle values together are too small.
    """
    if budget is None or not names:
        return []
    short = used + sum(items[name].size for name in names) - budget
    idle = [
        (item.last_use, name, item.size)
        for name, item in items.items()
        if item.value is not None and not item.leases and name not in keep
    ]
    victims = []
    for _, name, size in sorted(idle):
        if short <= 0:
            break
        victims.append(name)
        short -= size
    return victims if short <= 0 else None


def host_bytes(items: Mapping[str, Item[V, H]]) -> int:
    """Return the bytes of all copies in host memory."""
    return sum(item.host.nbytes for item in items.values() if item.host is not None)


def drop_host_copies(items: Mapping[str, Item[V, H]], size: int, budget: int) -> None:
    """Drop copies in host memory, least recently used first, until ``size`` bytes fit into the budget."""
    held = [(item.last_use, name) for name, item in items.items() if item.host is not None]
    for _, name in sorted(held):
        if host_bytes(items) + size <= budget:
            break
        items[name].host = None
