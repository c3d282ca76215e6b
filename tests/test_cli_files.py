"""Bad delta files, bases and checkpoints on the command line: the exit code and one clear line."""

from __future__ import annotations

import functools
import os
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
    Cli,
    Pair,
    normal,
    nudge,
    raw,
    read_file,
    refused,
    safetensors_bytes,
    write_folder,
)
from deltafmt.container import canonical, frame
from deltafmt.format import constants as c

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
        ({"incompatible": 1 << 6}, ("incompatible", "bit 6")),
        ({"incompatible": 1 << 63 | 1 << 9}, ("bit 9, 63",)),
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
        refused(cli(*arguments), 3, str(tmp_path), "folder")


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
    refused(cli("unpack", delta, small.base, "-o", tmp_path / "o"), 2, f"{delta} is a delta file", str(small.base))
    refused(cli("diff", delta, small.base), 2, f"{delta} is a delta file and {small.base} is not")


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
    # Several tensors are one warning.
    other = write_folder(tmp_path / "other", {key: small.b.get(key, tensor) for key, tensor in small.a.items()})
    warning = cli("unpack", other, delta, "-o", tmp_path / "several", "--force-base").err
    assert warning.count("\n") == 1
    assert "tensors of the base differ from those packed against, the first is" in warning
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
