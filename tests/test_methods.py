"""Methods beside DeltaDQ, through files: what they store is what their papers say; their options; sums of kinds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import deltafmt
from conftest import Cli, Pair, expected_sum, normal, nudge, raw, read_folder, refused, write_folder
from deltafmt.methods import DARE, RTN, BitDelta, Magnitude
from deltafmt.methods.base import DeltaRows, Method
from deltafmt.methods.quantize import quantize
from deltafmt.methods.sampling import draw
from deltafmt.pipeline.plan import tensor_seed
from deltafmt.terms.coding import Coding
from deltafmt.terms.layout import TermLayout
from deltafmt.terms.lowbit.codec import LowbitArrays
from deltafmt.terms.lowrank.codec import LowRankArrays
from deltafmt.terms.lowrank.layout import LowRankLayout
from deltafmt.terms.nm.codec import NMArrays
from deltafmt.terms.nm.hashing import seeded
from deltafmt.terms.nm.layout import NMLayout
from implementations import IMPLEMENTATIONS, running
from method_files import SHAPE, pair_of, round_trip, true_delta


@pytest.mark.parametrize(
    ("bits", "grid"),
    [(k, grid) for k in range(1, 9) for grid in ("midtread", "midrise", "asymmetric") if (k, grid) != (1, "midtread")],
)
@pytest.mark.parametrize("group", [0, 32, 50])
def test_rtn_is_the_nearest_level(tmp_path: Path, bits: int, grid: str, group: int) -> None:
    pair = pair_of(tmp_path)
    delta, method = true_delta(pair), RTN(bits, grid, "minmax", group, "F32")
    found = round_trip(pair, tmp_path, method)
    size = group or SHAPE[1]
    for start in range(0, SHAPE[1], size):
        part = delta[:, start : start + size]
        if grid == "asymmetric":
            step = (np.maximum(part.max(axis=1), 0) - np.minimum(part.min(axis=1), 0)) / (2**bits - 1)
        else:
            step = np.abs(part).max(axis=1) / (2 ** (bits - 1) - 1 if grid == "midtread" else (2**bits - 1) / 2)
        worst = np.abs(found[:, start : start + size] - part).max(axis=1)
        # An asymmetric grid's zero point is rounded, so that the far end may be half a step off as well.
        assert (worst <= step * (1.01 if grid == "asymmetric" else 0.501)).all()
    assert max(len(np.unique(row)) for row in found) <= 2**bits * -(-SHAPE[1] // size)


@pytest.mark.parametrize("mean", ["matrix", "row", "column", "group"])
@pytest.mark.parametrize("scale_dtype", ["BF16", "F32"])
def test_bitdelta_is_signs_and_means(tmp_path: Path, mean: str, scale_dtype: str) -> None:
    pair = pair_of(tmp_path)
    delta = true_delta(pair)
    found = round_trip(pair, tmp_path, BitDelta(mean, 64 if mean == "group" else 128, scale_dtype))
    magnitude = np.abs(delta).astype(np.float64)
    if mean == "group":
        means = np.concatenate(
            [np.repeat(magnitude[:, i : i + 64].mean(axis=1, keepdims=True), 64, 1) for i in range(0, 203, 64)], axis=1
        )[:, :203]
    else:
        axis = {"matrix": None, "row": 1, "column": 0}[mean]
        means = np.broadcast_to(magnitude.mean(axis=axis, keepdims=True), delta.shape)
    np.testing.assert_allclose(np.abs(found), means, rtol=2**-8 if scale_dtype == "BF16" else 1e-5)
    # "Sign gives +1 for 0."
    stored = np.where(found == 0, np.where(delta >= 0, 1, -1), np.sign(found))
    np.testing.assert_array_equal(stored, np.where(delta >= 0, 1, -1))


@pytest.mark.parametrize("bits", [None, 1, 2, 4, 8])
@pytest.mark.parametrize("drop", [0.0, 0.5, 0.9, 0.99])
def test_dare_keeps_at_random_and_rescales(tmp_path: Path, drop: float, bits: int | None) -> None:
    pair = pair_of(tmp_path)
    delta = true_delta(pair)
    if bits is None:
        method = DARE(drop, value_dtype="F16" if drop else "BF16")
    else:
        method = DARE(drop, bits, scale_dtype="F32")
    found = round_trip(pair, tmp_path, method)
    kept = draw(tensor_seed(0, "w"), *SHAPE, drop)
    assert abs(kept.mean() - (1 - drop)) < 4 * (drop * (1 - drop) / kept.size) ** 0.5 + 1e-9
    assert not found[~kept].any()
    wanted = delta / (1 - drop)
    if bits is None:
        np.testing.assert_allclose(found[kept], wanted[kept], rtol=2**-8)
    elif bits >= 4:
        worst = np.abs(np.where(kept, wanted, 0)).max(axis=1, keepdims=True) / (2 ** (bits - 1) - 1)
        assert (np.abs(found - wanted)[kept] <= np.broadcast_to(worst * 0.51, SHAPE)[kept]).all()


@pytest.mark.parametrize("bits", [None, 3, 8])
@pytest.mark.parametrize("density", [0.02, 0.3])
def test_magnitude_keeps_the_largest(tmp_path: Path, density: float, bits: int | None) -> None:
    pair = pair_of(tmp_path)
    delta = true_delta(pair)
    found = round_trip(pair, tmp_path, Magnitude(density, bits))
    count = round(density * delta.size)
    least = np.sort(np.abs(delta).reshape(-1))[-count]
    assert not found[np.abs(delta) < least].any()
    if bits is None:
        assert np.count_nonzero(found) == count
        np.testing.assert_allclose(found[np.abs(delta) >= least], delta[np.abs(delta) >= least], rtol=2**-8)


def test_what_is_no_smaller_when_packed_is_kept_exactly(tmp_path: Path) -> None:
    pair = pair_of(tmp_path, dtype="BF16")
    file = tmp_path / "d.deltafmt"
    result = deltafmt.pack(pair.base, pair.finetuned, file, method=DARE(0.05))
    assert result.kept == {"w": "no smaller when packed"}
    deltafmt.unpack(pair.base, file, tmp_path / "out")
    assert read_folder(tmp_path / "out")["w"] == pair.b["w"]


@dataclass(frozen=True)
class Summed(Method):
    """Two vectors of the delta's SVD as a band, and a dropout of what they leave: a sum of two kinds of terms."""

    name = "summed"
    summary = "for this test"
    whole = True

    def layouts(self, rows: int, columns: int) -> tuple[TermLayout, ...]:  # noqa: ARG002 - the same for every shape
        """Return the layouts of band and dropout."""
        return LowRankLayout(2, Coding(8, "midtread", "F32", 32)), NMLayout(2, 8, 8, share=4, scale_dtype="F32")

    def describe(self) -> str:
        """Return the name."""
        return "summed"

    def compress(self, rows: DeltaRows, seed: int) -> tuple[LowRankArrays, NMArrays]:
        """Take the band, then drop out of the rest."""
        assert rows.first == 0
        assert rows.name == "w"
        delta = rows.dense()
        u, s, v = np.linalg.svd(delta.astype(np.float64), full_matrices=False)
        left, right = (np.sqrt(s[:2])[:, None] * side for side in (u.T[:2], v[:2]))
        band = []
        for vectors in (left, right):
            codes, scales = quantize(vectors.astype(np.float32), 8, "midtread", "minmax", 32, "F32")
            band.append(LowbitArrays(codes, scales))
        rest = (delta - (left.T @ right)).astype(np.float32)
        layout = NMLayout(2, 8, 8, share=4, scale_dtype="F32")
        positions = seeded(seed, 0, layout.mask_rows(delta.shape[0]), layout.groups(delta.shape[1]), 2, 8)
        column = (positions + np.arange(positions.shape[1])[:, None] * 8).reshape(positions.shape[0], -1)
        column = np.repeat(column, 4, axis=0)[: delta.shape[0]]
        kept = np.take_along_axis(rest, np.minimum(column, delta.shape[1] - 1), axis=1) * 4
        kept = np.where(column < delta.shape[1], kept, np.float32(np.nan)).astype(np.float32)
        codes, scales = quantize(kept, 8, "midtread", "minmax", 0, "F32")
        return LowRankArrays(*band), NMArrays(positions, codes, scales)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("profile", ["hot", "cold"])
