"""Pairs of one matrix, their way through delta files with a method, and the refusal of a method's options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import deltafmt
from conftest import Cli, Pair, expected_sum, normal, nudge, raw, read_folder, write_folder
from deltafmt.errors import UsageError

SHAPE = (75, 203)


def pair_of(folder: Path, shape: tuple[int, int] = SHAPE, dtype: str = "F32") -> Pair:
    """Write a pair of one matrix, with some elements unchanged and one row unchanged."""
    old = normal(1, shape, dtype)
    values = nudge(old, 2).floats().copy()
    values[3] = old.floats()[3]
    values[5, ::7] = old.floats()[5, ::7]
    a, b = {"w": old}, {"w": raw(values, dtype)}
    return Pair(write_folder(folder / "base", a), write_folder(folder / "ft", b), a, b)


def true_delta(pair: Pair) -> NDArray[np.float32]:
    return pair.b["w"].floats() - pair.a["w"].floats()


def round_trip(pair: Pair, folder: Path, method: Any, **options: Any) -> NDArray[np.float32]:
    """Pack, verify, repack, unpack and compare with the reader's delta; return that."""
    file = folder / "d.deltafmt"
    result = deltafmt.pack(pair.base, pair.finetuned, file, method=method, force=True, **options)
    assert result.actions == {"add": 1}
    assert deltafmt.verify(file, pair.base).content_id == result.content_id
    cold = deltafmt.repack(file, folder / "cold.deltafmt", profile="cold", force=True)
    assert cold.content_id == result.content_id
    assert not deltafmt.diff(file, cold.path).changes
    deltafmt.repack(cold.path, folder / "hot.deltafmt", profile="hot", force=True)
    if options.get("profile", "hot") == "hot":
        assert (folder / "hot.deltafmt").read_bytes() == file.read_bytes()
    deltafmt.unpack(pair.base, file, folder / "out", force=True)
    with deltafmt.open(file) as opened:
        delta = opened.delta("w")
    assert read_folder(folder / "out")["w"].data == expected_sum(pair.a["w"], delta, pair.b["w"].dtype)
    return delta


def check_refusal(make: Callable[[], object], words: str) -> None:
    """Check that a method is refused with one line that has some words."""
    with pytest.raises(UsageError) as error:
        make()
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def check_packed_terms(cli: Cli, pair: Pair, out: Path, arguments: Sequence[str], words: str) -> None:
    """Check that ``pack`` with some arguments makes a delta of the pair, whose terms ``inspect`` describes so."""
    result = cli("pack", pair.base, pair.finetuned, "-o", out, "--force", *arguments, "--json").json()
    assert result["actions"] == {"add": 1}
    assert result["bytes"] == out.stat().st_size
    assert words in cli("inspect", out, "--tensors").out
