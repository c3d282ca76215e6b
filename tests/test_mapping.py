"""The examples of docs/how-to/read-a-file.md: other processes, without deltafmt, see what deltafmt.open shows."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import deltafmt
from deltafmt.checkpoint.folder_writer import CheckpointWriter, TensorSpec
from deltafmt.methods import DeltaDQ
from deltafmt.terms.floats import narrow
from deltafmt.terms.nm import codec as nm

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"
SHAPE = (3, 31, 75)
ROW = 90
SHOWN = 16


def write(folder: Path, values: np.ndarray) -> Path:
    writer = CheckpointWriter(folder, [TensorSpec("w", "BF16", SHAPE)])
    writer.write("w", 0, narrow(values.astype(np.float32), "BF16").tobytes())
    writer.commit()
    return folder


@pytest.fixture(
    scope="module",
    params=[
        DeltaDQ(4, 16, 4),
        DeltaDQ(1, 128, 2, share=8),
        DeltaDQ(3, 10, 3, index="fixed", share=2, scale_group=5),
        DeltaDQ(2, 9, 5, index="fixed", share=1, scale_dtype="F32"),
        DeltaDQ(3, 70, 6, index="fixed", share=2, scale_group=2),
    ],
    ids=["seeded", "seeded-1:128", "fixed", "wide-scales", "three-planes"],
)
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mapping")
    rng = np.random.default_rng(5)
    base = rng.standard_normal(SHAPE)
    out = folder / "small.deltafmt"
    sides = write(folder / "base", base), write(folder / "finetuned", base + 0.1 * rng.standard_normal(SHAPE))
    deltafmt.pack(*sides, out, method=request.param)
    return out


def inspect(path: Path) -> dict:
    command = [sys.executable, "-m", "deltafmt", "inspect", str(path), "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def expected(path: Path) -> list[str]:
    """The lines that every example prints, from deltafmt's own views of the file."""
    with deltafmt.open(path) as delta:
        entry = delta["w"]
        (term,) = entry.terms
        arrays = nm.decode(term.layout, delta.buffers("w"), term.seed, 0, entry.rows, entry.columns)
        positions = arrays.positions[ROW // term.layout.share].reshape(-1)
        lines = ["codes " + " ".join(map(str, arrays.codes[ROW, :SHOWN]))]
        lines.append("positions " + " ".join(map(str, positions[:SHOWN])))
        return [*lines, "scales " + " ".join(f"{float(scale):.9g}" for scale in arrays.scales[ROW, :SHOWN])]


def run(*command: str | Path) -> list[str]:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_standard_library_alone(packed: Path) -> None:
    # -S leaves out site-packages: neither numpy nor msgpack can be there.
    assert run(sys.executable, "-I", "-S", EXAMPLES / "map_plain.py", packed, "w", str(ROW)) == expected(packed)


def test_what_the_examples_cannot_read_is_one_line(packed: Path, tmp_path: Path) -> None:
    cold, whole, short = tmp_path / "cold.deltafmt", tmp_path / "whole.deltafmt", tmp_path / "short"
    deltafmt.repack(packed, cold, profile="cold")
    deltafmt.pack(packed.parent / "base", packed.parent / "finetuned", whole, exclude=["w"])
    short.write_bytes(b"short")
    wrong = [
        (packed, "no", ROW, "no"),
        (packed, "w", 93, "row 93"),
        (packed, "w", -1, "row -1"),
        (cold, "w", ROW, "cold"),
        (whole, "w", ROW, "nm term"),
        (short, "w", ROW, "not a whole"),
    ]
    for path, name, row, words in wrong:
        programs = [["map_plain.py", path, name, row]]
        if path is not short and row == ROW:
            report = tmp_path / "report.json"
            report.write_text(json.dumps(inspect(path)))
            programs += [["map_c_arguments.py", report, name], ["read_numpy.py", report, name]]
        for program, *arguments in programs:
            command = [sys.executable, str(EXAMPLES / program), *map(str, arguments)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
            assert words in done.stderr or (path, program) == (whole, "read_numpy.py")


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_c(packed: Path, tmp_path: Path) -> None:
    program = tmp_path / "map_c"
    run("cc", "-std=c99", "-O1", "-Wall", "-Wextra", "-Werror", "-o", program, EXAMPLES / "map_c.c")
    tensor = inspect(packed)["tensors"]["w"]
    (term,) = tensor["terms"]
    offsets = {name: place["file_offset"] for name, place in tensor["buffers"].items()}
    kept = -(-SHAPE[-1] // term["group"]) * term["keep"]
    scales = -(-kept // term["scale_group"]) if term["scale_group"] else 1
    numbers = (
        ROW, SHAPE[0] * SHAPE[1], SHAPE[2], term["keep"], term["group"], term["bits"], term["share"], term["seed"],
        offsets["codes"], offsets.get("index", 0), offsets["scales"], scales, 4 if term["scale_dtype"] == "F32" else 2,
    )  # fmt: skip
    assert run(program, packed, *map(str, numbers)) == expected(packed)


def test_views_are_of_the_map(packed: Path) -> None:
    with deltafmt.open(packed) as delta:
        data = np.fromfile(packed, np.uint8)
        for name, place in inspect(packed)["tensors"]["w"]["buffers"].items():
            array = delta.buffers("w")[name]
            assert not array.flags.owndata
            assert not array.flags.writeable
            start = place["file_offset"]
            assert array.tobytes() == data[start : start + place["length"]].tobytes()
