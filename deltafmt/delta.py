"""An open delta file: tensors by name, packed buffers as views, dense deltas on request."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from deltafmt.container.reader import Container
from deltafmt.errors import InvalidFileError, UsageError
from deltafmt.exact.coding import ROW_BYTES
from deltafmt.format.limits import DEFAULT_LIMITS, Limits
from deltafmt.index.entries import TensorEntry, Term
from deltafmt.index.exact import ExactRef
from deltafmt.terms.buffers import views
from deltafmt.terms.codecs import AnyCodec, term_codec
from deltafmt.terms.floats import Raw, add

# Elements of a run of rows: enough to hide the cost of a call, few enough that its arrays stay in the CPU's cache.
RUN_ELEMENTS = 1 << 19
# Elements of a batch of runs: one job of a worker thread, which maps the batch's pages and gives them back.
BATCH_ELEMENTS = 1 << 22


class DeltaFile:
    """An open ``.deltafmt`` file; use as a context manager.

    Args:
        path: a path, or a binary file object with ``seek`` and ``read``.
        mmap: map the file, so that views copy nothing; if False, read it.
        verify: check every section's checksum when it is first touched.
        limits: how much memory, work and output the file may ask for.

    Raises:
        StorageError, InvalidFileError, UnsupportedError: see :mod:`deltafmt.errors`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | BinaryIO,
        *,
        mmap: bool = True,
        verify: bool = True,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self.container = Container(path, mmap=mmap, verify=verify, limits=limits)

    def keys(self) -> list[str]:
        """Return the names of the fine-tuned tensors, sorted."""
        return self.container.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.container.keys())

    def __len__(self) -> int:
        return len(self.container.keys())

    def __contains__(self, name: object) -> bool:
        return name in self.container

    def __getitem__(self, name: str) -> TensorEntry:
        """Return a tensor's entry, which has ``shape``, ``dtype``, ``action``, ``terms`` and so on.

        Raises:
            KeyError: the file has no such tensor.
        """
        return self.container.entry(name)

    @property
    def metadata(self) -> Mapping[str, str]:
        """The file's metadata: strings by name."""
        return self.container.metadata

    @property
    def content_id(self) -> str:
        """The content id in hexadecimal, as the file claims it; :func:`deltafmt.verify` computes it.

        Files with the same content have the same id, however they are stored.
        """
        return self.container.content_id.hex()

    def resolve(self, name: str) -> TensorEntry:
        """Return a tensor's entry; for an alias, the entry of its target."""
        entry = self[name]
        return entry if entry.target is None else self[entry.target]

    def buffers(self, name: str) -> dict[str, NDArray[np.generic]]:
        """Return read-only views of a tensor's packed arrays; no byte is copied in a mapped ``hot`` file.

        Returns:
            For ``add``: the buffers of the term by name, as :func:`deltafmt.terms.buffers.views` gives them, and
            ``new_rows`` as bytes if the tensor grew. With several terms the names are ``terms[0].codes`` and so on.
            For ``replace``: ``data`` as bytes. For ``exact``: ``exact``, the chunks as bytes.
            For ``same``: nothing. For an alias: the buffers of its target.
        """
        entry = self.resolve(name)
        arrays: dict[str, NDArray[np.generic]] = {}
        for number, term in enumerate(entry.terms):
            prefix = f"terms[{number}]." if len(entry.terms) > 1 else ""
            packed = self.term_views(entry, term)
            arrays.update({prefix + key: array for key, array in packed.items()})
        if entry.data is not None:
            data = np.frombuffer(self.container.buffer(entry.data), np.uint8)
            arrays["data" if entry.action == "replace" else "new_rows"] = data
        if entry.exact is not None:
            arrays["exact"] = np.frombuffer(self.container.buffer(entry.exact.data), np.uint8)
        return arrays

    def term_views(self, entry: TensorEntry, term: Term) -> dict[str, NDArray[np.generic]]:
        """Return views of the packed arrays of one term, by buffer name."""
        buffers = {key: self.container.buffer(ref) for key, ref in term.buffers.items()}
        return views(term.layout, entry.delta_rows, entry.columns, buffers, term.slots)

    def delta(self, name: str) -> NDArray[np.float32]:
        """Return the dense float32 delta of a tensor.

        The array has the fine-tuned tensor's shape and takes 4 bytes an element. Rows that the base lacks are zero
        in it; their values are in ``buffers(name)["new_rows"]``. A ``same`` tensor has a delta of zeros.

        Raises:
            KeyError: the file has no such tensor.
            UsageError: the tensor's action is ``replace`` or ``exact``: it has no delta.
            InvalidFileError: the tensor's buffers break the format, or decoding takes more than the file's limits.
        """
        entry = self.resolve(name)
        if entry.action == "replace":
            raise UsageError(f'tensor "{name}" replaces the base\'s and has no delta')
        if entry.action == "exact":
            raise UsageError(f'tensor "{name}" is exact and has no delta; unpack restores it from the base')
        if entry.terms:
            self.check_work([entry], 0)
        else:
            size = self.container.size
            self.container.limits.check_elements(
                entry.rows * entry.columns, size, 0, f"{self.container.name}: the delta takes"
            )
        out = np.zeros((entry.rows, entry.columns), np.float32)
        if entry.terms:
            decoder = RunDecoder(self, entry)
            for start, stop in decoder.ranges():
                out[start:stop] = decoder.rows(start, stop)
        return out.reshape(entry.shape)

    def check_work(self, entries: Iterable[TensorEntry], base_bytes: int, *, restores: bool = False) -> None:
        """Refuse to decode the terms of entries if that takes more than the file's limits.

        Args:
            entries: what is to be decoded; one that is decoded twice is given twice.
            base_bytes: bytes of the base, or of the arrays that the caller asks for.
            restores: True if exact parts are restored: a chunk of theirs is predicted from whole runs of rows, however
                small it is.

        Raises:
            InvalidFileError: names the limit.
        """
        work, widest = 0, 0
        for entry in entries:
            work += work_of(entry, restores=restores)
            for codec in (codec_of(entry, term) for term in entry.terms):
                # A run of rows has its matrix, the sum of the terms, and the result.
                widest = max(widest, 12 * min(codec.run_rows, entry.delta_rows) * codec.width)
        where, size = f"{self.container.name}: decoding takes", self.container.size
        limits = self.container.limits
        limits.check_elements(work, size, base_bytes, where)
        limits.check_memory(widest, size, f"{self.container.name}: a run of rows takes")

    def attachment(self, name: str) -> bytes:
        """Return the bytes of an attached file, after comparing their digest.

        Raises:
            KeyError: the file has no such attachment.
            InvalidFileError: the bytes have another digest than the index says.
        """
        attachment = self.container.attachments[name]
        data = bytes(self.container.buffer(attachment.data))
        if blake3(data).digest() != attachment.digest:
            raise InvalidFileError(f'{self.container.name}: attachments["{name}"]: the bytes have another digest')
        return data

    def close(self) -> None:
        """Close the file; views that are still in use stay valid."""
        self.container.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def codec_of(entry: TensorEntry, term: Term) -> AnyCodec:
    """Return the codec of a tensor's term."""
    return term_codec(term.layout, entry.delta_rows, entry.columns, term.seed, term.slots)


