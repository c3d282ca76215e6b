"""docs/examples/read_numpy.py reads every kind of term as deltafmt does, in files of random layouts and contents."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import deltafmt
from deltafmt.container.reader import Container
from deltafmt.container.writer import ContainerWriter
from deltafmt.index.entries import BaseRef, TensorEntry, Term
from deltafmt.pipeline.summary import summary_obj
from deltafmt.terms.buffers import blank, raw_bytes
from deltafmt.terms.codecs import fitted, term_codec
from deltafmt.terms.layout import TermLayout
from strategies import (
    dense_arrays,
    dense_layouts,
    fitting,
    generators,
    layouts,
    nm_arrays,
    sparse_arrays,
    sparse_layouts,
)
from term_kinds import ANY_LAYOUT, CASES

EXAMPLE = Path(__file__).parent.parent / "docs" / "examples" / "read_numpy.py"
DIGEST = bytes(32)


def load_example() -> Any:
    spec = importlib.util.spec_from_file_location("read_numpy", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def written(writer: ContainerWriter, layout: TermLayout, arrays: Any, seed: int, rows: int, columns: int) -> Term:
    layout, slots = fitted(layout, arrays, columns)
    packed = blank(layout, rows, columns, slots)
    term_codec(layout, rows, columns, seed, slots).encode(arrays, packed, 0)
    buffers = {name: writer.add(raw_bytes(array)) for name, array in packed.items()}
    return Term(writer.layout_number(layout), layout, seed, buffers, slots)


def term_of(data: st.DataObject, writer: ContainerWriter, kind: str, rows: int, columns: int) -> Term:
    if kind in ("seeded", "fixed"):
        nm_layout = data.draw(layouts(kind))
        seed = data.draw(st.integers(0, 2**32 - 1)) if nm_layout.seeded else 0
        return written(writer, nm_layout, data.draw(nm_arrays(nm_layout, rows, columns, seed)), seed, rows, columns)
    if kind == "any":
        layout = fitting(data.draw(ANY_LAYOUT).plain(), rows, columns)
        seed = data.draw(st.integers(0, 2**32 - 1)) if layout.seeded else 0
        arrays = CASES[layout.kind].arrays(data.draw(generators()), layout, rows, columns, seed)
        return written(writer, layout, arrays, seed, rows, columns)
    if kind == "sparse":
        sparse_layout = data.draw(sparse_layouts())
        return written(writer, sparse_layout, data.draw(sparse_arrays(sparse_layout, rows, columns)), 0, rows, columns)
    layout = fitting(data.draw(dense_layouts()), rows, columns)
    return written(writer, layout, data.draw(dense_arrays(layout, rows, columns)), 0, rows, columns)


@pytest.fixture(scope="module")
def example() -> Any:
    return load_example()


@given(
    data=st.data(),
    kinds=st.lists(st.sampled_from(("any", "seeded", "fixed", "sparse", "dense")), min_size=1, max_size=3),
    rows=st.integers(1, 140),
    columns=st.integers(1, 300),
)
@settings(max_examples=60, deadline=None)
def test_any_sum_of_terms(
    example: Any,
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    kinds: list[str],
    rows: int,
    columns: int,
) -> None:
    path = tmp_path_factory.mktemp("read") / "random.deltafmt"
    with path.open("wb") as sink:
        writer = ContainerWriter(sink, "hot")
        terms = tuple(term_of(data, writer, kind, rows, columns) for kind in kinds)
        grown = data.draw(st.integers(0, 2))
        new_rows = writer.add(bytes(grown * columns * 2)) if grown else None
        base, shape = BaseRef(DIGEST, "BF16", (rows, columns)), (rows + grown, columns)
        entry = TensorEntry("w", "add", "BF16", shape, base, DIGEST, new_rows, terms)
        writer.boundary()
        writer.finish([entry], metadata={})
    with Container(path) as container:
        report = json.loads(json.dumps(summary_obj(container)))
    with deltafmt.open(path) as opened:
        expected = opened.delta("w")[:rows]
    with np.errstate(all="ignore"):
        found = example.delta(report, "w")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


def test_as_a_program(tmp_path: Path) -> None:
    nano = Path(__file__).parent.parent / "examples" / "nano"
    file, inspected = tmp_path / "math.deltafmt", tmp_path / "math.json"
    method = deltafmt.methods.Residual(rank=4)
    deltafmt.pack(nano / "base", nano / "math", file, method=method)
    with Container(file) as container:
        inspected.write_text(json.dumps(summary_obj(container)))
    name = "model.layers.1.mlp.down_proj.weight"
    # -I: the checkout is not on the path, so the program cannot import deltafmt from it.
    command = [sys.executable, "-I", str(EXAMPLE), str(inspected), name]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    with deltafmt.open(file) as opened:
        delta = opened.delta(name)
    assert printed[:2] == [f"{name}: 128 x 384", f"nonzero elements: {np.count_nonzero(delta)}"]
    assert printed[3] == "row 0: " + " ".join(f"{value:.6g}" for value in delta[0, :8])
