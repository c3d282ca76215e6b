"""Threads that read the pieces of a file, check them and copy them to the device, all at the same time.

A thread takes a free buffer first and then the next piece. A piece that was taken therefore always has a buffer, and
no thread can wait for a piece that cannot move. The parts of a large section are read in any order but hashed in the
order of the file: a thread that has the next part hashes it, and the others go on reading.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING

import numpy as np
import torch
import xxhash

from deltafmt.container.reader import Container
from deltafmt.errors import CancelledError
from deltafmt.format.constants import ZSTD_CHUNK
from deltafmt.runtime.pinned import PinnedBuffer, Ring, start_threads
from deltafmt.runtime.upload_pieces import Piece, Share

if TYPE_CHECKING:
    from deltafmt.container.chunks import ChunkReader


_Move = tuple[Piece, list[torch.Tensor]]


class _Digest:
    """The running checksum of a section whose parts arrive in any order."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.hasher = xxhash.xxh3_128()
        self.next = 0
        self.busy = False
        self.waiting: dict[int, tuple[Share, PinnedBuffer]] = {}

    def take(self, done: Share | None = None) -> tuple[Share, PinnedBuffer] | None:
        """Return the next part to hash, or None if it has not arrived or another thread is hashing.

        Args:
            done: the part that the calling thread has just hashed.
        """
        with self.lock:
            if done is not None:
                self.busy = False
                self.next += 1
            if self.busy or self.next not in self.waiting:
                return None
            self.busy = True
            return self.waiting.pop(self.next)


class _Decoder:
    """A compressed section; the thread that needs its stored bytes first reads and checks them."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.reader: ChunkReader | None = None
        self.left = 0


class Upload:
    """One file on its way to a device.

    Args:
        container: the file.
        pieces: the pieces to move.
        ring: the pinned buffers that the pieces pass through.
        memory, scratch: the uint8 tensors that the pieces are copied to.
        stream: the stream that the copies are queued on; None for a CPU.
        verify: check checksums and padding.
        later: the sections whose checksum the device takes after the upload; only their padding is checked here.
        cancel: an event; when it is set, the upload stops.
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
        later: Collection[int] = (),
        cancel: threading.Event | None,
    ) -> None:
        self._container = container
        # The views are made here: a thread that makes one must take the interpreter's lock once more.
        self._targets = [
            [(scratch if copy.scratch else memory).narrow(0, copy.target, copy.length) for copy in piece.copies]
            for piece in pieces
        ]
        self._stream = stream
        self._verify = verify
        self._later = later
        self._cancel = cancel
        self._pieces: Iterator[_Move] = zip(pieces, self._targets, strict=True)
        self._free: SimpleQueue[PinnedBuffer | None] = SimpleQueue()
        for buffer in ring.buffers:
            self._free.put(buffer)
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
        """Move all pieces; return when all are checked and their copies are queued on the stream.

        Args:
            threads: the number of threads.

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
                    start_threads(lambda _: self._work(), self._threads)
                with self._changed:
                    self._changed.wait_for(self._is_over)
                break
            except BaseException as error:  # noqa: BLE001 - an interrupt, which is raised again when no piece is moving
                self._stop(error)
        if self._error is not None:
            raise self._error

    def forget(self) -> None:
        """Drop the references to the device's memory."""
        for targets in self._targets:
            targets.clear()
        self._error = None

    def _is_over(self) -> bool:
        return self._moving == 0 and (self._left == 0 or self._error is not None)

    def _stop(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()
        for _ in range(self._threads):
            self._free.put(None)  # wakes a thread that waits for a buffer

    def _work(self) -> None:
        try:
            if self._stream is not None:
                torch.cuda.set_stream(self._stream)
            while (buffer := self._free.get()) is not None:
                taken = self._next()
                if taken is None:
                    self._free.put(buffer)
                    return
                try:
                    buffer.wait()
                    self._move(*taken, buffer)
                except BaseException as error:  # noqa: BLE001 - before the piece counts as done
                    self._stop(error)
                self._done()
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
            self._stop(error)

    def _next(self) -> _Move | None:
        if self._cancel is not None and self._cancel.is_set():
            raise CancelledError(f"{self._container.name}: loading was cancelled")
        with self._changed:
            taken = None if self._error is not None else next(self._pieces, None)
            if taken is not None:
                self._moving += 1
            return taken

    def _done(self) -> None:
        with self._changed:
            self._moving -= 1
            self._left -= 1
            if self._moving == 0:
                self._changed.notify_all()

    def _move(self, piece: Piece, targets: list[torch.Tensor], buffer: PinnedBuffer) -> None:
        view = buffer.view[: piece.length]
        if piece.compressed:
            self._decode(piece, view)
        else:
            self._container.read_into(piece.offset, view)
        for copy, target in zip(piece.copies, targets, strict=True):
            target.copy_(buffer.tensor.narrow(0, copy.source, copy.length), non_blocking=True)
        if self._stream is not None:
            buffer.record(self._stream)
        if self._verify and not piece.compressed:
            share = piece.shares[0]
            if share.parts > 1 and share.section not in self._later:
                self._hash_in_order(share, buffer)
                return
            for share in piece.shares:
                stop = share.start + share.length
                if share.section not in self._later:
                    self._container.check_checksum(share.section, xxhash.xxh3_128_digest(view[share.start : stop]))
                self._container.check_padding(share.section, view[stop : stop + share.padding])
        self._free.put(buffer)

    def _hash_in_order(self, share: Share, buffer: PinnedBuffer) -> None:
        digest = self._digests[share.section]
        with digest.lock:
            digest.waiting[share.part] = (share, buffer)
        taken = digest.take()
        while taken is not None:
            share, buffer = taken
            digest.hasher.update(buffer.view[: share.length])
            if share.part == share.parts - 1:
                padding = buffer.view[share.length : share.length + share.padding]
                self._container.check_section(share.section, digest.hasher.digest(), padding)
            self._free.put(buffer)
            taken = digest.take(share)

    def _decode(self, piece: Piece, view: memoryview) -> None:
        """Decode a part of a compressed section into a pinned buffer."""
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
