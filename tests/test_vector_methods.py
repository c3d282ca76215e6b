"""Methods of singular vectors through files: what they store is what their numerics give; sizes; options."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import deltafmt
from conftest import Cli, Pair, normal, nudge, raw, refused, write_folder
from deltafmt.methods import SVD, DeltaCoMe, DeltaDQ, Residual
from deltafmt.methods.bands import band_grid, dense, fill, quantize_bands, searched, vector_errors
from deltafmt.methods.base import DeltaRows
from deltafmt.methods.deltacome import parse_bands
from deltafmt.methods.factorization import factorize, rank_for_energy
from deltafmt.methods.hessian import output_error
from deltafmt.methods.quantize import quantize
from deltafmt.methods.residual import split_head
from deltafmt.methods.sampling import gather
from deltafmt.methods.vectors import band_arrays, coding_of
from deltafmt.pipeline.plan import tensor_seed
from deltafmt.terms.buffers import blank
from deltafmt.terms.codecs import term_codec
from deltafmt.terms.lowbit.codec import LowbitArrays
from deltafmt.terms.lowrank.layout import LowRankLayout
from implementations import IMPLEMENTATIONS, running
from method_files import SHAPE, check_packed_terms, check_refusal, pair_of, round_trip, true_delta
from problems import layer
from strategies import examples

BANDS = "2@8+7@3+rest@2"


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_svd_is_the_best_approximation(tmp_path: Path, dtype: str) -> None:
    pair = pair_of(tmp_path)
    delta = true_delta(pair)
    found = round_trip(pair, tmp_path, SVD(rank=9, value_dtype=dtype))
    u, s, v = np.linalg.svd(delta.astype(np.float64), full_matrices=False)
    best = (u[:, :9] * s[:9]) @ v[:9]
    assert np.abs(found - best).max() <= np.abs(best).max() * {"BF16": 2**-6, "F16": 2**-9, "F32": 1e-5}[dtype]


@pytest.mark.parametrize(
    ("bits", "grid"), [(1, None), *((bits, grid) for bits in (2, 5, 8) for grid in (None, "asymmetric"))]
)
def test_svd_on_a_grid(tmp_path: Path, bits: int, grid: str | None) -> None:
    pair = pair_of(tmp_path)
    delta, method = true_delta(pair), SVD(rank=9, bits=bits, grid=grid, scale_group=64)
    quantizer = method.quantizer
    assert quantizer is not None
    expected = dense(quantize_bands(factorize(delta, 9), [(9, bits)], quantizer), delta.shape)
    np.testing.assert_allclose(round_trip(pair, tmp_path, method), expected, atol=1e-6)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.99, 1.0])
def test_energy_decides_the_rank(tmp_path: Path, share: float, cli: Cli) -> None:
    pair = pair_of(tmp_path)
    delta = true_delta(pair)
    values = np.linalg.svd(delta.astype(np.float64), compute_uv=False)
    found = round_trip(pair, tmp_path, SVD(energy=share, bits=8))
    with deltafmt.open(tmp_path / "d.deltafmt") as opened:
        layout = opened["w"].terms[0].layout
    assert isinstance(layout, LowRankLayout)
    assert layout.rank == rank_for_energy(values, share)
    assert ((found - delta) ** 2).sum() <= (1 - share + 2e-3) * (delta**2).sum()
    assert f"lowrank rank={layout.rank} bits=8" in cli("inspect", tmp_path / "d.deltafmt", "--tensors").out


@examples(60)
@given(
    st.integers(1, 400), st.integers(1, 400), st.floats(0.01, 20), st.sampled_from([None, 1, 3, 8]), st.integers(0, 99)
)
def test_bits_a_weight_bound_the_bytes(rows: int, columns: int, budget: float, bits: int | None, group: int) -> None:
    coded = SVD(bits_per_weight=budget) if bits is None else SVD(bits_per_weight=budget, bits=bits, scale_group=group)
    several = coded, DeltaCoMe(bits_per_weight=budget)
    for method in several:
        layouts = method.layouts(rows, columns)
        vectors = sum(layout.rank for layout in layouts)
        stored = sum(sum(layout.buffer_lengths(rows, columns).values()) for layout in layouts)
        assert 1 <= vectors <= min(rows, columns)
        assert vectors == 1 or stored * 8 <= budget * rows * columns
        one_more = sum(LowRankLayout(1, layouts[-1].factors).buffer_lengths(rows, columns).values())
        assert vectors == min(rows, columns) or (stored + one_more) * 8 > budget * rows * columns or len(layouts) < 3


@pytest.mark.parametrize(
    "method", [DeltaCoMe(BANDS, 4), DeltaCoMe("3@6+5@1"), DeltaCoMe(BANDS, 3, "midrise", refit=True)]
)
def test_delta_come_is_its_bands(tmp_path: Path, method: DeltaCoMe) -> None:
    pair = pair_of(tmp_path)
    delta = true_delta(pair)
    found = round_trip(pair, tmp_path, method)
    with deltafmt.open(tmp_path / "d.deltafmt") as opened:
        layouts = [term.layout for term in opened["w"].terms]
    assert tuple(layouts) == method.layouts(*SHAPE)
    widths = [(layout.rank, layout.factors.bits) for layout in layouts]
    assert [bits for _, bits in widths] == [bits for _, bits in method.widths]
    grid = method.quantizer
    bands = quantize_bands(
        factorize(delta, sum(count for count, _ in widths)), widths, grid, delta=delta if method.refit else None
    )
    np.testing.assert_allclose(found, dense(bands, delta.shape), atol=1e-5)


@pytest.mark.parametrize("moments", [False, True])
def test_searched_bands_lose_no_more_at_the_same_bytes(moments: bool) -> None:
    delta, hessian = layer(5, 96, 128)
    delta *= np.linspace(3, 0.1, 128, dtype=np.float32) ** 2
    h = hessian if moments else None
    grid, bits = DeltaCoMe(BANDS).quantizer, (8, 3, 2)
    factors = factorize(delta, 96)

    def cost(width: int) -> int:
        return sum(LowRankLayout(1, coding_of(band_grid(grid, width))).buffer_lengths(96, 128).values())

    budget = 40 * cost(2)
    begin = fill([(2, 8), (16, 3), (None, 2)], 96, budget, cost)
    found = searched(factors, begin, grid, budget, cost, hessian=h, seed=1)
    assert [width for _, width in found] == list(bits)
    assert sum(count * cost(width) for count, width in found) <= budget

    def error(widths: list[tuple[int, int]]) -> float:
        kept = dense(quantize_bands(factors, widths, grid), delta.shape)
        return output_error(delta - kept, np.eye(128, dtype=np.float32) if h is None else h)

    assert error(found) <= error(begin) * 1.01
    assert searched(factors, begin, grid, budget, cost, hessian=h, seed=1) == found
    # What rounding loses of each vector adds up to what it loses of the matrix.
    own = band_grid(grid, 3)
    rounded = dense(quantize_bands(factors, [(96, 3)], grid), delta.shape)
    assert vector_errors(factors, own, h).sum() == pytest.approx(
        output_error(delta - rounded, np.eye(128, dtype=np.float32) if h is None else h), rel=0.3
    )


def test_a_search_changes_the_ranks_and_keeps_the_budget(tmp_path: Path, cli: Cli) -> None:
    pair = pair_of(tmp_path)
    method = DeltaCoMe(BANDS, 4, search=True)
    assert not method.fixed_rank
    round_trip(pair, tmp_path, method)
    with deltafmt.open(tmp_path / "d.deltafmt") as opened:
        layouts = [term.layout for term in opened["w"].terms]
    assert sum(sum(layout.buffer_lengths(*SHAPE).values()) for layout in layouts) * 8 <= 4 * SHAPE[0] * SHAPE[1]
    options = ("--method", "delta-come", "--bands", "2@8+3@2", "--search")
    done = cli("pack", pair.base, pair.finetuned, "-o", tmp_path / "x.deltafmt", *options)
    refused(done, 2, "a search needs bits_per_weight")


def test_bands_of_the_paper() -> None:
    assert parse_bands("2@8+32@3+rest@2") == ((2, 8), (32, 3), (None, 2))
    found = [(layout.rank, layout.factors) for layout in DeltaCoMe().layouts(4096, 4096)]
    assert [rank for rank, _ in found[:2]] == [2, 32]
    assert sum(rank for rank, _ in found) < 4096
    # Bands without a rest are whole whatever they take.
    assert [layout.rank for layout in DeltaCoMe("9@8+9@2").layouts(20, 30)] == [9, 9]
    assert [layout.rank for layout in DeltaCoMe("9@8+9@2").layouts(12, 30)] == [9, 3]
    assert [layout.rank for layout in DeltaCoMe("9@8+9@2").layouts(3, 30)] == [3]


@pytest.mark.parametrize("method", [Residual(), Residual(3, 5, 16, 2, 8, 4, share=1), Residual(2, m=6, index="fixed")])
def test_residual_is_a_head_and_dropout_of_the_rest(tmp_path: Path, method: Residual) -> None:
    pair = pair_of(tmp_path)
    delta = true_delta(pair)
    found = round_trip(pair, tmp_path, method)
    band, rest = split_head(delta, method.rank, grid=method.head_grid)
    tail = found - band.dense()
    rows = rows_of(pair)
    positions = method.dropout.draw(rows, tensor_seed(0, "w"))
    kept = np.zeros(SHAPE, bool)
    mask = np.repeat(positions, method.share, axis=0)[: SHAPE[0]]
    column = (mask + np.arange(mask.shape[1])[:, None] * method.m).reshape(SHAPE[0], -1)
    row, entry = np.nonzero(column < SHAPE[1])
    kept[row, column[row, entry]] = True
    assert np.abs(tail[~kept]).max() < 1e-5
    wanted = gather(rest, positions, method.m, method.share, method.dropout.factor)
    codes, scales = quantize(
        wanted,
        method.bits,
        method.dropout.layout.grid,
        method.dropout.scale_rule,
        0,
        "BF16",
    )
    values = (2 * codes.astype(np.float32) - method.dropout.layout.top) * scales / 2
    np.testing.assert_allclose(tail[row, column[row, entry]], values[row, entry], atol=1e-5)


def test_the_residual_is_of_the_stored_head() -> None:
    delta = np.random.default_rng(0).standard_normal((40, 64), np.float32)
    band, rest = split_head(delta, 6, grid=Residual(head_bits=2).head_grid)
    np.testing.assert_allclose(band.dense() + rest, delta, atol=1e-6)


def rows_of(pair: Pair, **more: Any) -> DeltaRows:
    old, new = (side["w"].floats().astype(np.float32).view(np.uint32) for side in (pair.a, pair.b))
    return DeltaRows(new, "F32", old, "F32", 0, **more)


@pytest.mark.parametrize("method", [SVD(rank=4), SVD(rank=4, bits=3), DeltaCoMe(BANDS)])
def test_moments_of_the_inputs_help(tmp_path: Path, method: Any) -> None:
    assert method.calibration == "optional"
    pair = pair_of(tmp_path, (60, 90))
    _, hessian = layer(3, 1, 90, tokens=120)
    errors = []
    for moments in (None, hessian):
        rows = rows_of(pair, hessian=moments)
        layouts, found = method.layouts(60, 90), method.compress(rows, 0)
        total = np.zeros((60, 90), np.float32)
        for layout, arrays in zip(layouts, found, strict=True):
            codec, packed = term_codec(layout, 60, 90), blank(layout, 60, 90)
            codec.encode(arrays, packed, 0)
            total += codec.decode(packed, 0, 60)
        lost = (rows.dense() - total).astype(np.float64)
        errors.append(np.einsum("ij,ij->", lost @ hessian, lost))
    assert errors[1] < errors[0]


def test_the_head_follows_the_inputs(tmp_path: Path) -> None:
    pair = pair_of(tmp_path, (60, 90))
    _, hessian = layer(3, 1, 90, tokens=120)
    head, _ = Residual(4).compress(rows_of(pair, hessian=hessian), 0)
    expected = band_arrays(split_head(true_delta(pair), 4, hessian=hessian)[0])
    assert isinstance(head.v, LowbitArrays)
    assert isinstance(expected.v, LowbitArrays)
    np.testing.assert_array_equal(head.v.codes, expected.v.codes)


@pytest.mark.parametrize("method", [SVD(), SVD(energy=0.7), DeltaCoMe(), Residual()])
@pytest.mark.parametrize("shape", [(1, 40), (40, 1), (3, 5), (1, 1), (70, 2), (2, 3, 33)])
def test_small_matrices_are_kept_exactly_or_have_fewer_vectors(
    tmp_path: Path, method: Any, shape: tuple[int, ...]
) -> None:
    a, b = {"w": normal(1, shape)}, {"w": nudge(normal(1, shape), 2)}
    base, finetuned = write_folder(tmp_path / "base", a), write_folder(tmp_path / "ft", b)
    result = deltafmt.pack(base, finetuned, tmp_path / "d.deltafmt", method=method)
    assert result.actions == {"add": 1} or result.kept == {"w": "no smaller when packed"}
    deltafmt.verify(tmp_path / "d.deltafmt", base)


@pytest.mark.parametrize("method", [SVD(), SVD(energy=0.3, bits=4), DeltaCoMe(), Residual()])
def test_nothing_changed_and_one_element_changed(tmp_path: Path, method: Any) -> None:
    old = normal(1, (64, 96), "F32")
    values = old.floats().copy()
    values[7, 9] += 1
    for name, new, actions in (("same", old, {"same": 1}), ("one", raw(values, "F32"), {"add": 1})):
        base, finetuned = (
            write_folder(tmp_path / name / "base", {"w": old}),
            write_folder(tmp_path / name / "ft", {"w": new}),
        )
        assert deltafmt.pack(base, finetuned, tmp_path / f"{name}.deltafmt", method=method).actions == actions
    with deltafmt.open(tmp_path / "one.deltafmt") as opened:
        found = opened.delta("w")
    assert np.isfinite(found).all()
    assert found[7, 9] == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("method", [SVD(bits=3), DeltaCoMe(), Residual(rank=3)])
def test_threads_do_not_change_a_byte(tmp_path: Path, method: Any) -> None:
    pair = pair_of(tmp_path, dtype="BF16")
    found = []
    for threads, implementation in itertools.product((1, 3), IMPLEMENTATIONS):
        file = tmp_path / "d.deltafmt"
        with running(implementation):
            deltafmt.pack(pair.base, pair.finetuned, file, method=method, threads=threads, force=True)
        found.append(file.read_bytes())
    assert len(set(found)) == 1


def test_other_seeds_keep_other_entries(tmp_path: Path) -> None:
    pair = pair_of(tmp_path)
    found = [round_trip(pair, tmp_path, Residual(2), seed=seed) for seed in (0, 1)]
    assert (found[0] != found[1]).any()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SVD(rank=0), "rank 0 is not positive"),
        (lambda: SVD(rank=3, energy=0.5), "rank and energy both say how many vectors are kept"),
        (lambda: SVD(bits_per_weight=-1), "bits_per_weight -1 is not a positive number"),
        (lambda: SVD(bits_per_weight=float("nan")), "bits_per_weight nan"),
        (lambda: SVD(energy=1.2), "energy 1.2 is outside 0 to 1"),
        (lambda: SVD(bits=9), "k = 9"),
        (lambda: SVD(bits=1, grid="midtread"), "midtread grid of 1 bit"),
        (lambda: SVD(value_dtype="F8"), "value dtype 'F8' is not one of BF16, F16, F32"),
        (lambda: SVD(bits=3, scale_group=2**31), "scale group 2147483648"),
        (lambda: DeltaCoMe("2@8+rest"), "bands '2@8+rest': 'rest' is not of the form VECTORS@BITS"),
        (lambda: DeltaCoMe("rest@8+2@2"), "'rest@8' is not of the form"),
        (lambda: DeltaCoMe("0@8"), "0 vectors are outside 1 to 65535"),
        (lambda: DeltaCoMe("2@9"), "k = 9"),
        (lambda: DeltaCoMe("+".join(["1@2"] * 17)), "17 bands are more than 16"),
        (lambda: DeltaCoMe(bits_per_weight=0), "bits_per_weight 0 is not a positive number"),
        (lambda: DeltaCoMe(grid="even"), "grid 'even'"),
        (lambda: Residual(rank=0), "rank 0 is not positive"),
        (lambda: Residual(head_bits=0), "k = 0"),
        (lambda: Residual(m=12), "a seeded index needs M to be a power of two"),
        (lambda: Residual(scale="best"), "scale rule 'best'"),
    ],
)
def test_options_out_of_range(make: Any, words: str) -> None:
    check_refusal(make, words)


def test_from_the_command_line(tmp_path: Path, cli: Cli) -> None:
    pair = pair_of(tmp_path, (128, 256), "BF16")
    out = tmp_path / "d.deltafmt"
    for arguments, words in (
        (
            ("--method", "residual", "--rank", "2", "--nm", "1:16"),
            "lowrank rank=2 bits=8 midtread scale/128 + nm 1:16 bits=1",
        ),
        (("--method", "svd", "--energy", "0.4"), "BF16"),
        (("--method", "svd", "--rank", "5", "--bits", "4"), "lowrank rank=5 bits=4 midtread scale/128"),
        (
            ("--method", "delta-come", "--bands", "1@8+2@1"),
            "rank=1 bits=8 asymmetric scale/128 + lowrank rank=2 bits=1 midrise",
        ),
        (("--rule", "*", "delta-come:bands=1@8+rest@2,bits_per_weight=3"), "rank=1 bits=8 asymmetric"),
    ):
        check_packed_terms(cli, pair, out, arguments, words)
    refused(cli("pack", pair.base, pair.finetuned, "-o", out, "--method", "svd", "--rank", "x"), 2, "rank is a number")
    refused(cli("pack", pair.base, pair.finetuned, "-o", out, "--method", "svd", "--nm", "1:2"), 2, "no option 'nm'")


def test_a_rule_after_a_residual_is_another_method(tmp_path: Path, cli: Cli) -> None:
    pair = pair_of(tmp_path, (128, 256), "BF16")
    out = tmp_path / "d.deltafmt"
    rule = ("--method", "residual", "--rule", "w", "deltadq:nm=2:16")
    cli("pack", pair.base, pair.finetuned, "-o", out, *rule)
    with deltafmt.open(out) as opened:
        assert [term.layout for term in opened["w"].terms] == list(DeltaDQ(2, 16).layouts(128, 256))
