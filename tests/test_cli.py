"""The commands as users meet them: every bad input of the checklist, its exit code, its one line; clean output."""

from __future__ import annotations

import errno
import functools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

import deltafmt
from conftest import (
    SMALL_FILES,
    Cli,
    Pair,
    Result,
    Tensors,
    normal,
    nudge,
    raw,
    read_file,
    run_cli,
    safetensors_bytes,
    small_tensors,
    write_folder,
    write_pair,
)
from deltafmt.container import canonical, frame
from deltafmt.layout import constants as c

COMMANDS = ("pack", "unpack", "inspect", "verify", "repack", "diff")


def refused(result: Result, code: int, *parts: str) -> str:
    """Check an error as a user sees it: the code, nothing printed, one line that names what is wrong."""
    assert result.code == code, result
    assert result.out == ""
    assert result.err.startswith("deltafmt: ")
    assert result.err.endswith("\n")
    assert result.err.count("\n") == 1, result.err
    assert "Traceback" not in result.err
    assert "internal error" not in result.err
    message = result.err.removeprefix("deltafmt: ").rstrip("\n")
    assert message == message.strip()
    assert not message.endswith(".")
    for part in parts:
        assert part in message
    return message


@pytest.fixture(scope="module")
def delta(tmp_path_factory: pytest.TempPathFactory, small: Pair) -> Path:
    """Give the delta of the small pair."""
    out = tmp_path_factory.mktemp("delta") / "small.deltafmt"
    deltafmt.pack(small.base, small.finetuned, out)
    return out


# Every command reads files


def _reading(small: Pair, folder: Path, bad: Path) -> dict[str, tuple[str | Path, ...]]:
    """Return one command line for every way to read a delta."""
    return {
        "inspect": ("inspect", bad),
        "inspect tensors": ("inspect", bad, "--tensors"),
        "verify": ("verify", bad),
        "unpack": ("unpack", small.base, bad, "-o", folder / "out"),
        "repack": ("repack", bad, "-o", folder / "out.deltafmt", "--profile", "cold"),
        "diff": ("diff", bad, bad),
    }


READERS = tuple(_reading(Pair(Path(), Path(), {}, {}), Path(), Path()))


@pytest.mark.parametrize("reader", READERS)
def test_a_missing_delta(tmp_path: Path, cli: Cli, small: Pair, reader: str) -> None:
    bad = tmp_path / "nowhere.deltafmt"
    refused(cli(*_reading(small, tmp_path, bad)[reader]), 5, "nowhere.deltafmt", "no such file")
    assert list(tmp_path.iterdir()) == []


WRONG_DELTAS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "one byte": lambda content: content[:1],
    "half a header": lambda content: content[:40],
    "only a header": lambda content: content[:64],
    "only the first page": lambda content: content[:4096],
    "half": lambda content: content[: len(content) // 2],
    "all but a byte": lambda content: content[:-1],
    "a byte more": lambda content: content + b"\0",
    "another file": lambda _: b"PK\x03\x04" + bytes(5000),
    "text": lambda _: b"{}\n" * 3000,
    "a text-mode transfer": lambda content: content.replace(b"\r\n", b"\n"),
    "the high bit stripped": lambda content: bytes([content[0] & 0x7F]) + content[1:],
    "all zeros": lambda content: bytes(len(content)),
}


