"""Files that are restored byte for byte (specification, 7.10): which headers are packed, and files made of terms."""

from __future__ import annotations

from pathlib import Path

import hostile
import pytest
import repair
import tensors
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

import deltafmt
from conftest import Cli, Pair, normal, nudge, refused, safetensors_bytes, small_tensors, write_folder
from deltafmt.delta import codec_of, rows_for_chunks
from deltafmt.errors import InvalidFileError, WrongBaseError
from deltafmt.exact.coding import ROW_BYTES
from deltafmt.format import constants as c
from deltafmt.index.entries import BaseRef, TensorEntry, Term
from deltafmt.index.exact import ExactRef
from deltafmt.index.sections import BufferRef
from deltafmt.methods import RTN, Exact
from deltafmt.terms.nm.layout import NMLayout


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b'"shape":', b'"extra":1,"shape":', "expected the keys dtype, shape and data_offsets"),
        (b"{", b'{"__metadata__":{"a":1},', "not a map from string to string"),
    ],
)
def test_a_header_that_a_reader_would_refuse_is_not_packed(
    old: bytes, new: bytes, words: str, tmp_path: Path, cli: Cli
) -> None:
    """Whatever `pack` takes, `verify` and `unpack` take."""
    a, b = small_tensors()
    base, finetuned = write_folder(tmp_path / "base", a), write_folder(tmp_path / "finetuned", b)
    content = safetensors_bytes(b)
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].replace(old, new, 1)
    path = finetuned / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    for method in (("--method", "exact"), ("--exact",)):
        refused(cli("pack", base, finetuned, "-o", tmp_path / "d", *method), 3, words, "save it again with safetensors")
    assert cli("pack", base, finetuned, "-o", tmp_path / "d").code == 0


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    a = {"conv": normal(1, (40, 8, 3, 3)), "half": normal(2, (20, 16), "F16"), "grown": normal(3, (20, 16))}
    b = {name: nudge(tensor, seed) for seed, (name, tensor) in enumerate(a.items(), 7)}
    b["grown"] = normal(5, (23, 16))
    return Pair(write_folder(tmp_path / "base", a), write_folder(tmp_path / "finetuned", b), a, b)


def with_file(delta: bytes, whole: bytes) -> bytes:
    """Return a delta that says that it restores a weight file; its tensors stay as they are."""
    head = whole[: 8 + int.from_bytes(whole[:8], "little")]
    parts = repair.split(delta)
    assert parts is not None
    parts.header.incompatible |= c.FEATURE_EXACT
    number = len(parts.sections)
    tensors.insert_section(parts, number, c.SECTION_KIND_ATTACHMENTS, head)
    parts.index["files"] = {"model.safetensors": {"digest": blake3(whole).digest(), "head": [number, 0, len(head)]}}
    made = repair.join(parts)
    assert made is not None
    return made


