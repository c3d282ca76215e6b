"""Operand tables: their records, the memory that these lie in, and threads that use them together."""

from __future__ import annotations

import gc
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from deltafmt.kernels import launching, record_memory
from deltafmt.kernels import table as table_module
from deltafmt.kernels.record_memory import RecordMemory
from deltafmt.kernels.segments import Segments
from deltafmt.kernels.table import OperandTable
from deltafmt.terms.lowbit.layout import LowbitLayout
from deltafmt.terms.lowrank.layout import LowRankLayout
from deltafmt.terms.nm.layout import NMLayout
from operands import random_operand
from strategies import examples

ROWS, COLUMNS = 40, 64
WHOLE = slice(0, 1)


def test_a_slot_that_is_filled_while_records_are_built(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    first, second = (random_operand(rng, LowbitLayout(4), ROWS, COLUMNS) for _ in range(2))
    table = OperandTable(2, [ROWS], COLUMNS, "cpu")
    table.put(1, [[first]])
    other = threading.Thread(target=table.put, args=(0, [[second]]))
    original = table_module.record_of

    def record(*arguments: object) -> list[int]:
        # Slot 0 was looked at already, and was empty.
        if other.ident is None:
            other.start()
            other.join(0.2)
        return original(*arguments)

    monkeypatch.setattr(table_module, "record_of", record)
    table.layout_tables(WHOLE)
    other.join()
    (held,) = table.layout_tables(WHOLE)
    assert held.records[:, 0, -1].tolist() == [ROWS, ROWS]
    assert [slot for slot, _ in table.bounded()] == [1, 0]


def test_launches_are_not_kept_if_a_layout_came_while_they_were_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    table = OperandTable(2, [ROWS], COLUMNS, "cpu")
    table.put(0, [[random_operand(rng, LowbitLayout(4), ROWS, COLUMNS)]])
    table.prepare()
    coming = [LowbitLayout(2)]

    def launch(*_: object) -> None:  # its kernel is compiled, which takes seconds, and another thread loads a delta
        if coming:
            other = random_operand(rng, coming.pop(), ROWS, COLUMNS)
            thread = threading.Thread(target=lambda: (table.put(1, [[other]]), table.prepare()))
            thread.start()
            thread.join()

    monkeypatch.setattr(launching, "_launch_products", launch)
    monkeypatch.setattr(launching, "can_repeat", lambda _: True)
    monkeypatch.setattr(launching, "may_launch", lambda *_: True)
    x, outputs = torch.zeros(1, COLUMNS), [torch.zeros(1, ROWS)]
    segments = Segments(torch.zeros(1, dtype=torch.int32), 2, {0: 1})
    key = launching.form(outputs, x, segments)
    kept = []
    for _ in range(2):
        assert launching.launch_products(outputs, x, table, segments)
        kept.append(table.launches_for(key))
    assert kept[0] is None
    assert kept[1] is not None


class CopyingMemory(RecordMemory):
    """Records whose device is a second tensor, as on a GPU, with whatever in it at first."""

    def _new_chunk(self, length: int) -> Any:
        chunk = super()._new_chunk(length)
        chunk.device = torch.full_like(chunk.host, -1)
        return chunk


LAYOUTS = (LowbitLayout(4), LowbitLayout(2), LowRankLayout(17, "BF16"), LowRankLayout(30, "BF16"), NMLayout(1, 32, 4))
OPERANDS = [
    [random_operand(np.random.default_rng(number), layout, ROWS, COLUMNS) for layout in LAYOUTS] for number in range(2)
]
PARTS = st.lists(st.lists(st.integers(0, len(LAYOUTS) - 1), max_size=2), min_size=2, max_size=2)
STEPS = st.lists(st.tuples(st.integers(0, 1), st.sampled_from(["put", "clear", "grow", "prepare", "read"]), PARTS))


@examples(60)
@given(STEPS, st.integers(0, 3))
def test_records_are_those_of_tables_made_anew(steps: list[tuple[int, str, list[list[int]]]], slot: int) -> None:
    memory = CopyingMemory(torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_memory, "CHUNK_BYTES", 512)
        tables = [OperandTable(4, [ROWS] * 2, COLUMNS, "cpu", memory) for _ in range(2)]
        places: dict[tuple[int, object, int], int] = {}
        for number, action, parts in steps:
            table = tables[number]
            if action == "put":
                table.put((slot + number) % 4, [[OPERANDS[number][at] for at in terms] for terms in parts])
            elif action == "clear":
                table.clear((slot + number) % 4)
            elif action == "grow":
                tables[number] = table.grown(table.slots + 1)
                places.clear()
            elif action == "prepare":
                for one in tables:
                    one.prepare()
                memory.flush()
            else:
                check_records(table)
                for at, held in enumerate(table.layout_tables(slice(0, 2))):
                    key = number, held.layout, at
                    assert places.setdefault(key, held.records.data_ptr()) == held.records.data_ptr()
        for table in tables:
            check_records(table)


def check_records(table: OperandTable) -> None:
    """Compare a table with one that is made anew; layouts of which there is no operand any more have empty records."""
    other = OperandTable(table.slots, table.parts, table.columns, "cpu")
    for slot in range(table.slots):
        other.put(slot, table.operands(slot))
    wanted = [(held.layout, held.records.tolist()) for held in other.layout_tables(slice(0, 2))]
    found = [(held.layout, held.records.tolist()) for held in table.layout_tables(slice(0, 2)) if held.records.any()]
    assert sorted(found, key=str) == sorted(wanted, key=str)
    assert table.token_limit == other.token_limit


def test_a_prepared_table_copies_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = CopyingMemory(torch.device("cpu"))
    tables = [OperandTable(2, [ROWS] * 2, COLUMNS, "cpu", memory) for _ in range(3)]
    for table in tables:
        table.put(0, [[OPERANDS[0][0]], []])
        table.prepare()
    memory.flush()
    with monkeypatch.context() as patch:
        patch.setattr(memory, "flush", lambda: pytest.fail("copied again"))
        assert [len(table.records()) for table in tables] == [1, 1, 1]


def test_a_table_that_another_thread_has_just_prepared_is_copied_before_it_is_read() -> None:
    memory = CopyingMemory(torch.device("cpu"))
    table = OperandTable(2, [ROWS] * 2, COLUMNS, "cpu", memory)
    table.put(0, [[OPERANDS[0][0]], []])
    table.prepare()
    check_records(table)
    table.put(0, [[OPERANDS[1][0]], []])
    table.prepare()
    check_records(table)


def test_memory_goes_with_its_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_memory, "CHUNK_BYTES", 64)
    memory = RecordMemory(torch.device("cpu"))
    first, second = memory.take((2, 3)), memory.take((4, 4))
    assert len(memory._chunks) == 2
    del first
    gc.collect()
    assert len(memory._chunks) == 1
    assert not second.tensor.any()