@pytest.mark.parametrize("what", WRONG_DELTAS)
@pytest.mark.parametrize("reader", READERS)
def test_a_file_that_is_no_delta(tmp_path: Path, cli: Cli, small: Pair, delta: Path, reader: str, what: str) -> None:
    bad = tmp_path / "bad.deltafmt"
    bad.write_bytes(WRONG_DELTAS[what](delta.read_bytes()))
    refused(cli(*_reading(small, tmp_path, bad)[reader]), 3, "bad.deltafmt")
    assert list(tmp_path.iterdir()) == [bad]


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_flipped_bit_is_found(delta: Path, scratch: Path, data: st.DataObject) -> None:
    content = bytearray(_content(delta))
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    bad = scratch / "flipped.deltafmt"
    bad.write_bytes(content)
    with pytest.raises(deltafmt.errors.InvalidFileError, match=r"flipped\.deltafmt") as caught:
        deltafmt.verify(bad)
    assert caught.value.exit_code == 3


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_truncation_is_found(delta: Path, scratch: Path, data: st.DataObject) -> None:
    content = _content(delta)
    bad = scratch / "short.deltafmt"
    bad.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(deltafmt.errors.InvalidFileError):
        deltafmt.open(bad)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder whose files are written over by every example."""
    return tmp_path_factory.mktemp("scratch")


@functools.cache
def _content(path: Path) -> bytes:
    return path.read_bytes()


@pytest.mark.parametrize("reader", ["verify", "unpack", "repack"])
def test_a_flipped_bit_in_a_tensor_is_placed(tmp_path: Path, cli: Cli, small: Pair, delta: Path, reader: str) -> None:
    content = bytearray(delta.read_bytes())
    content[4096 + 100] ^= 4
    bad = tmp_path / "bad.deltafmt"
    bad.write_bytes(content)
    refused(cli(*_reading(small, tmp_path, bad)[reader]), 3, "bad.deltafmt", "section 0 at 4096 is damaged")
    assert list(tmp_path.iterdir()) == [bad]


def _sealed(content: bytes, header: bytes, index: bytes | None = None, content_id: bytes | None = None) -> bytes:
    """Return a delta file with another header or index and a trailer whose digest is right for it."""
    trailer = frame.decode_trailer(content[-c.TRAILER_SIZE :], len(content))
    if index is None:
        index = content[trailer.index_offset : trailer.index_offset + trailer.index_length]
    end = frame.encode_trailer(header, index, trailer.index_offset, content_id or trailer.content_id)
    return header + content[len(header) : trailer.index_offset] + index + end


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"version": 2}, ("version 2", "reads 1")),
        ({"version": 2**32 - 1}, ("version 4294967295",)),
        ({"incompatible": 1}, ("incompatible", "bit 0")),
        ({"incompatible": 1 << 63 | 1 << 5}, ("bit 5, 63",)),
        ({"version": 0}, ("version 0",)),
    ],
)
def test_a_file_for_another_reader(
    tmp_path: Path, cli: Cli, small: Pair, delta: Path, reader: str, fields: dict[str, int], words: tuple[str, ...]
) -> None:
    bad = tmp_path / "bad.deltafmt"
    bad.write_bytes(_sealed(delta.read_bytes(), frame.encode_header(**fields)))
    refused(cli(*_reading(small, tmp_path, bad)[reader]), 3, "bad.deltafmt", *words)


def test_an_unknown_compatible_bit_is_read_over(tmp_path: Path, cli: Cli, small: Pair, delta: Path) -> None:
    new = tmp_path / "new.deltafmt"
    new.write_bytes(_sealed(delta.read_bytes(), frame.encode_header(compatible=1 << 40)))
    assert cli("verify", new, "--base", small.base).code == 0


def _index(content: bytes) -> dict[str, Any]:
    trailer = frame.decode_trailer(content[-c.TRAILER_SIZE :], len(content))
    found: dict[str, Any] = canonical.decode(content[trailer.index_offset : -c.TRAILER_SIZE], "the index")
    return found


def _reindexed(content: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    index = _index(content)
    change(index)
    return _sealed(content, frame.encode_header(), canonical.encode(index))


def test_attachments_cannot_replace_the_weights_or_leave_the_folder(
    tmp_path: Path, cli: Cli, small: Pair, delta: Path
) -> None:
    """A file made by someone else: names of attachments are theirs to choose."""
    for number, name in enumerate(("model.safetensors", "../escape.txt", "/tmp/escape.txt", "a/../../b", "..")):
        bad = tmp_path / f"{number}.deltafmt"

        def rename(index: dict[str, Any], name: str = name) -> None:
            index["attachments"][name] = index["attachments"].pop("config.json")

        bad.write_bytes(_reindexed(delta.read_bytes(), rename))
        result = cli("unpack", small.base, bad, "-o", tmp_path / f"out{number}")
        refused(result, 3, name)
        assert not (tmp_path / f"out{number}").exists()
    assert not (tmp_path / "escape.txt").exists()


@pytest.mark.parametrize("reader", ["verify", "repack"])
def test_a_wrong_content_id(tmp_path: Path, cli: Cli, small: Pair, delta: Path, reader: str) -> None:
    bad = tmp_path / "bad.deltafmt"
    bad.write_bytes(_sealed(delta.read_bytes(), frame.encode_header(), content_id=blake3(b"else").digest()))
    refused(cli(*_reading(small, tmp_path, bad)[reader]), 3, "content id")
    assert list(tmp_path.iterdir()) == [bad]


def test_a_seal_that_is_not_fixed_up_is_found(tmp_path: Path, cli: Cli, delta: Path) -> None:
    content = delta.read_bytes()
    bad = tmp_path / "bad.deltafmt"
    bad.write_bytes(frame.encode_header(compatible=1) + content[64:])
    refused(cli("inspect", bad), 3, "digest")


def test_a_folder_where_a_delta_should_be(tmp_path: Path, cli: Cli, small: Pair) -> None:
    for arguments in (("inspect", tmp_path), ("verify", tmp_path), ("unpack", small.base, tmp_path, "-o", "x")):
        refused(cli(*arguments), 5, str(tmp_path), "folder")


def test_unreadable_files(tmp_path: Path, cli: Cli, small: Pair, delta: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    secret = tmp_path / "secret.deltafmt"
    secret.write_bytes(delta.read_bytes())
    secret.chmod(0)
    for arguments in _reading(small, tmp_path, secret).values():
        refused(cli(*arguments), 5, "secret.deltafmt", "permission denied")
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(safetensors_bytes(small.a))
    weights.chmod(0)
    refused(cli("pack", weights, small.finetuned, "-o", tmp_path / "o"), 5, "w.safetensors", "permission denied")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    refused(cli("pack", small.base, small.finetuned, "-o", locked / "o"), 5, str(locked), "permission denied")
    refused(cli("unpack", small.base, delta, "-o", locked / "o"), 5, str(locked), "permission denied")


def test_links_that_lead_nowhere(tmp_path: Path, cli: Cli, small: Pair) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    refused(cli("inspect", loop), 5, "loop")
    refused(cli("pack", loop, small.finetuned, "-o", tmp_path / "o"), 5, "loop")
    refused(cli("diff", loop, loop), 5, "loop")


# Checkpoints


def _packing(small: Pair, bad: Path, out: Path) -> Iterator[tuple[str | Path, ...]]:
    yield "pack", bad, small.finetuned, "-o", out
    yield "pack", small.base, bad, "-o", out
    yield "diff", bad, small.base


def test_missing_and_wrong_checkpoints(tmp_path: Path, cli: Cli, small: Pair, delta: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "pytorch_model.bin").write_bytes(b"x")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(safetensors_bytes(small.a)[:-10])
    sharded = write_folder(tmp_path / "sharded", small.a, [list(small.a)[:2], list(small.a)[2:]])
    (sharded / "model-00001-of-00002.safetensors").unlink()
    before = sorted(tmp_path.rglob("*"))
    for bad, code, word in (
        (tmp_path / "nowhere", 5, "no such file"),
        (bare, 3, "no .safetensors weights"),
        (pickled, 3, "convert it to safetensors"),
        (cut, 3, "truncated"),
        (sharded, 5, "model-00001-of-00002.safetensors"),
    ):
        for arguments in _packing(small, bad, tmp_path / "o"):
            refused(cli(*arguments), code, str(bad), word)
        refused(cli("verify", delta, "--base", bad), code, str(bad), word)
        refused(cli("unpack", bad, delta, "-o", tmp_path / "o"), code, str(bad), word)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_delta_is_no_checkpoint(tmp_path: Path, cli: Cli, small: Pair, delta: Path) -> None:
    refused(cli("pack", delta, small.finetuned, "-o", tmp_path / "o"), 3, str(delta))
    refused(cli("unpack", delta, small.base, "-o", tmp_path / "o"), 5, str(small.base))
    refused(cli("diff", delta, small.base), 2, "two of a kind")


def test_a_wrong_base_names_the_tensor(tmp_path: Path, cli: Cli, small: Pair, delta: Path) -> None:
    name = "model.layers.0.up.weight"
    bits = small.a[name].data
    flipped = type(small.a[name])("BF16", (96, 48), bits[:-1] + bytes([bits[-1] ^ 1]))
    wrong = {
        "bits": ({**small.a, name: flipped}, "differs"),
        "shape": ({**small.a, name: normal(2, (96, 50))}, "BF16 [96, 50], not BF16 [96, 48]"),
        "dtype": ({**small.a, name: normal(2, (96, 48), "F32")}, "F32 [96, 48], not BF16 [96, 48]"),
        "missing": ({key: value for key, value in small.a.items() if key != name}, "no tensor"),
    }
    for what, (tensors, word) in wrong.items():
        base = write_folder(tmp_path / what, tensors)
        refused(cli("unpack", base, delta, "-o", tmp_path / "out"), 4, str(base), f'"{name}"', word)
        refused(cli("verify", delta, "--base", base), 4, str(base), f'"{name}"', word)
        assert not (tmp_path / "out").exists()
    # Only what the delta needs of the base is compared.
    more = write_folder(tmp_path / "more", {**small.a, "unused": normal(1, (3,))})
    assert cli("verify", delta, "--base", more).code == 0


def test_a_wrong_base_can_be_forced_and_that_is_recorded(tmp_path: Path, cli: Cli, small: Pair, delta: Path) -> None:
    name = "model.layers.0.up.weight"
    base = write_folder(tmp_path / "base", {**small.a, name: nudge(small.a[name], 77)})
    result = cli("unpack", base, delta, "-o", tmp_path / "out", "--force-base")
    assert result.code == 0
    assert result.err.count("\n") == 1
    assert f'"{name}"' in result.err
    _, header = read_file(tmp_path / "out" / "model.safetensors")
    assert header["__metadata__"]["deltafmt.forced_base"] == name
    # The right base, forced, has nothing to record.
    assert cli("unpack", small.base, delta, "-o", tmp_path / "right", "--force-base").err == ""
    assert cli("unpack", small.base, delta, "-o", tmp_path / "plain").err == ""
    for folder in ("right", "plain"):
        metadata = read_file(tmp_path / folder / "model.safetensors")[1]["__metadata__"]
        assert "deltafmt.forced_base" not in metadata
        assert metadata["deltafmt.content_id"] == deltafmt.open(delta).content_id
    # Another shape cannot be forced.
    odd = write_folder(tmp_path / "odd", {**small.a, name: normal(1, (3, 3))})
    refused(cli("unpack", odd, delta, "-o", tmp_path / "no", "--force-base"), 4, name)


def test_another_architecture(tmp_path: Path, cli: Cli, small: Pair) -> None:
    other = write_folder(tmp_path / "other", {"encoder.weight": normal(1, (64, 64))})
    message = refused(cli("pack", other, small.finetuned, "-o", tmp_path / "o"), 4, "different architecture")
    assert '"model.embed.weight"' in message
    kind = write_folder(tmp_path / "kind", small.a, files={"config.json": b'{"model_type": "huge"}'})
    refused(cli("pack", kind, small.finetuned, "-o", tmp_path / "o"), 4, "'huge'", "'tiny'")
    assert not list(tmp_path.glob("*o"))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity(tmp_path: Path, cli: Cli, small: Pair, value: float) -> None:
    name = "model.layers.10.up.weight"
    values = small.b[name].floats().copy()
    values[3, 4] = value
    finetuned = write_folder(tmp_path / "ft", {**small.b, name: raw(values, "BF16")})
    out = tmp_path / "d.deltafmt"
    message = refused(cli("pack", small.base, finetuned, "-o", out), 2, f'"{name}"', "row 3, column 4", str(value))
    assert f"--exclude {name}" in message
    assert list(tmp_path.iterdir()) == [finetuned]
    assert cli("pack", small.base, finetuned, "-o", out, "--exclude", name).code == 0
    assert cli("verify", out, "--base", small.base).code == 0


# Outputs


def test_an_output_that_exists(tmp_path: Path, cli: Cli, small: Pair, delta: Path) -> None:
    file = tmp_path / "old.deltafmt"
    file.write_bytes(b"old")
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "mine.txt").write_text("old")
    pack = ("pack", small.base, small.finetuned, "-o", file)
    repack = ("repack", delta, "-o", file, "--profile", "cold")
    unpack = ("unpack", small.base, delta, "-o", folder)
    for arguments in (pack, repack, unpack):
        refused(cli(*arguments), 2, str(arguments[arguments.index("-o") + 1]), "exists; --force replaces it")
        assert file.read_bytes() == b"old"
        assert (folder / "mine.txt").read_text() == "old"
    for arguments in (pack, repack, unpack):
        assert cli(*arguments, "--force").code == 0
    assert cli("verify", file).code == 0
    assert not (folder / "mine.txt").exists()
    assert (folder / "model.safetensors").exists()
    # A folder is no file, and a file is no folder, forced or not.
    for force in ((), ("--force",)):
        refused(cli("pack", small.base, small.finetuned, "-o", folder, *force), 2, str(folder))
        refused(cli("repack", delta, "-o", folder, "--profile", "hot", *force), 2, str(folder))
        refused(cli("unpack", small.base, delta, "-o", file, *force), 2, str(file))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "old.deltafmt"]


def test_a_dangling_link_is_an_output_that_exists(tmp_path: Path, cli: Cli, small: Pair, delta: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "target")
    refused(cli("pack", small.base, small.finetuned, "-o", link), 2, "link exists")
    refused(cli("unpack", small.base, delta, "-o", link), 2, "link exists")


def test_an_output_in_a_missing_folder(tmp_path: Path, cli: Cli, small: Pair, delta: Path) -> None:
    out = tmp_path / "missing" / "o"
    for arguments in (
        ("pack", small.base, small.finetuned, "-o", out),
        ("repack", delta, "-o", out, "--profile", "hot"),
        ("unpack", small.base, delta, "-o", out),
    ):
        refused(cli(*arguments), 5, "no such folder", str(tmp_path / "missing"))
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_an_input(tmp_path: Path, cli: Cli) -> None:
    pair = write_pair(tmp_path, *small_tensors())
    delta = tmp_path / "d.deltafmt"
    assert cli("pack", pair.base, pair.finetuned, "-o", delta).code == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    link = tmp_path / "link.deltafmt"
    link.symlink_to(delta)
    for out in (
        pair.base / "model.safetensors",
        pair.finetuned / "model.safetensors",
        pair.finetuned / "config.json",
        tmp_path / "ft" / ".." / "base" / "model.safetensors",
    ):
        for force in ((), ("--force",)):
            refused(cli("pack", pair.base, pair.finetuned, "-o", out, *force), 2, "input")
    for force in ((), ("--force",)):
        refused(cli("repack", delta, "-o", delta, "--profile", "cold", *force), 2, "itself the input")
        refused(cli("repack", delta, "-o", link, "--profile", "cold", *force), 2, "itself the input")
        refused(cli("unpack", pair.base, delta, "-o", pair.base, *force), 2)
        refused(cli("unpack", pair.base, delta, "-o", tmp_path, *force), 2)
    assert {path: path.read_bytes() for path in before} == before
    assert not list(tmp_path.rglob("*partial*"))


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
from deltafmt.tools.main import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("command", ["pack", "repack", "unpack"])
@pytest.mark.parametrize("limit", [0, 100, 9000])
def test_a_file_that_may_not_grow(tmp_path: Path, small: Pair, delta: Path, command: str, limit: int) -> None:
    """Every process may be limited in the size of its files; the error is that of a full disk but for its name."""
    source = tmp_path / "in.deltafmt"
    source.write_bytes(delta.read_bytes())
    arguments = {
        "pack": ("pack", small.base, small.finetuned, "-o", tmp_path / "out"),
        "repack": ("repack", source, "-o", tmp_path / "out", "--profile", "hot"),
        "unpack": ("unpack", small.base, source, "-o", tmp_path / "out"),
    }[command]
    done = subprocess.run(
        [sys.executable, "-B", "-W", "error", "-c", LIMITED, str(limit), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    reason = os.strerror(errno.EFBIG).lower()
    refused(Result(done.returncode, done.stdout, done.stderr), 5, f"cannot write {tmp_path / 'out'}", reason)
    assert list(tmp_path.iterdir()) == [source]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """Give a file system of 16 KiB, which only root can make."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no right to mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(tmp_path: Path, tiny_disk: Path, cli: Cli, small: Pair, delta: Path) -> None:
    out = tiny_disk / "out"
    reason = os.strerror(errno.ENOSPC).lower()
    for arguments in (
        ("pack", small.base, small.finetuned, "-o", out),
        ("repack", delta, "-o", out, "--profile", "hot"),
        ("unpack", small.base, delta, "-o", out),
    ):
        refused(cli(*arguments), 5, f"cannot write {out}", reason)
        assert list(tiny_disk.iterdir()) == []


