"""What holds for every kind of term: its layout is read as written, its file verifies, repacks and goes to a device."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given

import deltafmt
from deltafmt.checkpoint.folder_writer import TensorSpec
from deltafmt.container.writer import ContainerWriter
from deltafmt.delta import DeltaFile
from deltafmt.errors import InvalidFileError
from deltafmt.index.entries import BaseRef
from deltafmt.pipeline.entry_writer import EntryWriter, packed_bytes
from deltafmt.pipeline.summary import cost_tree
from deltafmt.terms.buffers import blank
from deltafmt.terms.codec import TermCodec
from deltafmt.terms.codecs import CODECS, fitted, term_codec
from deltafmt.terms.layout import TermLayout
from deltafmt.terms.nm.index.codecs import INDEX_CODECS
from deltafmt.terms.nm.index.encodings import ENCODINGS
from deltafmt.terms.registry import LAYOUTS, parse_layout
from index_cases import INDEX_CASES
from strategies import examples, fitting, generators, shapes
from term_kinds import ANY_LAYOUT, CASES

EVERY_KIND = pytest.mark.parametrize("kind", CASES)


def test_every_list_has_every_kind() -> None:
    assert list(LAYOUTS) == list(CODECS)
    assert set(LAYOUTS) == set(CASES)


def test_every_list_has_every_index_encoding() -> None:
    assert list(ENCODINGS) == list(INDEX_CODECS) == [codec.encoding.name for codec in INDEX_CODECS.values()]
    assert set(ENCODINGS) == set(INDEX_CASES)
    index = pytest.importorskip("deltafmt.kernels.nm.index")
    assert set(index.DEVICE_INDEXES) == {encoding.plain for encoding in ENCODINGS.values()}
    numbers = [known.number for known in index.DEVICE_INDEXES.values()]
    assert len(set(numbers)) == len(numbers)


@EVERY_KIND
def test_every_device_list_has_every_kind(kind: str) -> None:
    registry = pytest.importorskip("deltafmt.kernels.registry")
    assert list(registry.KERNELS) == list(LAYOUTS)
    assert registry.KERNELS[kind].record.offset("rows") == len(registry.KERNELS[kind].record) - 1


@examples(100)
@given(ANY_LAYOUT)
def test_a_layout_is_read_as_it_is_written(layout: TermLayout) -> None:
    obj = layout.to_obj()
    assert list(obj) == sorted(obj)
    assert parse_layout(obj, "layouts[0]") == layout
    assert layout.plain().plain() == layout.plain()
    assert layout.for_profile("hot") == layout.plain()
    assert layout.for_profile("cold").for_profile("hot") == layout.plain()


def packed_codec(
    rng: np.random.Generator, layout: TermLayout, rows: int, columns: int
) -> tuple[TermCodec, dict[str, np.ndarray]]:
    """Return a codec, and random content that it has packed."""
    seed = int(rng.integers(2**32)) if layout.seeded else 0
    layout = fitting(layout, rows, columns)
    arrays = CASES[layout.kind].arrays(rng, layout, rows, columns, seed)
    layout, slots = fitted(layout, arrays, columns)
    codec = term_codec(layout, rows, columns, seed, slots)
    packed = blank(layout, rows, columns, slots)
    codec.encode(arrays, packed, 0)
    return codec, packed


def file_of(codec: TermCodec, packed: dict[str, np.ndarray], profile: str) -> bytes:
    """Return a file with one BF16 tensor of one term."""
    out = io.BytesIO()
    writer = ContainerWriter(out, profile)
    base = BaseRef(bytes(32), "BF16", codec.shape)
    entry = EntryWriter(writer).add(TensorSpec("w", "BF16", codec.shape), base, [packed_bytes(codec, packed)])
    writer.finish([entry])
    return out.getvalue()


@examples(60)
@given(ANY_LAYOUT, shapes(80, 150), generators())
def test_a_file_of_any_kind(layout: TermLayout, shape: tuple[int, int], rng: np.random.Generator) -> None:
    codec, packed = packed_codec(rng, layout, *shape)
    data = file_of(codec, packed, "cold" if layout.cold_only else "hot")
    with DeltaFile(io.BytesIO(data)) as delta:
        rows = codec.shape[0]
        np.testing.assert_array_equal(delta.delta("w"), codec.decode(packed, 0, rows, check_form=True))
        part = codec.run_rows if rows > codec.run_rows else 0
        np.testing.assert_array_equal(delta.delta("w")[part:], codec.decode(packed, part, rows))


@EVERY_KIND
def test_the_bytes_of_every_buffer_are_counted(kind: str) -> None:
    for layout in CASES[kind].samples:
        assert set(layout.buffers(70, 90)) <= set(layout.counted_as)
        codec, packed = packed_codec(np.random.default_rng(4), layout, 70, 90)
        with DeltaFile(io.BytesIO(file_of(codec, packed, "cold" if layout.cold_only else "hot"))) as delta:
            (deltas,) = (node for node in cost_tree(delta.container).children if node.label == "deltas")
        assert deltas.size == sum(array.nbytes for array in packed.values())
        assert {node.label for node in deltas.children} <= set(layout.counted_as.values())


@EVERY_KIND
def test_verify_and_repack(kind: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for number, layout in enumerate(CASES[kind].samples):
        codec, packed = packed_codec(rng, layout, 70, 90)
        path = tmp_path / f"{number}.deltafmt"
        path.write_bytes(file_of(codec, packed, "cold" if layout.cold_only else "hot"))
        assert deltafmt.verify(path).tensors == 1
        cold = deltafmt.repack(path, tmp_path / f"{number}.cold", profile="cold")
        again = deltafmt.repack(cold.path, tmp_path / f"{number}.hot", profile="hot")
        with deltafmt.open(path) as first, deltafmt.open(again.path) as last:
            assert first.content_id == last.content_id == cold.content_id
            np.testing.assert_array_equal(first.delta("w"), last.delta("w"))


@EVERY_KIND
def test_a_device_has_the_same_delta(kind: str) -> None:
    pytest.importorskip("torch")
    from deltafmt.kernels.products import operand_delta

    rng = np.random.default_rng(2)
    for layout in CASES[kind].samples:
        for profile in ("hot", "cold"):
            stored = layout.for_profile(profile)
            codec, packed = packed_codec(rng, stored, 70, 90)
            loaded = deltafmt.torch.load(io.BytesIO(file_of(codec, packed, profile)), "cpu")
            (operand,) = loaded["w"].terms
            np.testing.assert_array_equal(operand_delta(operand).numpy(), codec.decode(packed, 0, 70))


@EVERY_KIND
def test_a_wrong_length_is_refused(kind: str) -> None:
    codec, packed = packed_codec(np.random.default_rng(3), CASES[kind].samples[0], 40, 50)
    name = next(name for name, array in packed.items() if array.nbytes)
    shorter = {**packed, name: packed[name].reshape(-1)[:-1]}
    with (
        pytest.raises(InvalidFileError, match=f"buffers.{name}"),
        DeltaFile(io.BytesIO(file_of(codec, shorter, "hot"))) as delta,
    ):
        delta.delta("w")