def refuse_exact(name: str, entries: Iterable[TensorEntry]) -> None:
    """Refuse exact tensors, whose values only unpack restores, where a delta is needed.

    Args:
        name: of the file.
        entries: the entries whose deltas are needed.

    Raises:
        UsageError: names the first exact tensor.
    """
    for entry in entries:
        if entry.action == "exact":
            raise UsageError(
                f'{name}: tensor "{entry.name}" is exact, so there is no delta to work with; unpack the file, or pack '
                "the fine-tune by another method"
            )


def refuse_child(container: Container) -> None:
    """Refuse a delta that was made on what another delta gives, where its terms would be added to a base.

    Args:
        container: the delta file.

    Raises:
        UsageError: the delta has a parent.
    """
    if container.parent is not None:
        raise UsageError(
            f"{container.name} was made on what the delta {container.parent.hex()[:16]} gives, and not on a base; "
            "squash makes one delta of both"
        )


def work_of(entry: TensorEntry, *, restores: bool) -> int:
    """Return the products and sums that decoding a tensor's terms takes.

    Args:
        entry: the tensor's entry.
        restores: True if its exact part is restored.
    """
    codecs = [codec_of(entry, term) for term in entry.terms]
    rows = entry.delta_rows
    if restores and entry.exact is not None and codecs:
        rows = rows_for_chunks(entry, entry.exact, max(codec.run_rows for codec in codecs))
    return sum(rows * codec.row_work for codec in codecs)


