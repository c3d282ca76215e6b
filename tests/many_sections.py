"""A pair whose delta has many small sections, for tests that stop a pack between two of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deltafmt
from conftest import Pair, Tensors, normal, nudge, write_pair


def make_pair(folder: Path) -> Pair:
    """Write the pair."""
    a: Tensors = {}
    b: Tensors = {}
    for i in range(14):
        a[f"layers.{i}.w"] = normal(i, (64, 100 + i))
        b[f"layers.{i}.w"] = nudge(a[f"layers.{i}.w"], 50 + i)
        a[f"layers.{i}.norm"] = normal(i, (100,), "F32")
        b[f"layers.{i}.norm"] = normal(100 + i, (100,), "F32")
    a["layers.6.same"] = b["layers.6.same"] = normal(30, (40, 40))
    b["layers.7.tied"] = b["layers.3.w"]
    b["layers.5.new"] = normal(31, (40, 40))
    return write_pair(folder, a, b)


def pack_afresh(folder: Path, pair: Pair, **options: Any) -> bytes:
    """Return the delta file that a pack without an earlier run gives."""
    deltafmt.pack(pair.base, pair.finetuned, folder / "fresh.deltafmt", **options)
    return (folder / "fresh.deltafmt").read_bytes()