def test_a_device_that_is_always_full(small: Pair) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    command = [sys.executable, "-m", "deltafmt", "pack", str(small.base), str(small.finetuned), "-o", "-"]
    with full.open("wb") as sink:
        done = subprocess.run(command, stdout=sink, stderr=subprocess.PIPE, text=True, check=False)
    refused(Result(done.returncode, "", done.stderr), 5, os.strerror(errno.ENOSPC).lower())


# Options


USAGE = {
    "N above M": (("--nm", "5:4"), "N = 5"),
    "N of zero": (("--nm", "0:4"), "N = 0"),
    "M of one": (("--nm", "1:1"), "M = 1"),
    "M too large": (("--nm", "1:256", "--index", "fixed"), "M = 256"),
    "M too large for seeded": (("--nm", "1:256"), "256"),
    "M no power of two": (("--nm", "3:12"), "power of two"),
    "rank too wide": (("--nm", "40:100", "--index", "rank", "--profile", "cold"), "2**64"),
    "rank in a hot file": (("--nm", "4:16", "--index", "rank"), "--profile cold"),
    "k of zero": (("--bits", "0"), "k = 0"),
    "k of seven": (("--bits", "7"), "k = 7"),
    "k of nine": (("--bits", "9"), "k = 9"),
    "k below zero": (("--bits", "-1"), "k = -1"),
    "k no number": (("--bits", "four"), "'four'"),
    "nm without colon": (("--nm", "416"), "'416'"),
    "nm with words": (("--nm", "four:sixteen"), "'four:sixteen'"),
    "nm of three": (("--nm", "1:2:3"), "'1:2:3'"),
    "nm empty": (("--nm", ""), "''"),
    "nm half empty": (("--nm", "4:"), "'4:'"),
    "nm with a sign": (("--nm", "4:+16"), "'4:+16'"),
    "nm with other digits": (("--nm", "\u0664:16"), "N:M"),
    "nm endless": (("--nm", "1:" + "9" * 6000), "N:M"),
    "share": (("--share", "3"), "v = 3"),
    "index": (("--index", "random"), "'random'"),
    "grid": (("--grid", "round"), "'round'"),
    "one bit midtread": (("--bits", "1", "--grid", "midtread"), "midrise"),
    "scale": (("--scale", "max"), "'max'"),
    "scale group": (("--scale-group", "-1"), "-1"),
    "scale dtype": (("--scale-dtype", "F16"), "'F16'"),
    "method": (("--method", "delta"), "unknown method 'delta'"),
    "profile": (("--profile", "warm"), "'warm'"),
    "seed below zero": (("--seed", "-1"), "seed -1"),
    "seed too large": (("--seed", str(2**64)), "seed 18446744073709551616"),
    "seed no number": (("--seed", "x"), "'x'"),
    "threads no number": (("--threads", "many"), "'many'"),
    "threads of zero": (("--threads", "0"), "0"),
    "include matches nothing": (("--include", "*.mlp.*"), "pattern '*.mlp.*' matches no tensor"),
    "exclude matches nothing": (("--exclude", "lm_head"), "pattern 'lm_head' matches no tensor"),
    "rule matches nothing": (("--rule", "nothing", "exact"), "pattern 'nothing' matches no tensor"),
    "pattern in another case": (("--include", "MODEL.*"), "pattern 'MODEL.*'"),
    "rule without value": (("--rule", "*", "bits"), "'bits'"),
    "rule with unknown key": (("--rule", "*", "bit=4"), "'bit'"),
    "rule with bad number": (("--rule", "*", "bits=x"), "'x'"),
    "rule with a strange digit": (("--rule", "*", "bits=\u00b2"), "bits"),
    "rule with an endless number": (("--rule", "*", "bits=" + "9" * 6000), "bits"),
    "rule with bad nm": (("--rule", "*", "nm=16"), "'16'"),
    "rule out of range": (("--rule", "*", "nm=9:8"), "N = 9"),
    "rule empty": (("--rule", "*", ""), "rule"),
    "rule of one word": (("--rule", "*"), "--rule"),
    "unknown option": (("--fast",), "--fast"),
    "one checkpoint more": (("third",), "third"),
}


