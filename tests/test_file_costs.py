"""What a small file may cost: memory and work follow its bytes, or it is refused by the name of a limit."""

from __future__ import annotations

import contextlib
import io
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hostile import HUGE, MIB, Writer

import deltafmt
from conftest import Cli, normal, refused, write_folder
from containers import sealed, write_container
from deltafmt.container.decoded_size import PER_BYTE, SLACK, WORST, decoded_size
from deltafmt.container.reader import Container
from deltafmt.delta import RunDecoder, codec_of
from deltafmt.errors import InvalidFileError, UsageError
from deltafmt.format.constants import MAX_TENSORS
from deltafmt.format.limits import Limits
from deltafmt.terms import levels
from deltafmt.terms.buffers import raw_bytes
from deltafmt.terms.coding import Coding
from deltafmt.terms.lowrank.layout import LowRankLayout
from deltafmt.terms.nm.layout import NMLayout

MOST_MEMORY = 256 * 10**6


@contextlib.contextmanager
def bounded(most: int = MOST_MEMORY) -> Iterator[None]:
    """Check how much memory the work takes at its peak."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


@pytest.fixture
def no_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a dense row is made."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a dense row was made")

    monkeypatch.setattr(RunDecoder, "rows", fail)
    monkeypatch.setattr(RunDecoder, "add", fail)
    monkeypatch.setattr(levels, "add_outer", fail)


@pytest.mark.usefixtures("no_matrix")
@pytest.mark.parametrize("name", HUGE)
def test_verify_of_a_small_file_makes_no_matrix(tmp_path: Path, name: str) -> None:
    writer = Writer()
    writer.add("w", *HUGE[name])
    path = writer.write(tmp_path / "d.deltafmt")
    with bounded():
        assert deltafmt.verify(path).tensors == 1
    with deltafmt.open(path) as delta, pytest.raises(InvalidFileError, match=r"max_elements is|max_memory is"):
        delta.delta("w")


def test_a_small_file_that_decodes_to_much_is_refused_at_opening(tmp_path: Path, cli: Cli) -> None:
    writer = Writer()
    writer.replace("w", 40 * MIB)
    path = writer.write(tmp_path / "d.deltafmt", {"a.json": bytes(30 * MIB)})
    match = r"the sections decode to 73,400,320 bytes, and max_output is \d"
    for work in (deltafmt.open, deltafmt.verify, lambda path: deltafmt.diff(path, path)):
        with bounded(16 * MIB), pytest.raises(InvalidFileError, match=match):
            work(path)
    assert deltafmt.verify(path, limits=Limits(max_output=70 * MIB)).tensors == 1
    for command in (["inspect", path], ["verify", path], ["repack", path, "-o", tmp_path / "o", "--profile", "hot"]):
        assert "; --max-output raises the limit" in refused(cli(*command), 3)
        assert cli(*command, "--max-output", "70MiB").code == 0


def test_what_is_compressed_is_checked_in_pieces(tmp_path: Path) -> None:
    writer = Writer()
    writer.replace("w", 30 * MIB)
    path = writer.write(tmp_path / "d.deltafmt", {"a.json": bytes(10 * MIB)})
    with bounded(12 * MIB):
        deltafmt.verify(path, limits=Limits(max_output=1 << 30))


def test_aliases_do_not_multiply_the_output(tmp_path: Path) -> None:
    writer = Writer()
    writer.replace("w", 4 * MIB)
    for number in range(80):
        writer.alias(f"alias.{number}", "w")
    path = writer.write(tmp_path / "d.deltafmt")
    base = write_folder(tmp_path / "base", {"w": normal(1, (4, 4))})
    with pytest.raises(InvalidFileError, match="unpacking gives 339,738,624 bytes, and max_output is"):
        deltafmt.unpack(base, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert deltafmt.unpack(base, path, tmp_path / "out", limits=Limits(max_output=1 << 30)).tensors == 81


def test_terms_on_a_small_base_do_not_multiply_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_folder(tmp_path / "base", {"w": normal(1, (1024, 1024))})
    writer = Writer()
    writer.add("w", (1024, 1024), [LowRankLayout(1024, Coding(bits, "midrise")) for bits in (1, 2)])
    path = writer.write(tmp_path / "d.deltafmt")
    outer: list[int] = []
    monkeypatch.setattr("deltafmt.terms.lowrank.codec.add_outer", lambda u, *_: outer.append(u.size))
    with pytest.raises(InvalidFileError, match="decoding takes 2,147,483,648 elements, and max_elements is"):
        deltafmt.unpack(base, path, tmp_path / "out", force_base=True)
    assert not outer
    deltafmt.unpack(base, path, tmp_path / "out", force_base=True, limits=Limits(max_elements=1 << 31))
    assert sum(outer) == 2 * 1024 * 1024


def test_an_adapter_is_bounded(tmp_path: Path) -> None:
    writer = Writer()
    writer.add("model.layers.0.mlp.up_proj.weight", (2**21, 2**20), [LowRankLayout(16, Coding(1, "midrise"))])
    path = writer.write(tmp_path / "d.deltafmt")
    with bounded(), pytest.raises(InvalidFileError, match="the adapter takes 201,326,592 bytes, and max_output is"):
        deltafmt.export_lora(path, tmp_path / "out")
    with bounded(), pytest.raises(InvalidFileError, match=r"the factors of .* take .* bytes of memory, and max_memory"):
        deltafmt.export_lora(path, tmp_path / "out", limits=Limits(max_output=1 << 30))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shape", [(32 * 255, 255), (32, 2**15 * 255)])
def test_ranks_become_positions_in_pieces(tmp_path: Path, shape: tuple[int, int]) -> None:
    """An index of 254 of 255 positions in 8 bits becomes 2032 bits in its other form."""
    layout = NMLayout(254, 255, 1, "rank", "midrise")
    writer = Writer()
    writer.add("w", shape, [layout])
    entry = writer.entries[0]
    path = writer.write(tmp_path / "d.deltafmt")
    if shape[1] > 255:
        for work in (deltafmt.verify, lambda *a, **k: deltafmt.repack(*a, tmp_path / "o", profile="hot", **k)):
            with bounded(), pytest.raises(InvalidFileError, match=r"an index of .* takes .* max_memory is"):
                work(path, limits=Limits(max_output=1 << 40))
        return
    with deltafmt.open(path) as delta:
        codec = codec_of(entry, entry.terms[0])
        index = delta.term_views(entry, entry.terms[0])["index"]
        pieces = [raw_bytes(piece) for piece in codec.digested_pieces("index", index)]
    assert len(pieces) > 4
    assert b"".join(pieces) == raw_bytes(codec.converted({"index": index}, entry.terms[0].layout.plain())["index"])


HOSTILE: dict[str, bytes] = {
    "empty maps": b"\xdd" + (MIB // 2).to_bytes(4, "big") + b"\x80" * (MIB // 2),
    "empty lists": msgpack.packb([[[]] * 99_000] * 8),
    "small maps": msgpack.packb([{"a": 0}] * 300_000),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_an_index_is_counted_before_it_is_decoded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = sealed(write_container({"a": b"x"}), HOSTILE[name])
    calls: list[int] = []
    monkeypatch.setattr(msgpack, "unpackb", lambda data, **_: calls.append(len(data)))
    with pytest.raises(InvalidFileError, match="bytes of memory, which is max_memory"):
        Container(io.BytesIO(data))
    assert not calls


@pytest.mark.parametrize("head", [b"\x91", b"\xdd\x00\x0f\x42\x40", b"\xdf\x00\x0f\x42\x40\xa1a"])
def test_nothing_is_allocated_for_members_that_are_not_there(head: bytes) -> None:
    """Lists inside each other, each of which says that it has a million members."""
    data = sealed(write_container({"a": b"x"}), head * 400)
    with bounded(16 * MIB), pytest.raises(InvalidFileError, match=r"not valid msgpack|not in canonical"):
        Container(io.BytesIO(data))


@pytest.mark.parametrize(
    "obj",
    [
        [{}] * 1000,
        [{"a": {}}] * 1000,
        ["ab"] * 1000,
        {f"{n:02d}": "cd" for n in range(99)},
        [1.5, 2**40, -1, b"abc", None, True, "x" * 300, [2**70 >> 8] * 20, -(2**31), [0] * 70_000],
        list(range(70_000)),
        {"sections": [{"checksum": bytes(16), "codec": 1, "kind": 2, "length": 9**9, "offset": 4096}] * 50},
    ],
)
def test_the_count_is_about_what_is_taken(obj: Any) -> None:
    data = msgpack.packb(obj)
    tracemalloc.start()
    try:
        kept = msgpack.unpackb(data)
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert kept is not None
    assert taken / 2 < decoded_size(data, 1 << 40) <= WORST * len(data)
    # Whatever is cut off or damaged is counted, and nothing fails.
    for end in range(0, len(data), max(len(data) // 50, 1)):
        decoded_size(data[:end], 1 << 40)
        decoded_size(data[end:], 1 << 40)


def test_an_index_of_many_tensors_is_far_below_the_limit() -> None:
    """Of as many tensors and sections as the format allows, each with a name and an entry of the usual length."""
    row = {"checksum": bytes(16), "codec": 1, "kind": 1, "length": 10**6, "offset": 10**9, "raw_length": 10**6}
    many = 20_000
    obj = {
        "sections": [row] * many,
        "tensors": {f"model.layers.{n:08d}.mlp.up_proj.weight": bytes(250) for n in range(many)},
        "removed": [f"model.{n:08d}" for n in range(many)],
    }
    data = msgpack.packb(obj)
    assert decoded_size(data, 1 << 40) < PER_BYTE * len(data) * 2 // 3
    assert MAX_TENSORS * PER_BYTE > SLACK


@pytest.mark.parametrize("name", ["max_memory", "max_elements", "max_output"])
def test_a_limit_is_a_positive_number(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} = 0 is below 1"):
        Limits(**{name: 0})


@pytest.mark.parametrize("text", ["-1", "x", "0", "1.5", "²"])
def test_a_limit_of_the_command_line_is_a_number(cli: Cli, tmp_path: Path, text: str) -> None:
    lines = refused(cli("unpack", tmp_path, tmp_path, "-o", tmp_path / "o", f"--max-elements={text}"), code=2)
    assert "--max-elements" in lines
    assert "is not a size" in refused(cli("verify", tmp_path, f"--max-output={text}B"), code=2)


# Name, file bytes, base bytes, memory, elements and output of real uses: each is far below its default.
REAL: dict[str, tuple[int, int, int, int, int]] = {
    "LoRA of rank 1 on one matrix of 11008 x 4096": (31_000, 90_177_536, 800_000, 45_088_768, 180_000_000),
    "LoRA of rank 256 on 70B": (3 * 10**9, 140 * 10**9, 10**8, 70 * 10**9 * 256 // 25, 280 * 10**9),
    "Delta-CoMe of 7B, 2 bits": (900 * 10**6, 14 * 10**9, 10**9, 7 * 10**9 * 1500 // 10, 14 * 10**9),
    "one norm of 7B": (16_000, 14 * 10**9, 10**6, 10**4, 14 * 10**9),
    "cold file of a head that is zero": (3 * 10**8, 14 * 10**9, 10**9, 7 * 10**9, 28 * 10**9),
}


@pytest.mark.parametrize("name", REAL)
def test_real_uses_are_within_the_defaults(name: str) -> None:
    size, base, memory, elements, output = REAL[name]
    limits = Limits()
    limits.check_memory(memory, size, "it takes")
    limits.check_elements(elements, size, base, "it takes")
    limits.check_output(output, size, base, "it takes")


def test_options_without_work_are_not_offered(cli: Cli) -> None:
    every: dict[str, Callable[..., Any]] = {
        "verify": deltafmt.verify, "repack": deltafmt.repack, "unpack": deltafmt.unpack, "diff": deltafmt.diff,
        "export-lora": deltafmt.export_lora, "inspect": deltafmt.open,
    }  # fmt: skip
    for command in every:
        text = cli(command, "--help").out
        assert "--max-memory" in text
        assert "--max-output" in text
        assert ("--max-elements" in text) == (command in ("unpack", "export-lora"))
