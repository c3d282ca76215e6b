"""The second reader, spec/reader, built and run as a process beside the tests."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

READER = Path(__file__).resolve().parent.parent / "spec" / "reader"
# None where the reader cannot be built.
COMPILER = (os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")) if shutil.which("make") else None
STATUS = ("ok", "invalid", "unsupported", "limit", "system", "misuse", "other base")
TOO_LARGE = 255


def build(out: Path, *programs: str) -> list[Path]:
    """Make programs of the reader below a folder: ``checked/NAME`` under the sanitizers, ``NAME`` without."""
    paths = [out / program for program in programs]
    done = subprocess.run(
        ["make", "-C", READER, f"OUT={out}", f"CC={COMPILER}", *paths], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return paths


@dataclass(frozen=True)
class Tensor:
    """What the reader says of a tensor: how reading ended, and digests of its delta and of the tensor over a base."""

    status: int
    first: bytes
    second: bytes


@dataclass(frozen=True)
class Report:
    """What the reader says of a file."""

    opened: str
    verified: str
    message: str
    content_id: bytes
    tensors: tuple[Tensor, ...]


class Driver:
    """A running reader: hands it files, and reads its reports."""

    def __init__(self, program: Path) -> None:
        self.program = program
        self.process = subprocess.Popen(
            [program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def read(self, data: bytes) -> Report:
        """Return the report on a file of these bytes.

        Raises:
            AssertionError: the reader ended: a sanitizer's finding, or a crash.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(struct.pack("<Q", len(data)) + data)
        self.process.stdin.flush()
        head = self.process.stdout.read(4)
        if len(head) < 4:
            assert self.process.stderr is not None
            raise AssertionError(self.process.stderr.read().decode(errors="replace"))
        return parsed(self.process.stdout.read(*struct.unpack("<I", head)))

    def close(self) -> None:
        """End the process; a leak is a finding, too."""
        _, errors = self.process.communicate()
        assert self.process.returncode == 0, errors.decode(errors="replace")


def parsed(report: bytes) -> Report:
    """Return a report from its bytes; ``driver.c`` says how they lie."""
    opened, verified, said = report[:3]
    message, rest = report[3 : 3 + said].decode(errors="replace"), report[3 + said :]
    if opened:
        return Report(STATUS[opened], STATUS[verified], message, b"", ())
    (count,) = struct.unpack_from("<I", rest, 32)
    tensors = tuple(
        Tensor(rest[at], rest[at + 1 : at + 33], rest[at + 33 : at + 65]) for at in range(36, 36 + 65 * count, 65)
    )
    return Report(STATUS[opened], STATUS[verified], message, rest[:32], tensors)