@pytest.mark.parametrize("what", USAGE)
def test_a_wrong_option_of_pack(tmp_path: Path, cli: Cli, small: Pair, what: str) -> None:
    arguments, word = USAGE[what]
    refused(cli("pack", small.base, small.finetuned, "-o", tmp_path / "o", *arguments), 2, word)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((), "COMMAND"),
        (("pak",), "pak"),
        (("--fast",), "COMMAND"),
        (("pack",), "BASE"),
        (("pack", "a"), "FINETUNED"),
        (("pack", "a", "b"), "-o OUT"),
        (("pack", "a", "b", "-o"), "-o"),
        (("unpack", "a", "b"), "-o"),
        (("unpack", "a", "-o", "x"), "DELTA"),
        (("unpack", "a", "b", "-o", "x", "--max-shard-size", "5XB"), "'5XB'"),
        (("unpack", "a", "b", "-o", "x", "--max-shard-size", "0"), "'0'"),
        (("inspect",), "DELTA"),
        (("inspect", "a", "b"), "b"),
        (("verify",), "DELTA"),
        (("repack", "a", "-o", "b"), "--profile"),
        (("repack", "a", "--profile", "hot"), "-o"),
        (("repack", "a", "-o", "b", "--profile", "warm"), "'warm'"),
        (("diff", "a"), "B"),
    ],
)
def test_wrong_usage(cli: Cli, arguments: tuple[str, ...], word: str) -> None:
    refused(cli(*arguments), 2, word)


