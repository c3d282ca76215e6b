"""Tokens sorted by slot and cut into tiles, against loops over the tokens."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltafmt.errors import UsageError
from strategies import examples

torch = pytest.importorskip("torch")

from deltafmt.kernels.segments import FixedSegments, Segments

Tile = tuple[int, list[int]]


def tiles_by_definition(slots: list[int], count: int, size: int, shortest: int, longest: int) -> list[Tile]:
    """Return each tile's slot and tokens: by slot, the tokens of a slot in their order."""
    found = []
    for slot in range(count):
        tokens = [token for token, chosen in enumerate(slots) if chosen == slot]
        if shortest <= len(tokens) <= longest:
            found += [(slot, tokens[at : at + size]) for at in range(0, len(tokens), size)]
    return found


def tiles_found(segments: Segments, size: int, **limits: int) -> list[Tile]:
    """Return the tiles in use; those that are not must stand last, and be marked."""
    tiles = segments.tiles(size, **limits)
    assert tiles.size == size
    assert tiles.order.dtype == tiles.table.dtype == torch.int32
    assert tiles.table.is_contiguous()
    order, table = tiles.order.tolist(), tiles.table.tolist()
    assert sorted(order) == list(range(segments.tokens))
    used = [row for row in table if row[2]]
    assert table[: len(used)] == used
    assert all(row[0] == -1 for row in table[len(used) :])
    return [(slot, order[first : first + length]) for slot, first, length in used]


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[int], int]:
    """Give tokens' slots and the number of slots; some numbers mean no slot."""
    count = draw(st.integers(1, 9))
    number = st.one_of(st.integers(-1, count), st.sampled_from((0, -1, -(2**31), 2**31 - 1)))
    runs = draw(st.lists(st.tuples(number, st.integers(1, 20)), max_size=12))
    slots = [slot for slot, length in runs for _ in range(length)]
    return draw(st.permutations(slots)) if draw(st.booleans()) else slots, count


