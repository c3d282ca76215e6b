"""The values of a restored tensor: its error, its kept elements, their scales and their seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import deltafmt
from conftest import (
    Pair,
    normal,
    nudge,
    raw,
    read_folder,
)
from deltafmt.errors import NonFiniteError, Remedy, UsageError
from deltafmt.methods import DARE, BitDelta, DeltaDQ, Method
from pairs import check_round_trip, pack_pair, pair_of


@pytest.mark.parametrize(
    ("bits", "grid"),
    [(1, "midrise"), *((bits, grid) for bits in (2, 3, 4, 5, 6, 8) for grid in ("midtread", "midrise"))],
)
def test_the_error_of_what_is_kept_is_at_most_half_a_step(tmp_path: Path, bits: int, grid: str) -> None:
    old = normal(1, (45, 50), "F32")
    tuned = nudge(old, 2)
    pair = pair_of(tmp_path, {"w": old}, {"w": tuned})
    method = DeltaDQ(4, 4, bits, share=1, grid=grid, scale="minmax", scale_dtype="F32")
    delta = pack_pair(pair, tmp_path / "d.deltafmt", method=method)
    with deltafmt.open(delta) as opened:
        decoded = opened.delta("w")
        tiles = opened.buffers("w")["scales"]
    true = tuned.floats() - old.floats()
    step = tiles.transpose(0, 2, 1).reshape(-1, 1)[:45].astype(np.float32)
    assert (step > 0).all()
    if bits > 1:  # one bit keeps a mean, which clips
        assert (np.abs(decoded - true) <= step / 2 * 1.001).all()
    levels = 2**bits - (grid == "midtread")
    assert max(len(np.unique(row)) for row in decoded) <= levels
    offset = 0.0 if grid == "midtread" else 0.5
    assert np.allclose(np.round(decoded / step - offset), decoded / step - offset, atol=1e-4)


@pytest.mark.parametrize("share", [1, 2, 4, 8])
@pytest.mark.parametrize("index", ["seeded", "fixed", "rank"])
def test_n_of_every_m_are_kept_and_rescaled(tmp_path: Path, index: str, share: int) -> None:
    rows, columns, n, m = 77, 70, 3, 16
    old = normal(1, (rows, columns), "F32")
    tuned = nudge(old, 2)
    pair = pair_of(tmp_path, {"w": old}, {"w": tuned})
    method = DeltaDQ(n, m, 8, index, share, grid="midrise", scale_dtype="F32")
    delta = pack_pair(pair, tmp_path / "d.deltafmt", method=method, profile="cold" if index == "rank" else "hot")
    with deltafmt.open(delta) as opened:
        decoded = opened.delta("w")
    kept = decoded != 0  # a midrise grid has no zero, so this is the mask
    for start in range(0, columns, m):
        counts = kept[:, start : start + m].sum(axis=1)
        assert (counts == n).all() if start + m <= columns else (counts <= n).all()
    for row in range(rows):
        assert np.array_equal(kept[row], kept[row // share * share])
    assert len({kept[row].tobytes() for row in range(0, rows, share)}) > 1
    wanted = (tuned.floats() - old.floats()) * np.float32(m / n)
    step = 2 * np.abs(wanted * kept).max(axis=1, keepdims=True) / 255
    assert (np.abs(decoded - wanted)[kept] <= np.broadcast_to(step, kept.shape)[kept] / 2 * 1.01).all()
    assert check_round_trip(pair, delta, tmp_path / "out")["w"] == "add"


def test_without_rescale_the_values_are_the_deltas_own(tmp_path: Path) -> None:
    old = normal(1, (64, 64), "F32")
    tuned = nudge(old, 2)
    pair = pair_of(tmp_path, {"w": old}, {"w": tuned})
    true = tuned.floats() - old.floats()
    ratios = []
    for rescale in (True, False):
        method = DeltaDQ(4, 16, 8, grid="midrise", rescale=rescale, scale_dtype="F32")
        with deltafmt.open(pack_pair(pair, tmp_path / f"{rescale}.deltafmt", method=method)) as opened:
            decoded = opened.delta("w")
        kept = decoded != 0
        ratios.append(np.sum(decoded[kept] * true[kept]) / np.sum(true[kept] ** 2))
    assert ratios == pytest.approx([4, 1], rel=0.02)


def test_scales_of_groups(tmp_path: Path) -> None:
    """One large entry must not coarsen the rest of its row."""
    old = raw(np.zeros((32, 64)), "F32")
    values = np.full((32, 64), 0.01)
    values[:, 0] = 100
    pair = pair_of(tmp_path, {"w": old}, {"w": raw(values, "F32")})
    for group, fine in ((0, False), (16, True)):
        method = DeltaDQ(4, 4, 8, share=1, scale_group=group, scale_dtype="F32")
        with deltafmt.open(pack_pair(pair, tmp_path / f"{group}.deltafmt", method=method)) as opened:
            assert opened.buffers("w")["scales"].shape == (1, 4 if group else 1, 32)
            assert np.allclose(opened.delta("w")[:, 16:], 0.01) is fine


def test_the_seed_decides_the_positions_and_nothing_else_does(tmp_path: Path, small: Pair) -> None:
    name = "model.layers.0.up.weight"
    masks = []
    for number, seed in enumerate((0, 0, 1, 2**64 - 1)):
        method = DeltaDQ(4, 16, 4, grid="midrise")
        with deltafmt.open(pack_pair(small, tmp_path / f"{number}.deltafmt", method=method, seed=seed)) as opened:
            masks.append((opened.delta(name) != 0).tobytes())
            assert opened.metadata["seed"] == str(seed)
    assert masks[0] == masks[1]
    assert len(set(masks)) == 3
    for seed in (-1, 2**64):
        with pytest.raises(UsageError, match="seed"):
            pack_pair(small, tmp_path / "bad.deltafmt", seed=seed)


# The base's elements and the fine-tune's one large one, and a method after which some would be infinite.
OVERFLOWS = [
    ("F16", 65504.0, 1.0, DeltaDQ(8, 16, 4)),
    ("F16", -65504.0, 0.0, DeltaDQ(4, 16, 4)),
    ("F16", 60000.0, 1.0, DeltaDQ(4, 16, 4)),
    ("F16", 0.0, 1500.0, DeltaDQ(1, 64, 4)),
    ("F16", 0.0, 600.0, DeltaDQ(1, 128, 4)),
    ("F16", 0.0, 2000.0, DeltaDQ(1, 64, 2, gain=2)),
    ("BF16", -3e38, -3.3e38, DeltaDQ(4, 16, 4)),
    ("F32", 3e38, 3.3e38, DeltaDQ(4, 16, 4)),
    ("F16", 0.0, 1000.0, DARE(0.99)),
]


def overflowing(tmp_path: Path, dtype: str, before: float, after: float) -> Pair:
    """Return a pair with one tensor whose elements are two numbers, and an ordinary one."""
    rest = normal(2, (64, 128), dtype)
    old, new = (raw(np.full((64, 128), value, np.float32), dtype) for value in (before, after))
    return pair_of(tmp_path, {"mask": old, "w": rest}, {"mask": new, "w": nudge(rest, 4)})


@pytest.mark.parametrize(("dtype", "before", "after", "method"), OVERFLOWS)
def test_finite_elements_that_would_become_infinite_are_refused(
    tmp_path: Path, dtype: str, before: float, after: float, method: Method
) -> None:
    """A mask of the lowest number of F16 came back as infinity, and pack said nothing."""
    pair = overflowing(tmp_path, dtype, before, after)
    with pytest.raises(NonFiniteError, match=f'tensor "mask": its element .* or NaN in {dtype}') as e:
        pack_pair(pair, tmp_path / "d.deltafmt", method=method)
    assert e.value.remedy == Remedy("exclude", "mask")
    delta = pack_pair(pair, tmp_path / "d.deltafmt", method=method, exclude=["mask"])
    assert check_round_trip(pair, delta, tmp_path / "out")["mask"] == "replace"


@pytest.mark.parametrize("value", [3000.0, -1e4, 65504.0])
def test_large_elements_that_stay_finite_are_packed(tmp_path: Path, value: float) -> None:
    old = normal(1, (64, 128), "F16").floats()
    old[3, 4] = value
    new = nudge(raw(old, "F16"), 3).floats()
    new[3, 4] = value
    pair = pair_of(tmp_path, {"w": raw(old, "F16")}, {"w": raw(new, "F16")})
    delta = pack_pair(pair, tmp_path / "d.deltafmt", method=DeltaDQ(4, 16, 4))
    assert check_round_trip(pair, delta, tmp_path / "out")["w"] == "add"
    assert np.isfinite(read_folder(tmp_path / "out")["w"].floats()).all()


@pytest.mark.parametrize(("dtype", "before", "after", "method"), OVERFLOWS[:6])
def test_an_exact_part_restores_what_is_infinite_where_it_is_served(
    tmp_path: Path, dtype: str, before: float, after: float, method: Method
) -> None:
    pair = overflowing(tmp_path, dtype, before, after)
    result = deltafmt.pack(pair.base, pair.finetuned, tmp_path / "d.deltafmt", method=method, exact=True)
    assert "infinite or NaN where it is served; the exact part restores it" in result.notes["mask"]
    deltafmt.unpack(pair.base, tmp_path / "d.deltafmt", tmp_path / "out")
    assert read_folder(tmp_path / "out") == pair.b


def test_a_whole_matrix_is_looked_at_too(tmp_path: Path) -> None:
    old, new = np.full((64, 128), 30000, np.float32), np.full((64, 128), 40000, np.float32)
    old[40:] = new[40:] = 65000  # the mean magnitude of the others' change is added
    pair = pair_of(tmp_path, {"w": raw(old, "F16")}, {"w": raw(new, "F16")})
    with pytest.raises(NonFiniteError, match="64992 at row 40, column 0 would come back as infinity or NaN in F16"):
        pack_pair(pair, tmp_path / "d.deltafmt", method=BitDelta())


def test_a_target_stores_what_would_become_infinite_whole(tmp_path: Path) -> None:
    rest = normal(2, (256, 256), "F16")
    old, new = (raw(np.full((16, 64), value, np.float32), "F16") for value in (65504.0, 1.0))
    pair = pair_of(tmp_path, {"mask": old, "w": rest}, {"mask": new, "w": nudge(rest, 4)})
    delta = pack_pair(pair, tmp_path / "d.deltafmt", target_ratio=6, candidates=[DeltaDQ(8, 16, 4), DeltaDQ(1, 16, 4)])
    actions = check_round_trip(pair, delta, tmp_path / "out")
    assert (actions["mask"], actions["w"]) == ("replace", "add")
