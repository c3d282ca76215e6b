"""How soon a file answers: ``deltafmt inspect`` as a process, and ``deltafmt.open`` with one tensor's views.

    python benchmarks/startup.py [--tensors 1000] [--repeats 11]

The floors are a Python that does nothing and one that imports the index's decoder. A file object that counts shows how
many bytes are read of the sections (none), and a child process which heavy packages were imported.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tempfile
from pathlib import Path

from common import Figure, report, run_child, seconds
from synthetic import write_pair

import deltafmt
from deltafmt.checkpoint.folder_writer import TensorSpec
from deltafmt.container.reader import Container
from deltafmt.pipeline import summary

IMPORTS = """
import contextlib, io, sys
from deltafmt.tools.main import main
with contextlib.redirect_stdout(io.StringIO()):
    main(["inspect", sys.argv[1]])
print(*sorted({"numpy", "torch", "transformers"} & set(sys.modules)))
"""


class CountingFile(io.BytesIO):
    """A file that counts the bytes read below an offset and in all."""

    def __init__(self, data: bytes, sections: range) -> None:
        super().__init__(data)
        self.sections = sections
        self.in_sections = 0
        self.total = 0

    def read(self, size: int | None = -1, /) -> bytes:
        """Read and count."""
        start = self.tell()
        data = super().read(size)
        overlap = range(max(start, self.sections.start), min(start + len(data), self.sections.stop))
        self.in_sections += len(overlap)
        self.total += len(data)
        return data


def make_file(folder: Path, tensors: int) -> Path:
    """Pack a pair of many small tensors, nine matrices for each vector."""
    specs = []
    for number in range(tensors):
        shape = (64,) if number % 10 == 9 else (64, 128)
        specs.append(TensorSpec(f"model.layers.{number // 10}.block.{number % 10}.weight", "BF16", shape))
    out = folder / "many.deltafmt"
    deltafmt.pack(*write_pair(folder, specs), out)
    return out


def bytes_read(path: Path) -> CountingFile:
    """Open and inspect a file through a file object that counts."""
    with Container(path) as container:
        sections = range(4096, container.index_offset)
    counting = CountingFile(path.read_bytes(), sections)
    with Container(counting) as container:
        summary.summary_obj(container)
    return counting


def measure(folder: Path, tensors: int, repeats: int) -> list[Figure]:
    """Measure everything."""
    path = make_file(folder, tensors)
    python = sys.executable

    def process(*words: str | Path) -> float:
        return statistics.median(run_child(python, *words).seconds for _ in range(repeats))

    floor = process("-c", "pass")
    msgpack = process("-X", "frozen_modules", "-c", "import msgpack")
    inspect = process("-m", "deltafmt", "inspect", path)
    as_json = process("-m", "deltafmt", "inspect", path, "--json")
    imported = run_child(python, "-c", IMPORTS, path).output.split()
    counted = bytes_read(path)
    name = f"model.layers.{tensors // 20}.block.0.weight"

    def views(*, verify: bool) -> None:
        with deltafmt.open(path, verify=verify) as delta:
            delta.buffers(name)

    views(verify=True)
    opened = seconds(lambda: views(verify=True), 5 * repeats)
    unverified = seconds(lambda: views(verify=False), 5 * repeats)
    size = path.stat().st_size
    found = " ".join(imported) or "none"
    return [
        Figure("floor: python -c pass", floor * 1e3, "ms"),
        Figure("floor: python -c 'import msgpack'", msgpack * 1e3, "ms"),
        Figure("inspect, whole process", inspect * 1e3, "ms", 200, at_most=True, note=f"{tensors} tensors"),
        Figure("inspect --json, whole process", as_json * 1e3, "ms"),
        Figure("torch imported by inspect", int("torch" in imported), "", 0, True, f"of the heavy ones: {found}"),
        Figure("section bytes read", counted.in_sections, "bytes", 0, True, f"{counted.total:,} of {size:,} read"),
        Figure("open and one tensor's views", opened * 1e3, "ms", 5, True, "its section's checksum compared"),
        Figure("the same, verify=False", unverified * 1e3, "ms", 5, at_most=True),
    ]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=1000, help="tensors of the file (1000)")
    parser.add_argument("--repeats", type=int, default=11, help="runs of each; the median counts (11)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report("startup", measure(Path(folder), options.tensors, options.repeats), tensors=options.tensors)


if __name__ == "__main__":
    main()