def test_a_sum_of_kinds(tmp_path: Path, threads: int, profile: str, cli: Cli) -> None:
    pair = pair_of(tmp_path)
    found = round_trip(pair, tmp_path, Summed(), threads=threads, profile=profile)
    delta = true_delta(pair)
    # The band alone is what the dropped entries are.
    assert np.corrcoef(found.reshape(-1), delta.reshape(-1))[0, 1] > 0.3
    file = tmp_path / "d.deltafmt"
    with deltafmt.open(file) as opened:
        assert [term.layout.kind for term in opened["w"].terms] == ["lowrank", "nm"]
        assert opened["w"].terms[0].seed == 0
        assert {"terms[0].u_codes", "terms[1].codes"} <= set(opened.buffers("w"))
    shown = cli("inspect", file, "--tensors").out
    assert (
        "lowrank rank=2 bits=8 midtread scale/32 F32 scales + nm 2:8 bits=8 midtread seeded share=4 F32 scales" in shown
    )
    obj = cli("inspect", file, "--json").json()
    assert sum(node["bytes"] for node in obj["tree"]["children"]) == file.stat().st_size


@pytest.mark.parametrize(
    "method", [RTN(3), RTN(4, "asymmetric"), BitDelta(), BitDelta("column"), DARE(0.8), Magnitude(0.2, 2), Summed()]
)
def test_threads_and_compilers_do_not_change_a_byte(tmp_path: Path, method: Any) -> None:
    pair = pair_of(tmp_path, dtype="BF16")
    found = []
    for threads in (1, 3):
        for implementation in IMPLEMENTATIONS:
            with running(implementation):
                deltafmt.pack(
                    pair.base, pair.finetuned, tmp_path / "d.deltafmt", method=method, threads=threads, force=True
                )
            found.append((tmp_path / "d.deltafmt").read_bytes())
    assert len(set(found)) == 1


