"""Checksums of an upload, taken on the device while the rest of the file is still on its way.

The sections are hashed in batches, in the order in which the file arrives. A batch is launched on a stream of its own
as soon as the copies of all its bytes are given to the upload's stream, and behind these. When the last byte arrives,
only the last batch is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from deltafmt.container.reader import Container
from deltafmt.kernels.xxh3.digests import BATCH_BYTES, Hashing, batches, is_short, on_host
from deltafmt.runtime.upload_pieces import Piece

# A batch costs the host two launches, and the last one is waited for: an eighth of a file, but at least this much.
LEAST_BATCH_BYTES = 32 * 1024 * 1024
BATCHES = 8

_streams: dict[torch.device, torch.cuda.Stream] = {}


class ArrivingSections:
    """The sections of one upload whose checksums the device takes.

    Args:
        container: the file.
        memory: uint8, 1-d, on a GPU, that the sections go to. The current stream is the upload's.
        offsets: where each section lies in the memory, by its number.
        pieces: of the upload, in their order.
    """

    def __init__(
        self, container: Container, memory: torch.Tensor, offsets: Mapping[int, int], pieces: Sequence[Piece]
    ) -> None:
        self._container = container
        self._memory = memory
        self._offsets = offsets
        last = {share.section: number for number, piece in enumerate(pieces) for share in piece.shares}
        lengths = {number: container.sections[number].length for number in offsets}
        self._numbers = sorted((n for n in offsets if not is_short(lengths[n])), key=lambda number: last[number])
        most = min(max(sum(lengths.values()) // BATCHES, LEAST_BATCH_BYTES), BATCH_BYTES)
        cut = list(batches([(offsets[number], lengths[number]) for number in self._numbers], most))
        self._hashing = Hashing(memory, cut) if cut else None
        self._needed: list[int] = []  # pieces of each batch
        end = 0
        for batch in cut:
            end += len(batch)
            self._needed.append(last[self._numbers[end - 1]] + 1)
        self._launched = 0
        self._upload = torch.cuda.current_stream(memory.device)
        self._stream = _stream(memory.device)

    def arrived(self, pieces: int) -> None:
        """Launch the batches whose bytes are within the first pieces, which are given to the upload's stream."""
        while self._launched < len(self._needed) and self._needed[self._launched] <= pieces:
            assert self._hashing is not None
            self._stream.wait_stream(self._upload)
            with torch.cuda.stream(self._stream):
                self._hashing.launch(self._launched)
            self._launched += 1

    def check(self) -> None:
        """Compare all checksums; every piece is given to the upload's stream.

        Raises:
            InvalidFileError: a section is damaged.
        """
        if self._needed:
            self.arrived(self._needed[-1])
        found: dict[int, bytes] = {}
        if self._hashing is not None:
            with torch.cuda.stream(self._stream):
                found = dict(zip(self._numbers, self._hashing.found(), strict=True))
        for number, offset in self._offsets.items():
            length = self._container.sections[number].length
            digest = found[number] if number in found else on_host(self._memory, offset, length)
            self._container.check_checksum(number, digest)

    def forget(self) -> None:
        """Wait until no kernel reads the memory any more, and let go of it."""
        self._stream.synchronize()
        self._hashing = None
        del self._memory


def _stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return _streams[device]
