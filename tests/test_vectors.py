"""The test vectors of the specification: every file gives what its header says, and its generator still makes it."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

import deltafmt
from deltafmt.errors import InvalidFileError, UnsupportedError
from deltafmt.pipeline.verify import verify

SPEC = Path(__file__).resolve().parent.parent / "spec"
VECTORS = sorted((SPEC / "vectors").glob("*.vec"))


def load(path: Path) -> tuple[dict[str, str], bytes]:
    head, _, body = path.read_bytes().partition(b"\n\n")
    return dict(line.split(": ", 1) for line in head.decode().splitlines()), zlib.decompress(body)


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
def test_vector(path: Path, tmp_path: Path) -> None:
    expected, data = load(path)
    file = tmp_path / "x.deltafmt"
    file.write_bytes(data)
    if expected["expect"] == "ok":
        assert verify(file).content_id == expected["content_id"]
        with deltafmt.open(file) as delta:
            found = {
                f"delta.{name}": hashlib.sha256(delta.delta(name).tobytes()).hexdigest()
                for name in delta
                if delta.resolve(name).action == "add"
            }
        assert found == {key: value for key, value in expected.items() if key.startswith("delta.")}
        return
    with pytest.raises(InvalidFileError) as caught:
        verify(file)
    assert isinstance(caught.value, UnsupportedError) == (expected["expect"] == "unsupported")
    assert expected["error"] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_there_are_vectors_of_each_kind() -> None:
    kinds = [load(path)[0]["expect"] for path in VECTORS]
    assert kinds.count("ok") >= 10
    assert kinds.count("invalid") >= 30
    assert "unsupported" in kinds


def test_generators_make_what_is_there() -> None:
    subprocess.run([sys.executable, SPEC / "make_vectors.py", "--check"], check=True)
