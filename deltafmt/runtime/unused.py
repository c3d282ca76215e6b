"""Modules that deltas change and that nobody has used."""

from __future__ import annotations

from collections.abc import Collection

from deltafmt.runtime.sites import Site


def unused(sites: Collection[Site]) -> list[str]:
    """Return the names of modules that have not run while a delta that changes them was served.

    A module whose parameters all are those of others that have run is only their store, as is T5's ``shared``.
    """
    ran = {number for site in sites if site.ran for number in _parameters(site)}
    idle = [(site.name, _parameters(site)) for site in sites if not site.ran]
    return [name for name, held in idle if not held or not held <= ran]


def _parameters(site: Site) -> set[int]:
    """Return the ids of the parameters of a site's module itself."""
    return {id(parameter) for parameter in site.module.parameters(recurse=False)}