def test_a_file_is_restored_from_terms_alone(pair: Pair, tmp_path: Path) -> None:
    """No writer makes such a file. What terms give is the same everywhere, so its digest can be right."""
    plain, made = tmp_path / "plain.deltafmt", tmp_path / "made.deltafmt"
    deltafmt.pack(pair.base, pair.finetuned, plain, method=RTN(4))
    deltafmt.unpack(pair.base, plain, tmp_path / "out")
    whole = (tmp_path / "out" / "model.safetensors").read_bytes()
    made.write_bytes(with_file(plain.read_bytes(), whole))
    assert deltafmt.verify(made, pair.base).restored == ("model.safetensors",)
    deltafmt.unpack(pair.base, made, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == whole
    made.write_bytes(with_file(plain.read_bytes(), (pair.finetuned / "model.safetensors").read_bytes()))
    assert deltafmt.verify(made).base_tensors is None
    with pytest.raises(InvalidFileError, match="what is restored is not what was packed"):
        deltafmt.verify(made, pair.base)
    with pytest.raises(InvalidFileError, match="what is restored is not what was packed"):
        deltafmt.unpack(pair.base, made, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@given(
    rows=st.integers(1, 300),
    new=st.integers(0, 40),
    columns=st.integers(1, 70),
    share=st.sampled_from([1, 2, 8]),
    chunk=st.sampled_from([256, 512, 1 << 20]),
)
@settings(max_examples=60, deadline=None)
def test_rows_are_counted_as_they_are_decoded(rows: int, new: int, columns: int, share: int, chunk: int) -> None:
    """A chunk is predicted from whole runs of rows; a file of small chunks and long runs decodes them many times."""
    layout = NMLayout(1, 4, 1, "seeded", "midrise", share=share)
    base = BaseRef(bytes(32), "BF16", (rows, columns))
    units = (rows + new) * columns
    exact = ExactRef(chunk, BufferRef(0, 0, 16 * -(-units // chunk)), bytes(32), (0,))
    entry = TensorEntry(
        "w", "add", "BF16", (rows + new, columns), base, bytes(32), None, (Term(0, layout, 1, {}),), exact=exact
    )
    step = codec_of(entry, entry.terms[0]).run_rows
    decoded = 0
    for first in range(0, rows * columns, chunk):
        end = min(first + chunk, rows * columns)
        start, stop = first // columns // step * step, -(-end // columns // step) * step
        decoded += min(stop, rows) - start
    assert rows_for_chunks(entry, exact, step) == decoded >= rows


def test_small_chunks_are_refused_before_their_terms_are_decoded(tmp_path: Path) -> None:
    """A file of 47 KB that took a minute: 2,048 chunks of half a row, each predicted from 256 rows of 16 terms."""
    base, digest = hostile.make_base(tmp_path)
    made = hostile.FILES["16 terms, small chunks"](tmp_path / "d.deltafmt", digest)
    assert deltafmt.verify(made).base_tensors is None
    with pytest.raises(InvalidFileError, match="max_elements"):
        deltafmt.verify(made, base)
    with pytest.raises(InvalidFileError, match="max_elements"):
        deltafmt.unpack(base, made, tmp_path / "out")
    with pytest.raises(InvalidFileError, match="max_elements"):
        deltafmt.apply(base, [made], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_a_file_takes_is_counted_before_it_is_restored(pair: Pair, tmp_path: Path) -> None:
    plain, made = tmp_path / "plain.deltafmt", tmp_path / "made.deltafmt"
    deltafmt.pack(pair.base, pair.finetuned, plain, method=RTN(4))
    made.write_bytes(with_file(plain.read_bytes(), (pair.finetuned / "model.safetensors").read_bytes()))
    assert deltafmt.verify(made, limits=deltafmt.Limits(max_elements=100)).base_tensors is None
    with pytest.raises(InvalidFileError, match="max_elements"):
        deltafmt.verify(made, pair.base, limits=deltafmt.Limits(max_elements=100))


def test_a_damaged_chunk_is_said_before_another_base(pair: Pair, tmp_path: Path) -> None:
    plain, made = tmp_path / "plain.deltafmt", tmp_path / "made.deltafmt"
    deltafmt.pack(pair.base, pair.finetuned, plain, method=Exact())
    parts = repair.split(plain.read_bytes())
    assert parts is not None
    section, offset, length = parts.index["tensors"]["half"]["exact"]["data"]
    parts.sections[section][offset + length - ROW_BYTES - 1] ^= 1
    parts.sections[section][offset] ^= 1
    broken = repair.join(parts)
    assert broken is not None
    made.write_bytes(broken)
    other = write_folder(tmp_path / "other", {**pair.a, "conv": nudge(pair.a["conv"], 99)})
    for base in (None, pair.base, other):
        with pytest.raises(InvalidFileError, match=r'tensors\["half"\]: chunk 0: '):
            deltafmt.verify(made, base)
    with pytest.raises(WrongBaseError, match='tensor "conv" differs'):
        deltafmt.verify(plain, other)
