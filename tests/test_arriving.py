"""Checksums that are taken while a file arrives are those of all its bytes: no batch is hashed before it is there."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

import delta_files
from deltafmt.container.reader import Container
from deltafmt.errors import InvalidFileError
from deltafmt.format.constants import CODEC_STORED
from strategies import examples

torch = pytest.importorskip("torch")

from deltafmt.runtime import arriving, upload
from deltafmt.runtime.arriving import ArrivingSections
from deltafmt.runtime.upload_pieces import cut
from uploads import MIB, big_file


class Hashing:
    """Hashes a batch with the library when it is launched: what has not arrived by then makes another checksum."""

    batches: int

    def __init__(self, memory: torch.Tensor, batches: Sequence[Sequence[tuple[int, int]]]) -> None:
        self.memory = memory
        self.cut = batches
        self.digests: list[list[bytes] | None] = [None] * len(batches)
        type(self).batches = len(batches)

    def launch(self, number: int) -> None:
        """Hash a batch."""
        assert self.digests[number] is None
        assert all(length > 240 for _, length in self.cut[number])
        raw = self.memory.numpy().data
        self.digests[number] = [xxhash.xxh3_128_digest(raw[at : at + length]) for at, length in self.cut[number]]

    def found(self) -> list[bytes]:
        """Return all digests."""
        return [digest for batch in self.digests for digest in batch or ()]


class Stream:
    """A stream of which only the order of calls counts."""

    def wait_stream(self, _: object) -> None:
        """Do nothing."""

    def synchronize(self) -> None:
        """Do nothing."""


def check(data: bytes, path: Any, batch_bytes: int, steps: Sequence[int]) -> int:
    """Let a file arrive piece by piece, looking after some of them; return the number of batches."""
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch, Container(path, mmap=False) as container:
        patch.setattr(arriving, "Hashing", Hashing)
        patch.setattr(arriving, "LEAST_BATCH_BYTES", batch_bytes)
        patch.setattr(arriving, "_stream", lambda _: Stream())
        patch.setattr(torch.cuda, "current_stream", lambda _: Stream())
        patch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
        Hashing.batches = 0
        plan = upload._place(container, None).layout.upload
        memory = torch.zeros(plan.nbytes, dtype=torch.uint8)
        pieces = cut(container.sections, plan, MIB)
        made = ArrivingSections(container, memory, upload._checked_there(container, plan), pieces)
        for number, piece in enumerate(pieces):
            if number in steps:
                made.arrived(number)
            for copy in piece.copies:
                start = piece.offset + copy.source
                raw = np.frombuffer(data[start : start + copy.length], np.uint8)
                memory[copy.target : copy.target + copy.length] = torch.from_numpy(raw.copy())
        made.check()
        made.forget()
    return Hashing.batches


@examples(40)
@given(data=delta_files.delta_files(), batch_bytes=st.sampled_from((1, 1000, MIB)), steps=st.sets(st.integers(0, 9)))
def test_any_file(data, batch_bytes, steps, tmp_path_factory) -> None:
    path = tmp_path_factory.getbasetemp() / "arriving.deltafmt"
    path.write_bytes(data)
    with Container(path, mmap=False) as container:
        hot = all(section.codec == CODEC_STORED for section in container.sections)
    if hot:
        check(data, path, batch_bytes, sorted(steps))


def test_sections_larger_than_a_piece(tmp_path_factory) -> None:
    path = tmp_path_factory.getbasetemp() / "large.deltafmt"
    assert check(big_file(), path, 4 * MIB, range(99)) == 5
    assert check(big_file(), path, 64 * MIB, range(99)) == 1


@pytest.mark.parametrize("section", [0, 3])
def test_damage_is_found_in_any_batch(section: int, tmp_path_factory) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.deltafmt"
    data = bytearray(big_file())
    path.write_bytes(data)
    with Container(path, mmap=False) as container:
        data[container.sections[section].offset + 2 * MIB] ^= 1
    with pytest.raises(InvalidFileError, match=f"section {section}"):
        check(bytes(data), path, 4 * MIB, range(99))
