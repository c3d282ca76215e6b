"""Exact tensors of a checkpoint: packed chunk by chunk, and restored (spec/deltafmt-v1.md, section 17)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from deltafmt.checkpoint.safetensors_file import Tensor
from deltafmt.delta import DeltaFile
from deltafmt.errors import InvalidFileError
from deltafmt.exact.coding import CHUNK_UNITS, EncodedChunk, ExactDecoder, encode_chunk
from deltafmt.exact.differences import Marks
from deltafmt.exact.prediction import converted, extended, units_at
from deltafmt.exact.units import Units, unit_count, unit_of
from deltafmt.index.entries import TensorEntry
from deltafmt.pipeline.exact_parts import ExactPart


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
def predicted(base: Tensor | None, dtype: str, first: int, end: int) -> Iterator[Units]:
    """Give the prediction of some units of a tensor.

    Args:
        base: the base tensor, or None.
        dtype: of the tensor.
        first, end: the units.
    """
    known = 0 if base is None else max(min(unit_count(base.dtype, base.shape), end) - first, 0)
    if base is None or not known:
        yield extended(units_at(memoryview(b""), dtype), end - first)
        return
    width = unit_of(base.dtype).width
    with base.pages(first * width, known * width) as view:
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

    def restore(self, number: int) -> tuple[int, Units]:
        """Return the place of a chunk's first byte in the tensor, and the chunk's units.

        Raises:
            InvalidFileError: the chunk breaks the format, or was made for another base.
        """
        first, end = self._decoder.span(number)
        with self._predicted(first, end) as (prediction, marks):
            try:
                units = self._decoder.decode(number, prediction, marks)
            except InvalidFileError as error:
                raise self._located(error) from error
            # A chunk that is the prediction itself lies in pages that are given back here.
            return first * self._decoder.unit.width, units.copy() if units is prediction else units

    @contextlib.contextmanager
    def _predicted(self, first: int, end: int) -> Iterator[tuple[Units, Marks | None]]:
        """Give the prediction of some units, and which of them are marked."""
        if self._part is not None:
            yield self._part.predicted(first, end)
            return
        with predicted(self._base, self._dtype, first, end) as prediction:
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