def test_rules_choose_methods(tmp_path: Path, cli: Cli, small: Pair) -> None:
    out = tmp_path / "d.deltafmt"
    rules = (
        "--rule",
        "*.up.*",
        "rtn:bits=3",
        "--rule",
        "*embed*",
        "bitdelta",
        "--rule",
        "*.10.*",
        "whole",
    )
    assert cli("pack", small.base, small.finetuned, "-o", out, "--nm", "2:16", *rules).code == 0
    with deltafmt.open(out) as opened:
        how = {name: [t.layout.describe() for t in opened[name].terms] for name in opened}
    assert how["model.layers.0.up.weight"] == ["k=3 midtread scale/128"]
    assert how["model.embed.weight"] == ["k=1 midrise"]
    assert how["model.layers.10.up.weight"] == []
    assert how["model.layers.0.down.weight"][0].startswith("2:16")
    assert deltafmt.verify(out, small.base).base_tensors is not None
    assert (
        cli("pack", small.base, small.finetuned, "-o", out, "--force", "--method", "bitdelta", "--mean", "row").code
        == 0
    )


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--method", "bitdelta", "--nm", "4:16"), "method bitdelta has no option 'nm'"),
        (("--method", "rtn", "--bits", "9"), "k = 9"),
        (("--method", "rtn", "--no-rescale"), "method rtn has no option 'rescale'"),
        (("--method", "bitdelta", "--mean", "tensor"), "mean 'tensor'"),
        (("--method", "bitdelta", "--mean", "group", "--scale-group", "0"), "at least one column"),
        (("--rule", "*", "rtn:nm=4:16"), "rule 'rtn:nm=4:16': method rtn has no option 'nm'"),
        (("--method", "dare", "--drop", "1"), "drop probability 1.0"),
        (("--method", "dare", "--drop", "most"), "drop is a number, not 'most'"),
        (("--method", "dare", "--drop", "nan"), "drop probability nan"),
        (("--method", "magnitude", "--density", "0"), "density 0.0"),
        (("--method", "magnitude", "--bits", "9"), "k = 9"),
        (("--rule", "*", "gzip"), "unknown method 'gzip'"),
        (("--rule", "*", "rescale=maybe"), "yes or no"),
    ],
)
def test_options_of_other_methods_are_refused(
    tmp_path: Path, cli: Cli, small: Pair, arguments: tuple[str, ...], word: str
) -> None:
    refused(cli("pack", small.base, small.finetuned, "-o", tmp_path / "o", *arguments), 2, word)
    assert not list(tmp_path.iterdir())


def test_a_matrix_of_several_dimensions_and_new_rows(tmp_path: Path) -> None:
    old = normal(1, (40, 3, 50))
    new = raw(np.concatenate([nudge(old, 2).floats().reshape(40, 3, 50), np.ones((2, 3, 50))]), "BF16")
    a, b = {"w": old}, {"w": new}
    pair = Pair(write_folder(tmp_path / "base", a), write_folder(tmp_path / "ft", b), a, b)
    for method in (BitDelta(), RTN(3)):
        file = tmp_path / "d.deltafmt"
        deltafmt.pack(pair.base, pair.finetuned, file, method=method, force=True)
        deltafmt.unpack(pair.base, file, tmp_path / "out", force=True)
        with deltafmt.open(file) as opened:
            delta = opened.delta("w").reshape(126, 50)[:120]
        expected = expected_sum(pair.a["w"], delta, "BF16") + new.data[120 * 50 * 2 :]
        assert read_folder(tmp_path / "out")["w"].data == expected
