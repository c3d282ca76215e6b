"""Operand tables while several threads use them."""

from __future__ import annotations

import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from deltafmt.kernels import table as table_module
from deltafmt.kernels.table import OperandTable
from deltafmt.terms.lowbit.layout import LowbitLayout
from operands import random_operand

ROWS, COLUMNS = 40, 64
WHOLE = slice(0, 1)


def test_a_slot_that_is_filled_while_records_are_built(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    first, second = (random_operand(rng, LowbitLayout(4), ROWS, COLUMNS) for _ in range(2))
    table = OperandTable(2, [ROWS], COLUMNS, "cpu")
    table.put(1, [[first]])
    other = threading.Thread(target=table.put, args=(0, [[second]]))
    original = table_module._record

    def record(*arguments: object) -> list[int]:
        # Slot 0 was looked at already, and was empty.
        if other.ident is None:
            other.start()
            other.join(0.2)
        return original(*arguments)

    monkeypatch.setattr(table_module, "_record", record)
    table.layout_tables(WHOLE)
    other.join()
    (held,) = table.layout_tables(WHOLE)
    assert held.records[:, 0, -1].tolist() == [ROWS, ROWS]
    assert [one.slot for one in table.bounded()] == [1, 0]
