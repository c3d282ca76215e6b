"""Buffers that kernels read in another form than the file's are converted, whatever their sizes and places."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest

import deltafmt
from delta_files import DeltaWriter, views_of
from deltafmt.runtime.upload_plan import UploadPlan
from deltafmt.terms.nm.layout import NMLayout

torch = pytest.importorskip("torch")

import deltafmt.torch as dt

# A rank index and a fixed one that take equally many words a row: only the words themselves differ.
SAME_SIZE = [
    (NMLayout(2, 16, 4, "rank"), 1088),
    (NMLayout(1, 6, 2, "rank"), 300),
    (NMLayout(3, 8, 3, "rank", share=2), 40),
    (NMLayout(5, 8, 3, "rank"), 24),
]


@pytest.mark.parametrize(("layout", "columns"), SAME_SIZE)
@pytest.mark.parametrize("tensors", [None, "b"])
def test_an_index_whose_size_stays(layout: NMLayout, columns: int, tensors: str | None) -> None:
    rows = 45
    assert layout.buffer_lengths(rows, columns) == layout.plain().buffer_lengths(rows, columns)
    made = DeltaWriter(np.random.default_rng(columns), "cold")
    made.add("a", (rows, columns), [layout])
    made.add("b", (rows, columns), [layout, layout])
    data = made.finish()
    loaded = dt.load(io.BytesIO(data), "cpu", tensors=tensors)
    with deltafmt.open(io.BytesIO(data)) as file:
        for name, tensor in loaded.items():
            for number, operand in enumerate(tensor.terms):
                prefix = f"terms[{number}]." if len(tensor.terms) > 1 else ""
                wanted = views_of(layout, file.buffers(name)[f"{prefix}index"], rows, columns)
                np.testing.assert_array_equal(operand.buffers["index"].numpy().view(np.uint32), wanted)


def test_buffers_that_share_their_bytes_have_places_of_their_own() -> None:
    layout, shape = NMLayout(1, 16, 4, "rank"), (32, 32)
    made = DeltaWriter(np.random.default_rng(0), "cold")
    made.add("a", shape, [layout])
    (entry,) = made.entries
    (term,) = entry.terms
    # Codes and ranks are both one nibble for each group, so a file could give the same bytes for both.
    term = replace(term, buffers={**term.buffers, "codes": term.buffers["index"]})
    entry = replace(entry, terms=(term,))
    plan = UploadPlan()
    plan.add_buffers([entry])
    assert plan.plain_offset(entry, term, "codes") != plan.plain_offset(entry, term, "index")