def test_json_and_the_file_itself_cannot_share_standard_output(cli: Cli, small: Pair) -> None:
    result = cli("pack", small.base, small.finetuned, "-o", "-", "--json")
    assert result.code == 2
    assert "standard output" in result.json()["error"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help(cli: Cli, command: str) -> None:
    result = cli(command, "--help")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(f"usage: deltafmt {command} ")
    assert "--json" in result.out
    overview = cli("--help")
    assert overview.code == 0
    assert command in overview.out


def test_version_and_methods(cli: Cli) -> None:
    assert cli("--version").out == f"deltafmt {deltafmt.__version__}\n"
    methods = cli("pack", "--method", "help")
    assert methods.code == 0
    assert methods.out.startswith("deltadq ")


def test_shard_sizes(tmp_path: Path, cli: Cli, small: Pair, delta: Path) -> None:
    for size, several in (("10KB", True), ("10KiB", True), ("12000", True), ("1 gb", False)):
        out = tmp_path / size
        assert cli("unpack", small.base, delta, "-o", out, "--max-shard-size", size).code == 0
        assert (len(list(out.glob("*.safetensors"))) > 1) is several


# What the commands print


def test_every_command_in_words(tmp_path: Path, cli: Cli, small: Pair) -> None:
    out = tmp_path / "d.deltafmt"
    packed = cli("pack", small.base, small.finetuned, "-o", out)
    size = os.path.getsize(out)
    weights = os.path.getsize(small.finetuned / "model.safetensors")
    assert f"{size:,} bytes" in packed.out
    assert f"{weights / size:.2f} times smaller" in packed.out
    assert "4 deltas" in packed.out
    assert "1 kept exactly" in packed.out
    assert "2 same as the base" in packed.out
    inspected = cli("inspect", out)
    assert f"{size:,} bytes" in inspected.out
    assert "7 tensors" in cli("verify", out).out
    assert "6 base tensors match" in cli("verify", out, "--base", small.base).out
    repacked = cli("repack", out, "-o", tmp_path / "cold", "--profile", "cold")
    assert deltafmt.open(out).content_id in repacked.out
    assert "7 tensors" in cli("unpack", small.base, out, "-o", tmp_path / "u").out
    assert "0 tensors differ, 7 are the same" in cli("diff", out, tmp_path / "cold").out
    differing = cli("diff", small.base, small.finetuned)
    assert "5 tensors differ, 2 are the same" in differing.out
    assert "model.embed.weight" in differing.out
    for result in (packed, inspected, repacked, differing):
        assert (result.code, result.err) == (0, "")


def test_json_of_every_command(tmp_path: Path, cli: Cli, small: Pair) -> None:
    out = tmp_path / "d.deltafmt"
    size_of = os.path.getsize
    found = cli("pack", small.base, small.finetuned, "-o", out, "--json", "--exclude", "*embed*").json()
    assert found["bytes"] == size_of(out)
    assert found["file"] == str(out)
    assert found["actions"] == {"add": 3, "replace": 2, "same": 2}
    assert found["kept_exactly"] == {"model.embed.weight": "excluded"}
    assert found["finetuned_bytes"] == size_of(small.finetuned / "model.safetensors")
    assert found["ratio"] == round(found["finetuned_bytes"] / found["bytes"], 4)
    results = [found]
    results.append(cli("inspect", out, "--json").json())
    assert results[-1]["content_id"] == found["content_id"]
    assert set(results[-1]["tensors"]) == set(small.b)
    results.append(cli("verify", out, "--base", small.base, "--json").json())
    assert (results[-1]["tensors"], results[-1]["base_tensors"]) == (7, 5)
    results.append(cli("repack", out, "-o", tmp_path / "c", "--profile", "cold", "--json").json())
    assert (results[-1]["bytes"], results[-1]["bytes_before"]) == (size_of(tmp_path / "c"), size_of(out))
    results.append(cli("unpack", small.base, out, "-o", tmp_path / "u", "--json").json())
    assert sorted(results[-1]["files"]) == sorted(SMALL_FILES)
    assert results[-1]["mismatched"] == []
    results.append(cli("diff", out, tmp_path / "c", "--json").json())
    assert (results[-1]["same"], results[-1]["changes"]) == (7, [])
    results.append(cli("diff", small.base, small.finetuned, "--json").json())
    assert {change["name"] for change in results[-1]["changes"]} == {
        name for name in small.b if small.a[name] != small.b[name]
    }
    for result in results:
        assert result["schema"] == 1
        assert result["ok"] is True


@pytest.mark.parametrize("command", COMMANDS)
def test_json_of_errors(tmp_path: Path, cli: Cli, command: str) -> None:
    missing = str(tmp_path / "nowhere")
    arguments = {
        "pack": (missing, missing, "-o", "x"),
        "unpack": (missing, missing, "-o", "x"),
        "repack": (missing, "-o", "x", "--profile", "hot"),
        "diff": (missing, missing),
    }.get(command, (missing,))
    result = cli(command, *arguments, "--json")
    assert result.code == 5
    found = result.json()
    assert (found["schema"], found["ok"], found["exit_code"]) == (1, False, 5)
    assert result.err == f"deltafmt: {found['error']}\n"


def test_json_holds_no_infinity(tmp_path: Path, cli: Cli) -> None:
    """The relative change of a tensor of zeros has no finite value; JSON has no word for it."""
    a = write_folder(tmp_path / "a", {"w": raw(np.zeros((4, 4)), "F32"), "n": raw(np.full((2, 2), np.nan), "F32")})
    b = write_folder(tmp_path / "b", {"w": raw(np.ones((4, 4)), "F32"), "n": raw(np.ones((2, 2)), "F32")})
    result = cli("diff", a, b, "--json")
    assert result.code == 0
    assert {change["name"] for change in result.json()["changes"]} == {"w", "n"}
    assert cli("diff", a, b).code == 0


def test_diff_tells_what_changed(tmp_path: Path, cli: Cli, small: Pair, delta: Path) -> None:
    other = tmp_path / "other.deltafmt"
    rule = ("--rule", "*.down.*", "bits=2,nm=2:16")
    assert cli("pack", small.base, small.finetuned, "-o", other, "--exclude", "*embed*", *rule).code == 0
    changes = {change["name"]: change for change in cli("diff", delta, other, "--json").json()["changes"]}
    assert set(changes) == {"model.embed.weight", "model.layers.0.down.weight"}
    assert "kept exactly" in changes["model.embed.weight"]["detail"]
    assert "2:16 k=2" in changes["model.layers.0.down.weight"]["detail"]
    seeded = tmp_path / "seeded.deltafmt"
    assert cli("pack", small.base, small.finetuned, "-o", seeded, "--seed", "9").code == 0
    assert len(cli("diff", delta, seeded, "--json").json()["changes"]) == 4
    a = write_folder(tmp_path / "a", {"x": raw([[1.0, 2.0]], "F32"), "gone": normal(1, (2,))})
    b = write_folder(tmp_path / "b", {"x": raw([[1.0, 4.0]], "F32"), "new": normal(1, (2,))})
    found = {change["name"]: change for change in cli("diff", a, b, "--json").json()["changes"]}
    assert found["gone"]["kind"] == "only in A"
    assert found["new"]["kind"] == "only in B"
    assert found["x"]["largest"] == 2
    assert found["x"]["relative"] == pytest.approx(2 / 5**0.5)


def _sums(node: dict[str, Any]) -> None:
    children = node.get("children", [])
    if children:
        assert sum(child["bytes"] for child in children) == node["bytes"], node["label"]
    for child in children:
        _sums(child)


PACKINGS: dict[str, tuple[str, ...]] = {
    "hot": (),
    "cold": ("--profile", "cold"),
    "fixed": ("--index", "fixed", "--nm", "3:10"),
    "rank": ("--index", "rank", "--profile", "cold"),
    "exact": ("--exclude", "*"),
}


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_tree_of_costs_sums_to_the_file(tmp_path: Path, cli: Cli, small: Pair, packing: str) -> None:
    tensors: Tensors = {**small.b, "model.embed.weight": normal(9, (80, 48))}
    finetuned = write_folder(tmp_path / "ft", tensors, files=SMALL_FILES)
    out = tmp_path / "d.deltafmt"
    assert cli("pack", small.base, finetuned, "-o", out, *PACKINGS[packing]).code == 0
    found = cli("inspect", out, "--json").json()
    assert found["tree"]["bytes"] == found["bytes"] == os.path.getsize(out)
    assert found["tree"]["children"]
    _sums(found["tree"])
    labels = {node["label"]: node for node in found["tree"]["children"]}
    if packing != "exact":
        parts = {node["label"] for node in labels["deltas"]["children"]}
        assert parts == {"codes", "scales", "kept exactly", *(["index"] if packing in ("fixed", "rank") else [])}
    stored = sum(tensor["stored_bytes"] for tensor in found["tensors"].values())
    assert found["overhead_bytes"] == found["bytes"] - stored
    for tensor in found["tensors"].values():
        assert tensor["stored_bytes"] == sum(buffer["length"] for buffer in tensor.get("buffers", {}).values())
    # The printed tree has the same numbers.
    text = cli("inspect", out).out
    assert f"{os.path.getsize(out):,}" in text
    for node in found["tree"]["children"]:
        assert node["label"] in text
        assert f"{node['bytes']:,}" in text


def test_inspect_json_gives_the_places_of_buffers(cli: Cli, delta: Path) -> None:
    content = delta.read_bytes()
    with deltafmt.open(delta) as opened:
        found = cli("inspect", delta, "--json").json()["tensors"]
        for name in opened:
            for key, array in opened.buffers(name).items():
                place = found[name]["buffers"][key]
                start = place["file_offset"]
                assert content[start : start + place["length"]] == array.tobytes()


def test_the_table_of_tensors(cli: Cli, small: Pair, delta: Path) -> None:
    lines = cli("inspect", delta, "--tensors").out.splitlines()
    assert lines[0].split() == ["tensor", "dtype", "shape", "bytes", "stored", "how"]
    assert len(lines) == 1 + len(small.b)
    assert any(line.startswith("model.embed.weight") and "70x48" in line and "4:16 k=4" in line for line in lines)


def test_inspect_reads_no_section(tmp_path: Path, cli: Cli, delta: Path) -> None:
    content = bytearray(delta.read_bytes())
    content[4096 : 4096 + 500] = bytes(500)
    damaged = tmp_path / "damaged.deltafmt"
    damaged.write_bytes(content)
    assert cli("inspect", damaged, "--tensors").code == 0
    assert cli("verify", damaged).code == 3


def test_inspect_loads_neither_numpy_nor_torch(delta: Path) -> None:
    code = (
        "import sys; from deltafmt.tools.main import main; code = main(sys.argv[1:]);"
        "found = {'numpy', 'torch', 'numba', 'rich', 'transformers'} & set(sys.modules);"
        "sys.exit(f'loaded {found}' if found else code)"
    )
    for more in ((), ("--tensors",), ("--json",)):
        command = [sys.executable, "-c", code, "inspect", str(delta), *more]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def test_the_reading_half_loads_no_torch(delta: Path) -> None:
    code = (
        "import sys, deltafmt; d = deltafmt.open(sys.argv[1]); d.buffers('model.embed.weight');"
        "deltafmt.verify(sys.argv[1]); print(sorted({'torch', 'transformers', 'numba'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(delta)], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


NASTY = "a\x1b[31mred\x07\r\nb\u202e\u2028c"


def test_names_cannot_reach_the_terminal_raw(tmp_path: Path, cli: Cli) -> None:
    """Names come from files that anyone may have made."""
    a = {"w": normal(1, (64, 64)), NASTY: normal(2, (64, 32)), f"{NASTY}.tied": normal(2, (64, 32))}
    b = {name: nudge(tensor, 5) for name, tensor in a.items()}
    pair = write_pair(tmp_path, a, b)
    delta = tmp_path / "d.deltafmt"
    wrong = write_folder(tmp_path / "wrong", {**a, NASTY: normal(3, (64, 32))})
    results = [
        cli("pack", pair.base, pair.finetuned, "-o", delta),
        cli("inspect", delta),
        cli("inspect", delta, "--tensors"),
        cli("inspect", delta, "--json"),
        cli("diff", pair.base, pair.finetuned),
        cli("verify", delta, "--base", wrong),
        cli("unpack", wrong, delta, "-o", tmp_path / "out"),
        cli("unpack", wrong, delta, "-o", tmp_path / "out", "--force-base"),
        cli("pack", pair.base, pair.finetuned, "-o", tmp_path / "e", "--include", NASTY + "?"),
        cli("inspect", tmp_path / NASTY),
    ]
    assert [result.code for result in results] == [0, 0, 0, 0, 0, 4, 4, 0, 2, 5]
    for result in results:
        for text in (result.out, result.err):
            assert text.replace("\n", "").isprintable()
    assert "\\x1b[31mred" in results[2].out
    for result in results[5:7]:
        refused(result, 4, "\\x1b[31mred")
    refused(results[8], 2)
    refused(results[9], 5)
    assert len(results[2].out.splitlines()) == 4


def test_an_argument_that_is_not_text(tmp_path: Path) -> None:
    """File names are bytes; those that are no UTF-8 must not break the message."""
    command = [os.fsencode(sys.executable), b"-m", b"deltafmt", b"inspect", os.fsencode(tmp_path) + b"/\xff\xfe"]
    done = subprocess.run(command, capture_output=True, check=False)
    refused(Result(done.returncode, done.stdout.decode(), done.stderr.decode()), 5, "no such file")


def test_a_terminal_that_knows_only_ascii(delta: Path) -> None:
    done = run_cli("inspect", delta, env={"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.isascii()


@pytest.mark.parametrize("more", [(), ("--tensors",), ("--json",)])
def test_a_reader_that_stops_early_is_no_error(delta: Path, more: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "deltafmt", "inspect", str(delta), *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()  # before the first byte, as `head -0` does
    assert process.stderr is not None
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait() == 0


def test_pack_to_standard_output(small: Pair, delta: Path) -> None:
    done = run_cli("pack", small.base, small.finetuned, "-o", "-")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == delta.read_bytes()


def test_an_error_while_packing_to_standard_output_prints_no_text_there(small: Pair) -> None:
    done = run_cli("pack", small.base, small.finetuned, "-o", "-", "--nm", "5:4")
    refused(Result(done.returncode, done.stdout.decode(), done.stderr.decode()), 2, "N = 5")


def test_the_module_and_the_script_are_one(delta: Path) -> None:
    done = run_cli("inspect", delta, "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["bytes"] == os.path.getsize(delta)
    done = run_cli("inspect", delta.with_name("nowhere"))
    refused(Result(done.returncode, done.stdout.decode(), done.stderr.decode()), 5, "nowhere")


def test_nothing_is_drawn_where_nobody_watches(tmp_path: Path, small: Pair) -> None:
    done = run_cli("pack", small.base, small.finetuned, "-o", tmp_path / "d", env={"FORCE_COLOR": "1"})
    assert done.returncode == 0
    assert done.stderr == b""
    assert b"\x1b" not in done.stdout


def test_random_command_lines_never_show_a_traceback(tmp_path: Path, cli: Cli, small: Pair, delta: Path) -> None:
    """Words put together at random: whatever comes of it, it is an exit code and clean text."""
    words = [*COMMANDS, "-o", "--json", "--nm", "--bits", "--rule", "--profile", "hot", "--base", "--", "*", "exact"]
    words += [str(small.base), str(small.finetuned), str(delta), str(tmp_path / "x"), "\x1b[0m", "4:16", "-h", ""]
    rng = random.Random(3)
    here = os.getcwd()
    os.chdir(tmp_path)  # whatever a word makes, it makes it here
    try:
        for _ in range(300):
            arguments = [rng.choice(COMMANDS), *rng.choices(words, k=rng.randint(0, 5))]
            result = cli(*arguments)
            assert result.code in (0, 2, 3, 4, 5), (arguments, result)
            assert "Traceback" not in result.err
            assert "internal error" not in result.err, arguments
    finally:
        os.chdir(here)
