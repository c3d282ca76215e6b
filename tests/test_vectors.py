"""The test vectors of the specification: every file gives what its header says, and its generator still makes it."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

import deltafmt
from deltafmt.errors import InvalidFileError, UnsupportedError
from deltafmt.exact.coding import ExactDecoder
from deltafmt.exact.prediction import converted, extended, units_at
from deltafmt.pipeline.verify import verify

SPEC = Path(__file__).resolve().parent.parent / "spec"
VECTORS = sorted((SPEC / "vectors").glob("*.vec"))


def load(path: Path) -> tuple[dict[str, str], bytes]:
    head, _, body = path.read_bytes().partition(b"\n\n")
    return dict(line.split(": ", 1) for line in head.decode().splitlines()), zlib.decompress(body)


def bases_of(expected: dict[str, str]) -> list[str]:
    return [key.removeprefix("base.") for key in expected if key.startswith("base.")]


def restored_digest(delta: deltafmt.DeltaFile, name: str, expected: dict[str, str]) -> str:
    """Restore an exact tensor by the modules that know no checkpoint; return the SHA-256 of its bytes."""
    entry = delta[name]
    assert entry.exact is not None
    decoder = ExactDecoder(delta.container.buffer(entry.exact.data), entry.dtype, entry.shape, entry.exact.chunk)
    prediction = np.zeros(0, decoder.unit.dtype)
    if entry.base is not None:
        base = units_at(memoryview(bytes.fromhex(expected[f"base.{name}"])), entry.base.dtype)
        prediction = converted(base, entry.base.dtype, entry.dtype)[: decoder.units]
    prediction = extended(prediction, decoder.units)
    chunks = [decoder.decode(number, prediction[slice(*decoder.span(number))]) for number in range(len(decoder))]
    return hashlib.sha256(b"".join(chunk.tobytes() for chunk in chunks)).hexdigest()


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
            restored = {f"restored.{name}": restored_digest(delta, name, expected) for name in bases_of(expected)}
        assert found == {key: value for key, value in expected.items() if key.startswith("delta.")}
        assert restored == {key: value for key, value in expected.items() if key.startswith("restored.")}
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
