"""Exact tensors of a checkpoint: packed chunk by chunk, and restored (spec/deltafmt-v1.md, section 17)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from deltafmt.checkpoint.held_tensor import HeldTensor
from deltafmt.checkpoint.safetensors_file import Tensor
from deltafmt.delta import DeltaFile
from deltafmt.errors import InvalidFileError
from deltafmt.exact.coding import CHUNK_UNITS, EncodedChunk, ExactDecoder, encode_chunk
from deltafmt.exact.differences import Marks
from deltafmt.exact.prediction import converted, extended, units_at
from deltafmt.exact.units import Units, unit_count, unit_of
from deltafmt.index.entries import TensorEntry
from deltafmt.output import Bytes
from deltafmt.pipeline.chunk_hashes import ChunkHashes
from deltafmt.pipeline.exact_parts import ExactPart
from deltafmt.pipeline.file_hashes import FileHash


@dataclass(frozen=True, slots=True)
class ExactBytes:
    """An exact tensor, ready to be written.

    Attributes:
        pieces: the buffer.
        digest: the fingerprint of the tensor.
        chunk: units of a chunk.
        factors: of an exact part, the bits of a float32 for each term.
    """

    pieces: list[bytes]
    digest: bytes
    chunk: int = CHUNK_UNITS
    factors: tuple[int, ...] = ()


@contextlib.contextmanager
def predicted(
    base: Tensor | None, dtype: str, first: int, end: int, see: Callable[[Bytes], None] | None = None
) -> Iterator[Units]:
    """Give the prediction of some units of a tensor.

    Args:
        base: the base tensor, or None.
        dtype: of the tensor.
        first, end: the units.
        see: is called with the base's bytes of these units, which may be none.
    """
    known = 0 if base is None else max(min(unit_count(base.dtype, base.shape), end) - first, 0)
    if base is None or not known:
        if see is not None:
            see(b"")
        yield extended(units_at(memoryview(b""), dtype), end - first)
        return
    width = unit_of(base.dtype).width
    with base.pages(first * width, known * width) as view:
        if see is not None:
            see(view)
        yield extended(converted(units_at(view, base.dtype), base.dtype, dtype), end - first)


def chunk_spans(dtype: str, shape: tuple[int, ...], chunk: int = CHUNK_UNITS) -> list[tuple[int, int]]:
    """Return the chunks of a tensor as (first unit, end)."""
    units = unit_count(dtype, shape)
    return [(first, min(first + chunk, units)) for first in range(0, units, chunk)]


def pack_chunk(tensor: Tensor, base: Tensor | None, first: int, end: int, level: str) -> EncodedChunk:
    """Encode some units of a tensor."""
    unit = unit_of(tensor.dtype)
    with (
        tensor.pages(first * unit.width, (end - first) * unit.width) as view,
        predicted(base, tensor.dtype, first, end) as prediction,
    ):
        return encode_chunk(units_at(view, tensor.dtype), prediction, unit, level)


class ChunkPacker:
    """The chunks of one exact tensor, to be encoded by several threads, which take the fingerprints on the way.

    Args:
        tensor, base: the fine-tune's tensor, and the base's or None.
        level: how chunks are encoded.
        file: takes the digest of the fine-tune's weight file, and expects the tensor; None if nothing does.
    """

    def __init__(self, tensor: Tensor, base: Tensor | None, level: str, file: FileHash | None = None) -> None:
        self._tensor, self._base, self._level, self._file = tensor, base, level, file
        self._spans = chunk_spans(tensor.dtype, tensor.shape)
        self._mine = ChunkHashes(tensor)
        # Those who pack several fine-tunes of a base hold its tensor, and take its fingerprint once.
        self._theirs = None if base is None or isinstance(base, HeldTensor) else ChunkHashes(base)

    def __len__(self) -> int:
        return len(self._spans)

    def encode(self, number: int) -> EncodedChunk:
        """Encode a chunk. Chunks have to be begun in order; they may end in any order."""
        (first, end), unit = self._spans[number], unit_of(self._tensor.dtype)
        offset = self._tensor.offset + first * unit.width
        try:
            with contextlib.ExitStack() as stack:
                view = stack.enter_context(self._tensor.pages(first * unit.width, (end - first) * unit.width))
                self._mine.take(number, view)
                if self._file is not None:
                    self._file.take(offset, view)
                see = None if self._theirs is None else partial(self._theirs.take, number)
                prediction = stack.enter_context(predicted(self._base, self._tensor.dtype, first, end, see))
                return encode_chunk(units_at(view, self._tensor.dtype), prediction, unit, self._level)
        except BaseException:
            for hashes in (self._mine, self._theirs):
                if hashes is not None:
                    hashes.fail(number)
            if self._file is not None:
                self._file.fail(offset)
            raise

    def digests(self) -> tuple[bytes, bytes | None]:
        """Return the fingerprints of tensor and base, once all chunks are encoded."""
        if self._base is None:
            return self._mine.digest(), None
        return self._mine.digest(), self._base.fingerprint() if self._theirs is None else self._theirs.digest()


class ExactTensor:
    """An exact tensor of a delta file, which is restored from its base chunk by chunk, by any number of threads."""

    def __init__(self, delta: DeltaFile, entry: TensorEntry, base: Tensor | None) -> None:
        assert entry.exact is not None
        self._where = f'{delta.container.name}: tensors["{entry.name}"]'
        self._dtype = entry.dtype
        self._base = base
        self._part = None
        if entry.terms and base is not None:
            self._part = ExactPart(delta, entry, base, entry.exact.factors)
        try:
            buffer = delta.container.buffer(entry.exact.data)
            self._decoder = ExactDecoder(buffer, entry.dtype, entry.shape, entry.exact.chunk)
        except InvalidFileError as error:
            raise self._located(error) from error
        limits, size = delta.container.limits, delta.container.size
        limits.check_memory(self._decoder.memory, size, f"{self._where}: a chunk takes")

    @property
    def decoded(self) -> int:
        """Bytes that :meth:`check` makes."""
        return self._decoder.decoded

    def __len__(self) -> int:
        return len(self._decoder)

    def hashes(self) -> ChunkHashes | None:
        """Return what takes the base's fingerprint while all chunks are restored; None if no chunk reads the base."""
        return None if self._base is None or self._part is not None or not len(self) else ChunkHashes(self._base)

    def restore(self, number: int, hashes: ChunkHashes | None = None) -> tuple[int, Units]:
        """Return the place of a chunk's first byte in the tensor, and the chunk's units.

        Args:
            number: the chunk. With ``hashes``, chunks have to be begun in order.
            hashes: takes the base's bytes.

        Raises:
            InvalidFileError: the chunk breaks the format, or was made for another base.
        """
        first, end = self._decoder.span(number)
        see = None if hashes is None else partial(hashes.take, number)
        try:
            with self._predicted(first, end, see) as (prediction, marks):
                try:
                    units = self._decoder.decode(number, prediction, marks)
                except InvalidFileError as error:
                    raise self._located(error) from error
                # A chunk that is the prediction itself lies in pages that are given back here.
                return first * self._decoder.unit.width, units.copy() if units is prediction else units
        except BaseException:
            if hashes is not None:
                hashes.fail(number)
            raise

    @contextlib.contextmanager
    def _predicted(
        self, first: int, end: int, see: Callable[[Bytes], None] | None
    ) -> Iterator[tuple[Units, Marks | None]]:
        """Give the prediction of some units, and which of them are marked."""
        if self._part is not None:
            yield self._part.predicted(first, end)
            return
        with predicted(self._base, self._dtype, first, end, see) as prediction:
            yield prediction, None

    def check(self) -> None:
        """Check what can be known without the base.

        Raises:
            InvalidFileError: a chunk breaks the format.
        """
        for number in range(len(self)):
            try:
                self._decoder.check(number)
            except InvalidFileError as error:
                raise self._located(error) from error

    def _located(self, error: InvalidFileError) -> InvalidFileError:
        return InvalidFileError(f"{self._where}: {error}")