@examples(100)
@given(batches(), st.integers(1, 130), st.integers(1, 40), st.integers(1, 60))
def test_tiles(batch: tuple[list[int], int], size: int, shortest: int, longest: int) -> None:
    slots, count = batch
    segments = Segments(torch.tensor(slots, dtype=torch.int32), count)
    for limits in ({}, {"shortest": shortest}, {"longest": longest}, {"shortest": shortest, "longest": longest}):
        expected = tiles_by_definition(slots, count, size, **{"shortest": 1, "longest": len(slots), **limits})
        assert tiles_found(segments, size, **limits) == expected
        # What the host launches: never fewer programs than tiles, and none in vain where every token has its own.
        launched = segments.tiles(size, **limits).table.shape[0]
        assert len(expected) <= launched <= min(len(slots), len(slots) // size + count)


@examples(80)
@given(batches(), st.sampled_from((1, 2, 4, 8, 64, 128)), st.integers(1, 50))
def test_every_token_of_a_slot_is_in_one_tile(batch: tuple[list[int], int], size: int, border: int) -> None:
    slots, count = batch
    segments = Segments(torch.tensor(slots, dtype=torch.int32), count)
    # As the kernels share the work: short segments to one, long ones to the other.
    tiles = tiles_found(segments, size, longest=border) + tiles_found(segments, 64, shortest=border + 1)
    held = Counter(token for _, tokens in tiles for token in tokens)
    assert held == Counter(token for token, slot in enumerate(slots) if 0 <= slot < count)
    assert all(slots[token] == slot for slot, tokens in tiles for token in tokens)


@examples(80)
@given(batches(), st.integers(1, 16))
def test_slots_that_the_host_knows(batch: tuple[list[int], int], size: int) -> None:
    slots, count = batch
    lengths = Counter(slot for slot in slots if 0 <= slot < count)
    segments = Segments.of(slots, count, "cpu")
    assert segments.slots.tolist() == slots
    assert segments.tokens == len(slots)
    # Promises that hold, whatever other numbers stand among the slots.
    assert segments.longest >= max(lengths.values(), default=0)
    assert all(segments.shortest <= length for length in lengths.values())
    assert tiles_found(segments, size) == tiles_by_definition(slots, count, size, 1, len(slots))


def test_promises_limit_the_tiles() -> None:
    slots = torch.tensor([0, 1, 0, 0, 1, -1], dtype=torch.int32)
    segments = Segments(slots, 2, {0: 3, 1: 2})
    assert (segments.longest, segments.shortest) == (3, 2)
    assert (Segments(slots, 2).longest, Segments(slots, 2).shortest) == (6, 1)
    assert segments.tiles(4) is segments.tiles(4)
    assert segments.tiles(4, longest=100) is segments.tiles(4)
    assert tiles_found(segments, 4, longest=2) == [(1, [1, 4])]
    assert tiles_found(segments, 2, shortest=3) == [(0, [0, 2]), (0, [3])]


def test_slots_without_tokens_promise_nothing() -> None:
    segments = Segments(torch.tensor([1, 1], dtype=torch.int32), 3, {0: 0, 1: 2, 2: 0})
    assert (segments.longest, segments.shortest) == (2, 2)
    assert Segments(torch.tensor([-1], dtype=torch.int32), 1, {0: 0}).longest == 0


def test_no_tokens_and_no_slots() -> None:
    nobody = torch.full((5,), -1, dtype=torch.int32)
    assert tiles_found(Segments(nobody, 3), 4) == []
    assert tiles_found(Segments(nobody[:0], 3), 4) == []
    assert Segments.of([], 3, "cpu").longest == 0


def test_slots_of_other_kinds_are_refused() -> None:
    with pytest.raises(UsageError, match="int64"):
        Segments(torch.zeros(3, dtype=torch.int64), 1)
    with pytest.raises(UsageError, match=r"\(1, 3\)"):
        Segments(torch.zeros(1, 3, dtype=torch.int32), 1)


def test_slots_that_were_expanded_have_memory_of_their_own() -> None:
    segments = Segments(torch.tensor([1], dtype=torch.int32).expand(5), 2)
    assert segments.slots.is_contiguous()
    assert segments.slots.tolist() == [1] * 5


@pytest.mark.parametrize("known", [False, True])
def test_members_of_a_slot(known: bool) -> None:
    slots = [2, -1, 0, 2, 7, 0, 2]
    segments = Segments.of(slots, 3, "cpu") if known else Segments(torch.tensor(slots, dtype=torch.int32), 3)
    assert [segments.members(slot).tolist() for slot in range(3)] == [[2, 5], [], [0, 3, 6]]
    assert {slot: length for slot, length in segments.lengths().items() if length} == {0: 2, 2: 3}


@examples(60)
@given(st.data(), st.integers(1, 40), st.integers(1, 6))
def test_fixed_segments_stay_where_they_are(data: st.DataObject, tokens: int, count: int) -> None:
    """Tensors that a graph has seen hold the tiles of the present slots; tiles that are not kept are right as well."""
    fixed = FixedSegments(tokens, count, torch.device("cpu"))
    asked = data.draw(
        st.lists(st.tuples(st.sampled_from((1, 2, 4, 64)), st.integers(1, 9), st.integers(1, 50)), max_size=3)
    )
    forms, seen = [], {}
    for turn in range(4):
        slots = data.draw(st.lists(st.integers(-2, count), min_size=tokens, max_size=tokens))
        fixed.fill(slots)
        if turn == 1:
            fixed.prepare()
        for size, shortest, longest in asked:
            limits = {"shortest": shortest, "longest": longest}
            assert tiles_found(fixed, size, **limits) == tiles_by_definition(slots, count, size, **limits)
            tiles = fixed.tiles(size, **limits)
            if turn >= 1:
                places = (tiles.order.data_ptr(), tiles.table.data_ptr(), tiles.table.shape)
                assert seen.setdefault((size, shortest, longest), places) == places
        assert (fixed.longest, fixed.shortest) == (tokens, 1)
        assert fixed.lengths() == Counter(slot for slot in slots if 0 <= slot < count)
        forms.append(fixed.form)
    assert len(set(forms[1:])) == 1