def rows_for_chunks(entry: TensorEntry, exact: ExactRef, step: int) -> int:
    """Return how many rows are decoded to predict each chunk of an exact part by itself.

    Args:
        entry: the tensor's entry.
        exact: its exact part.
        step: rows of a run, which is decoded as a whole.
    """
    shared, columns, chunk = entry.delta_rows * entry.columns, entry.columns, exact.chunk
    # A table that lacks rows for chunks is refused when it is read.
    chunks = min(-(-shared // chunk), exact.data.length // ROW_BYTES)
    first = np.arange(chunks, dtype=np.int64) * chunk
    end = np.minimum(first + chunk, shared)
    stops = np.minimum(-(-end // (columns * step)) * step, entry.delta_rows)
    return int(np.sum(stops - first // (columns * step) * step))


class RunDecoder:
    """Decode the terms of one tensor in runs of rows; runs may be decoded in any order and by several threads."""

    def __init__(self, delta: DeltaFile, entry: TensorEntry) -> None:
        self._where = f'{delta.container.name}: tensors["{entry.name}"]'
        self._rows = entry.delta_rows
        self._terms = [(codec_of(entry, term), delta.term_views(entry, term)) for term in entry.terms]

    @property
    def step(self) -> int:
        """A number of rows; a run may start at any multiple of it, whatever the terms."""
        return max(codec.run_rows for codec, _ in self._terms)

    @property
    def width(self) -> int:
        """The number of elements in memory for each row that is decoded, at most."""
        return max(codec.width for codec, _ in self._terms)

    def ranges(self) -> list[tuple[int, int]]:
        """Return the runs of rows that together cover the tensor, as (start, stop)."""
        return row_ranges(0, self._rows, self.width, self.step)

    def rows(self, start: int, stop: int, *, check: bool = False) -> NDArray[np.float32]:
        """Return rows ``start`` to ``stop`` of the delta in float32.

        With ``check``, buffers that are not in canonical form are refused as well, for example set bits that no field
        uses.

        Raises:
            InvalidFileError: the buffers break the format.
        """
        total: NDArray[np.float32] | None = None
        for codec, packed in self._terms:
            try:
                dense = codec.decode(packed, start, stop, check_form=check)
            except InvalidFileError as error:
                raise self._located(error, start, stop) from error
            with np.errstate(over="ignore", invalid="ignore"):
                total = dense if total is None else total + dense
        assert total is not None
        return total

    def add(self, start: int, stop: int, base: Raw, base_dtype: str, dtype: str) -> Raw:
        """Return rows ``start`` to ``stop`` of the fine-tuned tensor, given those of the base.

        Args:
            start, stop: the rows; ``start`` is a multiple of :attr:`step`.
            base: these rows of the base, raw, shape (rows, columns).
            base_dtype, dtype: dtypes of the base and of the fine-tuned tensor: ``BF16``, ``F16`` or ``F32``.

        Raises:
            InvalidFileError: the buffers break the format.
        """
        if len(self._terms) > 1:
            return add(base, base_dtype, self.rows(start, stop), dtype)
        ((codec, packed),) = self._terms
        try:
            return codec.add(packed, start, stop, base, base_dtype, dtype)
        except InvalidFileError as error:
            raise self._located(error, start, stop) from error

    def matrices(self, start: int, stop: int) -> list[NDArray[np.float32]]:
        """Return rows ``start`` to ``stop`` of each term's matrix.

        Raises:
            InvalidFileError: the buffers break the format.
        """
        try:
            return [codec.decode(packed, start, stop) for codec, packed in self._terms]
        except InvalidFileError as error:
            raise self._located(error, start, stop) from error

    def marked(self, start: int, stop: int, columns: int) -> NDArray[np.bool_]:
        """Return which elements of rows ``start`` to ``stop`` are marked (spec, section 17.8).

        Raises:
            InvalidFileError: the buffers break the format.
        """
        marks = np.zeros((stop - start, columns), np.bool_)
        for codec, arrays in self._terms:
            try:
                entries = codec.marked(arrays, start, stop)
            except InvalidFileError as error:
                raise self._located(error, start, stop) from error
            if entries is not None:
                marks |= entries
        return marks

    def _located(self, error: InvalidFileError, start: int, stop: int) -> InvalidFileError:
        return InvalidFileError(f"{self._where}, rows {start} to {stop}: {error}")


def row_ranges(start: int, stop: int, width: int, step: int, elements: int = RUN_ELEMENTS) -> list[tuple[int, int]]:
    """Cut rows of ``width`` elements into ranges of about ``elements`` elements.

    The sizes of all ranges but the last are multiples of ``step``.
    """
    size = max(elements // max(width, 1) // step, 1) * step
    return [(first, min(first + size, stop)) for first in range(start, stop, size)]
