"""The container: what is written is read back, and any damage to a file is found."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import deltafmt
from containers import FILE_NAMES, NAMES, index_of, replacement, sealed, write_container
from deltafmt.container import canonical, frame
from deltafmt.container.reader import Container
from deltafmt.container.writer import ContainerWriter
from deltafmt.delta import DeltaFile
from deltafmt.errors import DeltafmtError, InvalidFileError, StorageError, UnsupportedError
from deltafmt.format import constants as c
from strategies import examples, generators


@examples(60)
@given(
    st.dictionaries(NAMES, st.binary(max_size=700), max_size=6),
    st.dictionaries(FILE_NAMES, st.binary(max_size=700), max_size=4),
    st.dictionaries(NAMES, NAMES, max_size=3),
    st.sampled_from(c.PROFILES),
)
def test_what_is_written_is_read(
    tensors: dict[str, bytes], attachments: dict[str, bytes], metadata: dict[str, str], profile: str
) -> None:
    removed = [name for name in ("gone", "lost") if name not in tensors]
    data = write_container(tensors, attachments, profile, removed=removed, metadata=metadata)
    with DeltaFile(io.BytesIO(data)) as opened:
        container = opened.container
        assert container.profile == profile
        assert container.metadata == metadata
        assert list(container.removed) == removed
        assert opened.keys() == sorted(tensors)
        assert {name: bytes(opened.buffers(name)["data"]) for name in opened} == tensors
        assert {name: opened.attachment(name) for name in container.attachments} == attachments
        assert all(section.offset % c.SECTION_ALIGNMENT == 0 for section in container.sections)
    assert deltafmt.verify(io.BytesIO(data), threads=1).sections == len(container.sections)  # type: ignore[arg-type]


@examples(15)
@given(generators(), st.integers(0, 3 * c.ZSTD_CHUNK), st.sampled_from(c.PROFILES))
def test_a_buffer_in_pieces_is_the_buffer_whole(rng: np.random.Generator, size: int, profile: str) -> None:
    data = rng.integers(0, 3, size, np.uint8).tobytes()
    cuts = sorted(rng.integers(0, size + 1, 5).tolist())
    pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, size], strict=True)]
    files = []
    for given_data in (data, bytearray(data), memoryview(data), pieces, iter(pieces)):
        sink = io.BytesIO()
        writer = ContainerWriter(sink, profile)
        writer.add(b"\x01")
        ref = writer.add(given_data)
        assert (ref.section, ref.offset, ref.length) == (0, c.BUFFER_ALIGNMENT, size)
        writer.finish([])
        files.append(sink.getvalue())
    assert len(set(files)) == 1
    assert bytes(Container(io.BytesIO(files[0])).buffer(ref)) == data


def test_large_tensors_close_a_section() -> None:
    sizes = (3 << 20, 3 << 20, 100, 5 << 20, 7)
    data = write_container({f"t{i}": bytes([i]) * size for i, size in enumerate(sizes)}, {"a.json": b"{}"})
    container = Container(io.BytesIO(data))
    assert [container.entry(f"t{i}").refs()[0][1].section for i in range(5)] == [0, 0, 1, 1, 2]
    assert [section.kind for section in container.sections] == [c.SECTION_KIND_TENSORS] * 3 + [
        c.SECTION_KIND_ATTACHMENTS
    ]


def test_profiles_share_a_content_id() -> None:
    ids = {Container(io.BytesIO(write_container({"a": b"123" * 999}, profile=p))).content_id for p in c.PROFILES}
    other = Container(io.BytesIO(write_container({"a": b"124" * 999}))).content_id
    assert len(ids) == 1
    assert other not in ids


def test_maps_plain_reads_and_streams_give_the_same(packed: Path) -> None:
    def content(opened: DeltaFile) -> list[tuple[str, str, bytes]]:
        with opened:
            found = [(name, key, array.tobytes()) for name in opened for key, array in opened.buffers(name).items()]
            found += [(name, "delta", opened.delta(name).tobytes()) for name in opened if opened[name].terms]
            return found + [(name, "file", opened.attachment(name)) for name in opened.container.attachments]

    mapped = content(DeltaFile(packed))
    assert len(mapped) == 3 + 3 + 1 + 1 + 2 + 1
    assert content(DeltaFile(str(packed), mmap=False)) == mapped
    assert content(DeltaFile(io.BytesIO(packed.read_bytes()))) == mapped
    with open(packed, "rb") as file:
        assert content(DeltaFile(file)) == mapped
        assert not file.closed


def test_views_are_read_only_and_outlive_the_file(packed: Path) -> None:
    with DeltaFile(packed) as opened:
        views = opened.buffers("proj.weight")
        copies = {name: view.tobytes() for name, view in views.items()}
    assert not any(view.flags.writeable for view in views.values())
    assert {name: view.tobytes() for name, view in views.items()} == copies


def test_repack_there_and_back_is_the_file_itself(packed: Path, tmp_path: Path) -> None:
    profile = Container(packed).profile
    other = {"hot": "cold", "cold": "hot"}[profile]
    deltafmt.repack(packed, tmp_path / "other", profile=other)
    deltafmt.repack(tmp_path / "other", tmp_path / "again", profile=profile)
    deltafmt.verify(tmp_path / "other", threads=1)
    assert (tmp_path / "again").read_bytes() == packed.read_bytes()


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    for mmap in (True, False):
        with pytest.raises(StorageError, match="no such file"):
            Container(tmp_path / "missing", mmap=mmap)
        with pytest.raises(InvalidFileError, match=r"^[^:]*: it is a folder, not a delta file$"):
            Container(tmp_path, mmap=mmap)
        with pytest.raises(InvalidFileError, match="empty"):
            Container(tmp_path / "empty", mmap=mmap)


def test_every_flipped_byte_is_found(packed: Path) -> None:
    rng = np.random.default_rng(1)
    data = bytearray(packed.read_bytes())
    flips = rng.integers(1, 256, len(data)).tolist()
    missed = []
    # Zeros, most of them padding, are sampled; every other byte is tried.
    places = [place for place, byte in enumerate(data) if byte or rng.random() < 0.2]
    for place, flip in ((place, flips[place]) for place in places):
        data[place] ^= flip
        try:
            deltafmt.verify(io.BytesIO(data), threads=1)  # type: ignore[arg-type]
            missed.append(place)
        except DeltafmtError:
            pass
        data[place] ^= flip
    assert missed == []
    deltafmt.verify(io.BytesIO(data), threads=1)  # type: ignore[arg-type]


def test_every_flipped_bit_of_the_ends_is_found(packed: Path) -> None:
    data = bytearray(packed.read_bytes())
    for place in [*range(c.HEADER_SIZE), *range(len(data) - c.TRAILER_SIZE, len(data))]:
        for bit in range(8):
            data[place] ^= 1 << bit
            with pytest.raises(InvalidFileError):
                Container(io.BytesIO(data))
            data[place] ^= 1 << bit


def test_every_truncation_is_found(packed: Path) -> None:
    data = packed.read_bytes()
    for length in range(len(data)):
        with pytest.raises(InvalidFileError):
            Container(io.BytesIO(data[:length]))


@pytest.mark.parametrize("extra", [b"\0", b"\n", b"\r\n", bytes(128), bytes(4096)])
def test_what_follows_the_trailer_is_refused(packed: Path, extra: bytes) -> None:
    data = packed.read_bytes()
    for damaged in (data + extra, data + data[-c.TRAILER_SIZE :], data + data):
        with pytest.raises(InvalidFileError):
            Container(io.BytesIO(damaged))


def test_a_damaged_section_is_found_when_it_is_touched(packed: Path) -> None:
    data = bytearray(packed.read_bytes())
    section = Container(io.BytesIO(data)).sections[0]
    data[section.offset] ^= 1
    with DeltaFile(io.BytesIO(data)) as opened:
        assert opened.keys() == ["embed.weight", "norm.weight", "proj.weight"]
        with pytest.raises(InvalidFileError, match=r"section 0 at 4096 is damaged"):
            opened.delta("proj.weight")


def test_checks_can_be_turned_off_by_name() -> None:
    data = bytearray(write_container({"a": b"abc"}))
    data[c.SECTION_ALIGNMENT] ^= 1
    with DeltaFile(io.BytesIO(data), verify=False) as opened:
        assert bytes(opened.buffers("a")["data"]) == b"`bc"
    with pytest.raises(InvalidFileError, match="damaged"):
        deltafmt.verify(io.BytesIO(data), threads=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("magic", "match"),
    [
        (b"\x09DLT\r\n\x1a\n", "text mode"),  # seven bits
        (b"\x89DLT\n\x1a\n\0", "text mode"),  # CR LF to LF
        (b"\x89DLT\r\r\n\x1a", "text mode"),  # LF to CR LF
        (b"\x89DLT\r\n", "text mode"),  # ended by SUB
        (b"\x89PNG\r\n\x1a\n", "not a deltafmt file: it starts with 89504e47"),
        (b"\x93NUMPY\x01\0", "not a deltafmt file"),
        (b"\0" * 8, "not a deltafmt file"),
    ],
)
def test_a_damaged_magic_says_how(magic: bytes, match: str) -> None:
    data = write_container({"a": b"abc"})
    with pytest.raises(InvalidFileError, match=match):
        Container(io.BytesIO(magic + data[8:]))


def test_a_newer_file_is_refused_as_such() -> None:
    data = write_container({"a": b"abc"})
    with pytest.raises(UnsupportedError, match="needs a reader of version 2, this one reads 1"):
        Container(io.BytesIO(sealed(data, canonical.pack(index_of(data)), frame.encode_header(2))))


@pytest.mark.parametrize("bit", [6, 9, 63])
def test_an_unknown_incompatible_feature_is_named(bit: int) -> None:
    data = write_container({"a": b"abc"})
    with pytest.raises(UnsupportedError, match=rf"bit {bit}$"):
        Container(io.BytesIO(sealed(data, canonical.pack(index_of(data)), frame.encode_header(1, 1 << bit))))


def test_an_unknown_compatible_feature_is_read() -> None:
    data = write_container({"a": b"abc"})
    header = frame.encode_header(1, 0, 1 << 63 | 1)
    assert Container(io.BytesIO(sealed(data, canonical.pack(index_of(data)), header))).keys() == ["a"]


class CountedReads(io.BytesIO):
    """A file object that counts its reads, as a remote one would make requests."""

    reads = 0

    def read(self, size: int | None = -1) -> bytes:
        """Read, and count it."""
        self.reads += 1
        return super().read(size)


@pytest.mark.parametrize(("tensors", "reads"), [(0, 2), (300, 2), (2500, 3)])
def test_a_file_object_opens_with_two_reads(tensors: int, reads: int) -> None:
    writer = ContainerWriter(sink := io.BytesIO())
    writer.finish([replacement(writer, f"layers.{number}.weight", bytes([number % 256])) for number in range(tensors)])
    file = CountedReads(sink.getvalue())
    container = Container(file)
    # The beginning, and the last 256 KiB; a longer index is read after that.
    assert file.reads == reads
    assert (container.index_length + c.TRAILER_SIZE > c.TAIL_BYTES) == (reads == 3)
    assert [entry.name for entry in container.entries()] == container.keys()
    assert len(container.keys()) == tensors
