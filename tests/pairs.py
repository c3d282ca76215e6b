"""Pairs of checkpoints for tests: writing them, packing them, and checking what comes back element by element."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deltafmt
from conftest import (
    Pair,
    Tensors,
    expected_sum,
    normal,
    nudge,
    read_folder,
    write_pair,
)
from implementations import running

ANCHOR = "anchor"
DTYPES = ("BF16", "F16", "F32")


def pair_of(folder: Path, a: Tensors, b: Tensors) -> Pair:
    """Write a pair with one large matrix on both sides, so that the two count as one architecture."""
    anchor = normal(90, (128, 128))
    return write_pair(folder, {ANCHOR: anchor, **a}, {ANCHOR: nudge(anchor, 91), **b})


def check_round_trip(pair: Pair, delta: Path, out: Path) -> dict[str, str]:
    """Unpack, and compare every tensor with what its entry promises and the numpy decoder says; return the actions."""
    deltafmt.unpack(pair.base, delta, out)
    found = read_folder(out)
    assert set(found) == set(pair.b)
    actions = {}
    with deltafmt.open(delta) as opened:
        for name, wanted in pair.b.items():
            entry = opened[name]
            actions[name] = entry.action
            assert (found[name].dtype, found[name].shape) == (wanted.dtype, wanted.shape)
            source = opened.resolve(name)
            if source.action != "add":
                assert found[name].data == wanted.data, name
                continue
            base = pair.a[source.name]
            with running("numpy"):
                decoded = opened.delta(name)
            assert decoded.shape == wanted.shape
            rows = min(base.rows, wanted.rows)
            matrix = decoded.reshape(wanted.rows, -1)
            assert not matrix[rows:].any()
            summed = expected_sum(base, matrix[:rows], wanted.dtype)
            assert found[name].data[: len(summed)] == summed, name
            assert found[name].data[len(summed) :] == wanted.data[len(summed) :], name
    return actions


def pack_pair(pair: Pair, out: Path, **options: Any) -> Path:
    deltafmt.pack(pair.base, pair.finetuned, out, **options)
    return out
