"""What makes a rank index fixed, in torch and as a kernel, agrees with the codec on any layout and ragged shapes."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from deltafmt.errors import UsageError
from deltafmt.terms import words as word_codec
from deltafmt.terms.nm import codec as nm
from deltafmt.terms.nm.layout import NMLayout
from index_cases import ascending
from index_words import encoded
from strategies import examples, generators, layouts, shapes

torch = pytest.importorskip("torch")

from deltafmt.kernels.nm.rank_index.convert import convert_on_host, convert_ranks
from deltafmt.kernels.nm.rank_index.decode import convert_words
from deltafmt.kernels.nm.rank_index.jobs import RankJob

Convert = Callable[[torch.Tensor, torch.Tensor, Sequence[RankJob]], list[int]]

WIDE = NMLayout(32, 67, 4, "rank")  # C(67, 32) is just below 2**64: ranks of 64 bits
WHOLE = NMLayout(5, 5, 4, "rank")  # C(5, 5) = 1: ranks of no bits
HALVES = NMLayout(1, 2, 4, "rank", share=8)


def as_words(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array).view(np.int32).reshape(-1).copy())


def random_index(rng: np.random.Generator, layout: NMLayout, rows: int, columns: int) -> np.ndarray:
    """Return the rank words of random positions, the first and the last possible ones among them."""
    drawn = ascending(rng, layout.mask_rows(rows), layout.groups(columns), layout.n, layout.m)
    drawn[rng.random(drawn.shape[:2]) < 0.1] = np.arange(layout.n)
    drawn[rng.random(drawn.shape[:2]) < 0.1] = np.arange(layout.m - layout.n, layout.m)
    return encoded(drawn, layout)


def expected(layout: NMLayout, index: np.ndarray, rows: int, columns: int) -> np.ndarray:
    return nm.transcode_index(layout, index, layout.mask_rows(rows), columns, layout.with_index("fixed"))


def implementations() -> list[object]:
    """Return what can run here: the torch function; the kernel on a GPU, or slowly, interpreted."""
    found: list[object] = [
        pytest.param(convert_words, "cpu", id="torch"),
        pytest.param(convert_on_host, "cpu", id="host"),
    ]
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        kernel = pytest.importorskip("deltafmt.kernels.nm.rank_index.kernel")
        found.append(
            pytest.param(kernel.launch_conversion, "cuda" if torch.cuda.is_available() else "cpu", id="triton")
        )
    return found


IMPLEMENTATIONS = pytest.mark.parametrize(("convert", "device"), implementations())
INTERPRETED = not torch.cuda.is_available() and len(implementations()) > 1
TRIES = 6 if INTERPRETED else 60
LIMIT = 40 if INTERPRETED else 150
LAYOUTS = layouts("rank", max_m=20) if INTERPRETED else layouts("rank")


def check(
    convert: Convert, device: str, case: list[tuple[NMLayout, tuple[int, int]]], rng: np.random.Generator
) -> None:
    """Make indexes fixed that lie one behind the other, with something before, between and behind them."""
    indexes = [random_index(rng, layout, *shape) for layout, shape in case]
    wanted = [expected(layout, index, *shape) for (layout, shape), index in zip(case, indexes, strict=True)]
    mark = torch.full((7,), -1, dtype=torch.int32)
    jobs, source, target = [], [mark], [mark]
    for (layout, (rows, columns)), index, fixed in zip(case, indexes, wanted, strict=True):
        starts = (sum(map(len, parts)) for parts in (source, target))
        jobs.append(RankJob(layout, layout.mask_rows(rows), columns, *starts))
        source += [as_words(index), mark]
        target += [as_words(fixed), mark]
    out = torch.full((sum(map(len, target)),), -1, dtype=torch.int32, device=device)
    assert convert(torch.cat(source).to(device), out, jobs) == []
    np.testing.assert_array_equal(out.cpu().numpy(), torch.cat(target).numpy())


@IMPLEMENTATIONS
@examples(TRIES)
@given(case=st.lists(st.tuples(LAYOUTS, shapes(70, LIMIT)), max_size=3), rng=generators())
def test_agrees_with_the_codec(convert: Convert, device: str, case: list, rng: np.random.Generator) -> None:
    # Two indexes of one layout share a launch.
    again = [(layout, (columns, rows)) for layout, (rows, columns) in case[:1]]
    check(convert, device, case + again, rng)


@IMPLEMENTATIONS
@pytest.mark.parametrize("layout", [WIDE, WHOLE, HALVES, NMLayout(1, 255, 4, "rank")], ids=NMLayout.describe)
def test_extreme_layouts(convert: Convert, device: str, layout: NMLayout) -> None:
    check(convert, device, [(layout, (33, LIMIT))], np.random.default_rng(0))


@IMPLEMENTATIONS
@examples(TRIES)
@given(layout=LAYOUTS, shape=shapes(40, LIMIT), rng=generators())
@example(layout=WIDE, shape=(3, 70), rng=np.random.default_rng(1))
def test_any_bits_give_positions_in_range(
    convert: Convert, device: str, layout: NMLayout, shape: tuple[int, int], rng: np.random.Generator
) -> None:
    rows, columns = shape
    mask_rows, groups = layout.mask_rows(rows), layout.groups(columns)
    job = RankJob(layout, mask_rows, columns, 0, 0)
    bits = rng.integers(0, 2**32, job.source_shape, np.uint32)
    target = torch.empty(math.prod(job.target_shape), dtype=torch.int32, device=device)
    wrong = convert(as_words(bits).to(device), target, [job])
    ranks = word_codec.unpack(bits, mask_rows, groups, layout.rank_bits)
    assert wrong == ([0] if int(ranks.max()) >= math.comb(layout.m, layout.n) else [])
    if wrong and convert is convert_on_host:
        return  # it stops at the wrong rank, and the delta is refused
    words = target.cpu().numpy().view(np.uint32).reshape(job.target_shape)
    fields = word_codec.unpack(words, mask_rows, groups * layout.n, layout.position_bits)
    assert fields.max() < layout.m
    # Nothing but the fields is written: the words are the canonical packing of their positions.
    np.testing.assert_array_equal(word_codec.pack(fields, layout.position_bits), words)
    reference = torch.empty_like(target, device="cpu")
    convert_words(as_words(bits), reference, [job])
    assert torch.equal(target.cpu(), reference)


@IMPLEMENTATIONS
def test_one_rank_too_high_is_told(convert: Convert, device: str) -> None:
    layout = NMLayout(2, 6, 4, "rank")
    ranks = np.zeros((40, 9), np.uint64)
    right = word_codec.pack(ranks, layout.rank_bits)
    ranks[39, 8] = 15
    wrong = word_codec.pack(ranks, layout.rank_bits)
    words = math.prod(RankJob(layout, 40, 54, 0, 0).target_shape)
    jobs = [RankJob(layout, 40, 54, at * right.size, at * words) for at in range(3)]
    source = torch.cat([as_words(right), as_words(wrong), as_words(right)])
    assert convert(source.to(device), torch.empty(3 * words, dtype=torch.int32, device=device), jobs) == [1]


def test_tensors_of_other_kinds_are_refused() -> None:
    memory = torch.zeros(32, dtype=torch.uint8)
    with pytest.raises(UsageError, match="int64"):
        convert_ranks(memory.long(), memory, [])
    with pytest.raises(UsageError, match=r"\(4, 8\)"):
        convert_ranks(memory, memory.view(4, 8), [])
    assert convert_ranks(memory, memory.clone(), []) == {}
