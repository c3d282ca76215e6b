"""What ``unpack`` checks before a folder appears: digests, the content id, and whether code is wanted."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

import deltafmt
from conftest import Cli, refused
from containers import edited, index_of, sealed
from deltafmt.container import canonical
from deltafmt.container.content import content_id
from deltafmt.container.reader import Container
from deltafmt.container.writer import ContainerWriter
from deltafmt.errors import InvalidFileError
from deltafmt.format import constants as c


def with_right_id(data: bytes) -> bytes:
    """Return a file with the content id that its index gives."""
    container = Container(io.BytesIO(data))
    parts = container.removed, container.attachments, container.metadata, container.scaled_key()
    trailer = bytearray(data[-c.TRAILER_SIZE :])
    trailer[24:56] = content_id(container.entries(), *parts)
    return sealed(data[: -c.TRAILER_SIZE] + trailer, canonical.pack(index_of(data)))


def wrong_payload(index: Any) -> None:
    name = next(name for name, entry in index["tensors"].items() if entry["action"] == "add")
    index["tensors"][name]["digest"] = blake3(b"something else").digest()


def wrong_attachment(index: Any) -> None:
    index["attachments"]["config.json"]["digest"] = blake3(b"something else").digest()


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (wrong_payload, "the payload has another digest"),
        (wrong_attachment, r'attachments\["config.json"\]: the bytes have another digest'),
    ],
)
def test_what_is_written_has_its_digest(
    pair: tuple[Path, Path], packed: Path, tmp_path: Path, edit: Callable[[Any], object], match: str
) -> None:
    # Checksums, the seal and the content id are right: the digest alone tells.
    wrong = tmp_path / "wrong.deltafmt"
    wrong.write_bytes(with_right_id(edited(packed.read_bytes(), edit)))
    with pytest.raises(InvalidFileError, match=match):
        deltafmt.unpack(pair[0], wrong, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir() if "out" in path.name) == []


def test_the_content_id_that_is_recorded_is_the_contents(pair: tuple[Path, Path], packed: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.deltafmt"
    wrong.write_bytes(edited(packed.read_bytes(), lambda index: index["metadata"].update(zzz="told")))
    with pytest.raises(InvalidFileError, match="the content id is not that of the content"):
        deltafmt.unpack(pair[0], wrong, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def with_code(packed: Path, out: Path) -> Path:
    """Write a file that holds another one's metadata, no tensor, and Python code."""
    files = {"config.json": b"{}", "json.py": b"print('run')\n", "lib/TOOL.PYW": b""}
    with deltafmt.open(packed) as delta, out.open("wb") as sink:
        writer = ContainerWriter(sink)
        attachments = {name: writer.attach(data) for name, data in files.items()}
        writer.finish([], attachments=attachments, metadata=dict(delta.metadata))
    return out


def test_code_that_could_be_taken_for_a_module_is_written_only_where_it_is_wanted(
    pair: tuple[Path, Path], packed: Path, tmp_path: Path, cli: Cli
) -> None:
    delta, out = with_code(packed, tmp_path / "code.deltafmt"), tmp_path / "out"
    deltafmt.verify(delta)
    line = refused(cli("unpack", pair[0], delta, "-o", out), 2, "names of modules that this Python has: json.py; ")
    assert line.endswith("; --code write writes it all the same, --code leave leaves code out")
    assert not out.exists()
    left = deltafmt.unpack(pair[0], delta, out, code="leave")
    assert (left.files, left.code) == (["config.json"], ["json.py", "lib/TOOL.PYW"])
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    made = cli("unpack", pair[0], delta, "-o", out, "--force", "--code", "write", "--json")
    found = json.loads(made.out)
    assert found["files"] == ["config.json", *found["code"]]
    assert (out / "json.py").read_bytes() == b"print('run')\n"
    said = cli("unpack", pair[0], delta, "-o", tmp_path / "other", "--code", "leave")
    assert "code, left out: json.py, lib/TOOL.PYW" in said.out.splitlines()
