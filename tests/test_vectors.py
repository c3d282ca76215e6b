"""The test vectors of the specification: every file gives what its header says, and its generator still makes it."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from deltafmt.errors import InvalidFileError
from deltafmt.pipeline.verify import verify

SPEC = Path(__file__).resolve().parent.parent / "spec"
sys.path.insert(0, str(SPEC))

import suite

NAMES = sorted(path.stem for path in suite.FOLDER.glob("*.vec"))


def test_every_vector_gives_what_it_says() -> None:
    problems = {name: suite.problem(suite.load(name)) for name in NAMES}
    assert {name: problem for name, problem in problems.items() if problem is not None} == {}


def test_messages_say_what_is_wrong() -> None:
    for vector in map(suite.load, NAMES):
        if vector.keys["expect"] != "ok":
            with pytest.raises(InvalidFileError) as caught:
                verify(io.BytesIO(vector.data))
            assert vector.keys["error"] in str(caught.value), vector.name
            assert "\n" not in str(caught.value)


def test_there_are_vectors_of_each_kind() -> None:
    vectors = [suite.load(name) for name in NAMES]
    kinds = [vector.keys["expect"] for vector in vectors]
    assert kinds.count("ok") >= 90
    assert kinds.count("invalid") >= 250
    assert "unsupported" in kinds
    bases = [vector.keys.get("apply") for vector in vectors if vector.base]
    assert bases.count(None) >= 30
    assert bases.count("refuse") >= 5


def test_generators_make_what_is_there() -> None:
    subprocess.run([sys.executable, SPEC / "make_vectors.py", "--check"], check=True)
