"""Threads that read the pieces of a file, check them and give them to the device, all at the same time.

A thread takes a free buffer, then the next piece, so that whoever waits for an earlier piece waits for somebody who
has all it takes. The parts of a large section are read in any order and hashed in theirs, by whichever thread comes
last; the others go on reading.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING

import numpy as np
import torch
import xxhash

from deltafmt.container.reader import Container
from deltafmt.errors import CancelledError
from deltafmt.layout.constants import ZSTD_CHUNK
from deltafmt.runtime.pinned import Ring, Slot, start_threads
from deltafmt.runtime.upload_pieces import Piece, Share

if TYPE_CHECKING:
    from deltafmt.container.chunks import ChunkReader


class _Digest:
    """The checksum of a section whose parts arrive in any order."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.hasher = xxhash.xxh3_128()
        self.next = 0
        self.busy = False
        self.waiting: dict[int, tuple[Share, Slot]] = {}

    def take(self, done: Share | None = None) -> tuple[Share, Slot] | None:
        """Return the part to hash next, if it is there and nobody is at work; ``done``: the one hashed last."""
        with self.lock:
            if done is not None:
                self.busy = False
                self.next += 1
            if self.busy or self.next not in self.waiting:
                return None
            self.busy = True
            return self.waiting.pop(self.next)


class _Decoder:
    """A compressed section: its stored bytes, read and checked by the thread that needs them first."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.reader: ChunkReader | None = None
        self.left = 0


class Upload:
    """One file on its way to a device.

    Args:
        container: the file.
        pieces: what to move.
        ring: buffers to move it through.
        memory, scratch: uint8 tensors that it goes to.
        stream: that the copies are given to; None for a CPU.
        verify: compare checksums and padding.
        cancel: when set, the upload stops.
    """

    def __init__(
        self,
        container: Container,
        pieces: Sequence[Piece],
        ring: Ring,
        memory: torch.Tensor,
        scratch: torch.Tensor,
        stream: torch.cuda.Stream | None,
        *,
        verify: bool,
        cancel: threading.Event | None,
    ) -> None:
        self._container = container
        self._memory = memory
        self._scratch = scratch
        self._stream = stream
        self._verify = verify
        self._cancel = cancel
        self._pieces: Iterator[Piece] = iter(pieces)
        self._free: SimpleQueue[Slot | None] = SimpleQueue()
        for slot in ring.slots:
            self._free.put(slot)
        self._digests = {share.section: _Digest() for p in pieces for share in p.shares if share.parts > 1}
        self._decoders = {piece.shares[0].section: _Decoder() for piece in pieces if piece.compressed}
        for piece in pieces:
            if piece.compressed:
                self._decoders[piece.shares[0].section].left += 1
        self._threads = 0
        self._moving = 0
        self._left = len(pieces)
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def run(self, threads: int) -> None:
        """Move everything; return once all of it is checked and given to the stream.

        Raises:
            InvalidFileError: a section is damaged, or the file has become shorter.
            StorageError: reading failed.
            CancelledError: ``cancel`` was set.
        """
        self._threads = min(threads, self._left)
        started = False
        while True:
            try:
                if not started:
                    started = True
                    start_threads(self._work, self._threads)
                with self._changed:
                    self._changed.wait_for(self._is_over)
                break
            except BaseException as error:  # noqa: BLE001 - an interrupt: raised again when no piece is under way
                self._stop(error)
        if self._error is not None:
            raise self._error

    def forget(self) -> None:
        """Let go of the memory."""
        self._memory = self._scratch = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._error = None

    def _is_over(self) -> bool:
        return self._moving == 0 and (self._left == 0 or self._error is not None)

    def _stop(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()
        for _ in range(self._threads):
            self._free.put(None)  # whoever waits for a buffer

    def _work(self) -> None:
        try:
            if self._stream is not None:
                torch.cuda.set_stream(self._stream)
            while (slot := self._free.get()) is not None:
                piece = self._next()
                if piece is None:
                    self._free.put(slot)
                    return
                try:
                    slot.wait()
                    self._move(piece, slot)
                except BaseException as error:  # noqa: BLE001 - before the piece counts as done
                    self._stop(error)
                self._done()
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
            self._stop(error)

    def _next(self) -> Piece | None:
        if self._cancel is not None and self._cancel.is_set():
            raise CancelledError(f"{self._container.name}: loading was cancelled")
        with self._changed:
            piece = None if self._error is not None else next(self._pieces, None)
            if piece is not None:
                self._moving += 1
            return piece

    def _done(self) -> None:
        with self._changed:
            self._moving -= 1
            self._left -= 1
            if self._moving == 0:
                self._changed.notify_all()

    def _move(self, piece: Piece, slot: Slot) -> None:
        view = slot.view[: piece.length]
        if piece.compressed:
            self._decode(piece, view)
        else:
            self._container.read_into(piece.offset, view)
        for copy in piece.copies:
            target = self._scratch if copy.scratch else self._memory
            source = slot.tensor.narrow(0, copy.source, copy.length)
            target.narrow(0, copy.target, copy.length).copy_(source, non_blocking=True)
        if self._stream is not None:
            slot.record(self._stream)
        if self._verify and not piece.compressed:
            share = piece.shares[0]
            if share.parts > 1:
                self._hash_in_order(share, slot)
                return
            for share in piece.shares:
                stored = view[share.start : share.start + share.length]
                self._check(share, xxhash.xxh3_128_digest(stored), slot)
        self._free.put(slot)

    def _check(self, share: Share, found: bytes, slot: Slot) -> None:
        stop = share.start + share.length
        self._container.check_section(share.section, found, slot.view[stop : stop + share.padding])

    def _hash_in_order(self, share: Share, slot: Slot) -> None:
        digest = self._digests[share.section]
        with digest.lock:
            digest.waiting[share.part] = (share, slot)
        taken = digest.take()
        while taken is not None:
            share, slot = taken
            digest.hasher.update(slot.view[: share.length])
            if share.part == share.parts - 1:
                self._check(share, digest.hasher.digest(), slot)
            self._free.put(slot)
            taken = digest.take(share)

    def _decode(self, piece: Piece, view: memoryview) -> None:
        """Decode a part of a compressed section into a buffer."""
        from deltafmt.container.chunks import Decompressor  # noqa: PLC0415 - slow to import, and only cold files need it

        number = piece.shares[0].section
        decoder = self._decoders[number]
        with decoder.lock:
            reader = decoder.reader
            if reader is None:
                reader = decoder.reader = self._container.chunk_reader(number, verify=self._verify)
            decoder.left -= 1
            if decoder.left == 0:
                decoder.reader = None
        target = np.frombuffer(view, np.uint8)
        decompressor = Decompressor()
        for start in range(0, piece.length, ZSTD_CHUNK):
            chunk = reader.chunk((piece.offset + start) // ZSTD_CHUNK, decompressor)
            # Unlike a memoryview, numpy lets other threads run while it copies.
            target[start : start + len(chunk)] = np.frombuffer(chunk, np.uint8)
