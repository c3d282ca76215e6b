"""The references and the kernel that make a rank index fixed agree with the codec, on any layout and ragged shapes."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import ascending, examples, generators, layouts, shapes

from deltafmt.codecs import nm
from deltafmt.codecs import positions as pos
from deltafmt.codecs import words as word_codec
from deltafmt.errors import UsageError
from deltafmt.layout.nm import NMLayout

torch = pytest.importorskip("torch")

from deltafmt.kernels.rank_index import naive  # noqa: E402 - needs torch
from deltafmt.kernels.rank_index.convert import make_fixed  # noqa: E402
from deltafmt.kernels.rank_index.jobs import RankJob  # noqa: E402

# Mostly small groups: the interpreter takes its time.
LAYOUTS = st.one_of(layouts("rank", max_group=40), layouts("rank"))
WIDE = NMLayout(32, 67, 4, "rank")  # C(67, 32) is just below 2**64: ranks of 64 bits
WHOLE = NMLayout(5, 5, 4, "rank")  # C(5, 5) = 1: ranks of no bits


def as_words(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array).view(np.int32).reshape(-1).copy())


def random_index(rng: np.random.Generator, layout: NMLayout, rows: int, columns: int) -> np.ndarray:
    """Return the rank words of random positions, the first and the last possible ones among them."""
    drawn = ascending(rng, layout.mask_rows(rows), layout.groups(columns), layout.keep, layout.group)
    drawn[rng.random(drawn.shape[:2]) < 0.1] = np.arange(layout.keep)
    drawn[rng.random(drawn.shape[:2]) < 0.1] = np.arange(layout.group - layout.keep, layout.group)
    return pos.encode_rank(drawn, layout)


def expected(layout: NMLayout, index: np.ndarray, rows: int, columns: int) -> np.ndarray:
    return nm.transcode_index(layout, index, layout.mask_rows(rows), columns, layout.with_index("fixed"))


def kernels() -> list[object]:
    """Return what can run here: always the reference; the kernel on a GPU, or interpreted."""
    found: list[object] = [pytest.param(naive.make_fixed, "cpu", id="naive")]
    if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available():
        triton = pytest.importorskip("deltafmt.kernels.rank_index.triton")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        found.append(pytest.param(triton.make_fixed, device, id="triton"))
    return found


KERNELS = pytest.mark.parametrize(("convert", "device"), kernels())


@KERNELS
@examples(25)
@given(data=st.data(), rng=generators())
@example(data=(WIDE, (33, 70)), rng=np.random.default_rng(0))
@example(data=(WHOLE, (40, 33)), rng=np.random.default_rng(0))
@example(data=(NMLayout(1, 2, 4, "rank"), (40, 133)), rng=np.random.default_rng(0))
def test_agrees_with_the_codec(convert, device, data, rng) -> None:
    layout, (rows, columns) = data if type(data) is tuple else data.draw(st.tuples(LAYOUTS, shapes(70, 60)))
    index = random_index(rng, layout, rows, columns)
    wanted = expected(layout, index, rows, columns)
    source = torch.cat([torch.full((7,), -1, dtype=torch.int32), as_words(index)]).to(device)
    target = torch.full((5 + wanted.size + 3,), -1, dtype=torch.int32, device=device)
    assert convert(source, target, [RankJob(layout, layout.mask_rows(rows), columns, 7, 5)]) == []
    found = target.cpu().numpy()
    np.testing.assert_array_equal(found[5:-3].view(np.uint32), wanted.reshape(-1))
    assert (np.delete(found, slice(5, -3)) == -1).all()


@KERNELS
@examples(10)
@given(jobs=st.lists(st.tuples(layouts("rank", max_group=20), shapes(70, 40)), max_size=4), rng=generators())
def test_many_indexes_at_once(convert, device, jobs, rng) -> None:
    # Two tensors of one layout share a launch.
    jobs = [*jobs, *((layout, (columns, rows)) for layout, (rows, columns) in jobs[:2])]
    indexes = [random_index(rng, layout, *shape) for layout, shape in jobs]
    wanted = [expected(layout, index, *shape) for (layout, shape), index in zip(jobs, indexes, strict=True)]
    described, source, target = [], 0, 0
    for (layout, (rows, columns)), index, fixed in zip(jobs, indexes, wanted, strict=True):
        described.append(RankJob(layout, layout.mask_rows(rows), columns, source, target))
        source, target = source + index.size, target + fixed.size
    words = torch.cat([as_words(index) for index in indexes]) if jobs else torch.empty(0, dtype=torch.int32)
    out = torch.full((target,), -1, dtype=torch.int32, device=device)
    assert convert(words.to(device), out, described) == []
    flat = np.concatenate([fixed.reshape(-1) for fixed in wanted]) if jobs else np.empty(0, np.uint32)
    np.testing.assert_array_equal(out.cpu().numpy().view(np.uint32), flat)


@KERNELS
@examples(20)
@given(layout=LAYOUTS, shape=shapes(70, 40), rng=generators())
@example(layout=WIDE, shape=(40, 70), rng=np.random.default_rng(1))
def test_any_bits_give_positions_in_range(convert, device, layout, shape, rng) -> None:
    rows, columns = shape
    mask_rows, groups = layout.mask_rows(rows), layout.groups(columns)
    job = RankJob(layout, mask_rows, columns, 0, 0)
    bits = rng.integers(0, 2**32, job.source_shape, np.uint32)
    target = torch.empty(math.prod(job.target_shape), dtype=torch.int32, device=device)
    wrong = convert(as_words(bits).to(device), target, [job])
    words = target.cpu().numpy().view(np.uint32).reshape(job.target_shape)
    fields = word_codec.unpack(words, mask_rows, groups * layout.keep, layout.position_bits)
    assert fields.max() < layout.group
    ranks = word_codec.unpack(bits, mask_rows, groups, layout.rank_bits)
    assert wrong == ([0] if int(ranks.max()) >= math.comb(layout.group, layout.keep) else [])
    # Where nothing is drawn, nothing is written: the words are the canonical packing of their positions.
    np.testing.assert_array_equal(word_codec.pack(fields, layout.position_bits), words)
    reference = torch.empty_like(target, device="cpu")
    naive.make_fixed(as_words(bits), reference, [job])
    assert torch.equal(target.cpu(), reference)


@KERNELS
def test_one_rank_too_high_is_told(convert, device) -> None:
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
    words = torch.zeros(32, dtype=torch.int32)
    with pytest.raises(UsageError, match="int64"):
        make_fixed(words.long(), words, [])
    with pytest.raises(UsageError, match=r"\(4, 8\)"):
        make_fixed(words, words.view(4, 8), [])
    assert make_fixed(words, words.clone(), []) == []
