"""Magnitude pruning, N of M and anywhere, and separate quantization, through files."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import deltafmt
from conftest import Cli, normal, nudge, refused, write_folder
from deltafmt.methods import DeltaDQ, DeltaDQSQ, Magnitude, Residual
from deltafmt.methods.base import DeltaRows
from deltafmt.methods.group_size import expected_error
from deltafmt.methods.largest import keep_largest
from deltafmt.methods.quantize import quantize
from deltafmt.methods.sampling import gather, uniform
from deltafmt.pipeline.plan import tensor_seed
from deltafmt.terms.buffers import blank
from deltafmt.terms.codecs import fitted, term_codec
from implementations import IMPLEMENTATIONS, running
from method_files import SHAPE, check_packed_terms, check_refusal, pair_of, round_trip, true_delta
from problems import Floats, layer
from strategies import examples, shapes


def run_of(delta: Floats, first: int = 0, hessian: Floats | None = None) -> DeltaRows:
    zero = np.zeros(delta.shape, np.uint32)
    return DeltaRows(delta.view(np.uint32), "F32", zero, "F32", first, hessian=hessian)


def decoded(method: Any, rows: DeltaRows, seed: int) -> Floats:
    """Compress, pack and decode a matrix."""
    total = np.zeros(rows.shape, np.float32)
    for planned, arrays in zip(method.layouts(*rows.shape), method.compress(rows, seed), strict=True):
        layout, slots = fitted(planned, arrays, rows.shape[1])
        codec = term_codec(layout, *rows.shape, slots=slots)
        packed = blank(layout, *rows.shape, slots)
        codec.encode(arrays, packed, 0)
        total += codec.decode(packed, 0, rows.shape[0], check_form=True)
    return total


@pytest.mark.parametrize("share", [1, 4])
@pytest.mark.parametrize("index", ["fixed", "rank"])
@pytest.mark.parametrize(("n", "m", "bits"), [(2, 4, None), (1, 7, 1), (4, 16, 3), (5, 5, 8)])
def test_n_of_m_keeps_the_largest(tmp_path: Path, n: int, m: int, bits: int | None, index: str, share: int) -> None:
    pair = pair_of(tmp_path)
    delta = true_delta(pair)
    method = Magnitude(n=n, m=m, bits=bits, index=index, share=share, scale_dtype="F32")
    profile = "cold" if index == "rank" else "hot"
    found = round_trip(pair, tmp_path, method, profile=profile)
    positions = keep_largest(delta, n, m, share)
    column = (positions + np.arange(positions.shape[1])[:, None] * m).reshape(positions.shape[0], -1)
    column = np.repeat(column, share, axis=0)[: SHAPE[0]]
    kept = np.zeros(SHAPE, bool)
    row, entry = np.nonzero(column < SHAPE[1])
    kept[row, column[row, entry]] = True
    assert not found[~kept].any()
    width = bits or 4
    if width >= 4:
        step = np.abs(np.where(kept, delta, 0)).max(axis=1, keepdims=True) / (2 ** (width - 1) - 1)
        assert (np.abs(found - delta)[kept] <= np.broadcast_to(step * 0.501, SHAPE)[kept]).all()


def test_pruned_entries_can_be_rescaled(tmp_path: Path) -> None:
    pair = pair_of(tmp_path)
    for options in ({"density": 0.25}, {"n": 1, "m": 4, "bits": 8}):
        plain = round_trip(pair, tmp_path, Magnitude(**options))
        rescaled = round_trip(pair, tmp_path, Magnitude(**options, rescale=True))
        np.testing.assert_allclose(rescaled, 4 * plain, rtol=2**-6, atol=1e-6)


@pytest.mark.parametrize("share", [1, 8])
def test_runs_of_rows_are_the_whole(share: int) -> None:
    delta = np.random.default_rng(0).standard_normal((600, 50), np.float32)
    method = Magnitude(n=2, m=8, share=share)
    assert not method.whole
    (whole,) = method.compress(run_of(delta), 0)
    parts = [method.compress(run_of(delta[at : at + 256].copy(), at), 0)[0] for at in (0, 256, 512)]
    for name in ("positions", "codes", "scales"):
        joined = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_array_equal(joined, getattr(whole, name))


@examples(40)
@given(
    st.integers(0, 2**32 - 1), shapes(70, 300), st.integers(1, 5), st.data(), st.sampled_from(["minmax", "mse", None])
)
def test_parts_sum_to_the_codes(
    seed: int, shape: tuple[int, int], bits: int, data: st.DataObject, rule: str | None
) -> None:
    delta = np.random.default_rng(seed).standard_normal(shape, np.float32)
    m = data.draw(st.integers(2, 40))
    n = data.draw(st.integers(1, m))
    parts = data.draw(st.sampled_from([None, 1]))
    method = DeltaDQSQ(n, m, bits, parts, rule, "F32")
    rows = run_of(delta)
    positions = uniform(seed, 0, shape[0], -(-shape[1] // m), n, m)
    kept = gather(delta, positions, m, 1, np.float32(m / n))
    codes, scales = quantize(kept, bits, "midrise", method.scale_rule, 0, "F32")
    column = (positions + np.arange(positions.shape[1])[:, None] * m).reshape(shape[0], -1)
    expected = np.zeros(shape, np.float32)
    row, entry = np.nonzero(column < shape[1])
    values = (2 * codes.astype(np.float32) - (2**bits - 1)) * (scales / 2)
    expected[row, column[row, entry]] = values[row, entry]
    np.testing.assert_allclose(decoded(method, rows, seed), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "method", [DeltaDQSQ(), DeltaDQSQ(2, 9, 3), DeltaDQSQ(bits=5), DeltaDQSQ(bits=1), DeltaDQSQ(1, 200)]
)
def test_parts_through_a_file(tmp_path: Path, method: DeltaDQSQ, cli: Cli) -> None:
    pair = pair_of(tmp_path)
    found = round_trip(pair, tmp_path, method)
    kept = uniform(tensor_seed(0, "w"), 0, SHAPE[0], -(-SHAPE[1] // method.m), method.n, method.m)
    assert np.count_nonzero(found) <= kept.size
    rows = run_of(true_delta(pair))
    np.testing.assert_allclose(found, decoded(method, rows, tensor_seed(0, "w")), rtol=1e-6)
    with deltafmt.open(tmp_path / "d.deltafmt") as opened:
        assert len(opened["w"].terms) == method.number
    shown = cli("inspect", tmp_path / "d.deltafmt", "--tensors").out
    assert ("sparse bits=1 midrise" if method.number == 1 else f"{method.number} of sparse bits=1 midrise") in shown


def test_the_count_of_the_paper() -> None:
    assert DeltaDQSQ(1, 8, 4).paper_ratio == 128
    assert DeltaDQSQ(1, 8, 4, 1).paper_ratio == 32
    assert "8 parts" in DeltaDQSQ().describe()
    assert "the paper counts 128 times smaller" in DeltaDQSQ().describe()


def test_the_group_size_is_searched_where_moments_are_given() -> None:
    # Neighbours with the same product: one of each pair, doubled, loses nothing.
    delta = np.repeat(np.random.default_rng(0).standard_normal((4, 32)), 2, axis=1).astype(np.float32)
    inputs = np.repeat(np.random.default_rng(1).standard_normal((200, 32)), 2, axis=1)
    hessian = (inputs.T @ inputs).astype(np.float32)
    method = DeltaDQSQ(8, 16)
    assert method.group(delta, hessian) == (1, 2)
    assert [each.calibration for each in (method, DeltaDQSQ(search=False), Magnitude())] == [
        "optional",
        "none",
        "none",
    ]
    assert method.group(delta, None) == (8, 16)
    assert DeltaDQSQ(8, 16, search=False).group(delta, hessian) == (8, 16)
    assert DeltaDQSQ(3, 7).group(*layer(0, 5, 70)) in [(3 << i, 7 << i) for i in range(6)]
    sizes = [expected_error(delta, hessian, m // 2, m) for m in (2, 4, 8, 16, 32, 64, 128)]
    assert min(sizes) == sizes[0]
    assert np.isfinite(decoded(method, run_of(delta, hessian=hessian), 3)).all()


@pytest.mark.parametrize(
    "method", [Magnitude(n=2, m=8), Magnitude(n=1, m=8, bits=2, share=4), DeltaDQSQ(), DeltaDQSQ(bits=3)]
)
def test_threads_and_compilers_do_not_change_a_byte(tmp_path: Path, method: Any) -> None:
    pair = pair_of(tmp_path, (300, 203), "BF16")
    found = []
    for threads, implementation in itertools.product((1, 3), IMPLEMENTATIONS):
        file = tmp_path / "d.deltafmt"
        with running(implementation):
            deltafmt.pack(pair.base, pair.finetuned, file, method=method, threads=threads, force=True)
        found.append(file.read_bytes())
    assert len(set(found)) == 1


@pytest.mark.parametrize("method", [Magnitude(), Magnitude(n=2, m=8), DeltaDQSQ()])
@pytest.mark.parametrize("shape", [(1, 40), (40, 1), (3, 5), (1, 1), (70, 2), (2, 3, 33)])
def test_small_matrices_are_kept_exactly_or_packed(tmp_path: Path, method: Any, shape: tuple[int, ...]) -> None:
    base = write_folder(tmp_path / "base", {"w": normal(1, shape)})
    finetuned = write_folder(tmp_path / "ft", {"w": nudge(normal(1, shape), 2)})
    result = deltafmt.pack(base, finetuned, tmp_path / "d.deltafmt", method=method)
    assert result.actions == {"add": 1} or result.kept == {"w": "no smaller when packed"}
    deltafmt.verify(tmp_path / "d.deltafmt", base)


def test_what_is_random_and_narrow_is_noted(tmp_path: Path) -> None:
    pair = pair_of(tmp_path)
    for method, narrow in ((Magnitude(n=1, m=8), 0), (DeltaDQ(1, 8), 1), (DeltaDQ(4, 8), 0), (Residual(4), 1)):
        file = tmp_path / "d.deltafmt"
        assert deltafmt.pack(pair.base, pair.finetuned, file, method=method, force=True).narrow == narrow


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Magnitude(0.1, n=2, m=4), "density 0.1 and 2:4 both say what is kept"),
        (lambda: Magnitude(n=2), "N and M are given together"),
        (lambda: Magnitude(n=5, m=4), "N = 5 is outside 1 to M = 4"),
        (lambda: Magnitude(n=2, m=4, bits=7), "bits k = 7"),
        (lambda: Magnitude(n=2, m=4, index="seeded"), "index 'seeded' cannot hold positions"),
        (lambda: Magnitude(2.0), "density 2.0"),
        (lambda: Magnitude(n=2, m=4, share=3), "share v = 3"),
        (lambda: DeltaDQSQ(9, 8), "N = 9 is outside 1 to M = 8"),
        (lambda: DeltaDQSQ(1, 256), "group size M = 256"),
        (lambda: DeltaDQSQ(bits=6), "bits k = 6 is outside 1 to 5"),
        (lambda: DeltaDQSQ(bits=4, parts=4), "parts 4 is neither 1 nor 8"),
        (lambda: DeltaDQSQ(scale="least"), "scale rule 'least'"),
        (lambda: DeltaDQSQ(scale_dtype="F8"), "scale dtype 'F8'"),
    ],
)
def test_options_out_of_range(make: Any, words: str) -> None:
    check_refusal(make, words)


def test_from_the_command_line(tmp_path: Path, cli: Cli) -> None:
    pair = pair_of(tmp_path, (128, 256), "BF16")
    out = tmp_path / "d.deltafmt"
    for arguments, words in (
        (("--method", "magnitude", "--nm", "2:8"), "nm 2:8 bits=4 midtread fixed share=1"),
        (
            ("--method", "magnitude", "--nm", "2:8", "--index", "rank", "--profile", "cold"),
            "nm 2:8 bits=4 midtread rank",
        ),
        (("--method", "magnitude", "--density", "0.2", "--bits", "3"), "sparse bits=3 midtread"),
        (("--method", "deltadq-sq", "--nm", "1:16", "--bits", "2"), "sparse bits=1 midrise"),
    ):
        check_packed_terms(cli, pair, out, arguments, words)
    rank = ("--method", "magnitude", "--nm", "2:8", "--index", "rank")
    refused(cli("pack", pair.base, pair.finetuned, "-o", out, "--force", *rank), 2, "--profile cold")
    parts = ("--method", "deltadq-sq", "--parts", "3")
    refused(cli("pack", pair.base, pair.finetuned, "-o", out, "--force", *parts), 2, "parts 3 is neither 1 nor 8")
