"""Chains: delta files of which each was made on what the one before it gives (spec/deltafmt-v1.md, section 18).

A tensor is carried through all links as it is read, so what lies between two links is never a folder. At most two
states of a tensor are in memory at a time.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltafmt.checkpoint.dequantized import DequantizedTensor
from deltafmt.checkpoint.fingerprint import hasher
from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.checkpoint.renames import Renames
from deltafmt.checkpoint.safetensors_file import PagedTensor, SafetensorsFile, Tensor
from deltafmt.delta import DeltaFile, RunDecoder
from deltafmt.errors import UsageError, WrongBaseError
from deltafmt.format.choices import check_list
from deltafmt.format.limits import Limits
from deltafmt.index.entries import TensorEntry
from deltafmt.index.scaled import ScaledRef
from deltafmt.pipeline.bases import BaseSource, BaseTensors, open_base, short_id
from deltafmt.pipeline.chain_work import check_chain_work
from deltafmt.pipeline.digests import check_content_id, check_payload_digest
from deltafmt.pipeline.exact_tensors import ExactTensor
from deltafmt.terms.buffers import raw_bytes
from deltafmt.terms.floats import RAW_DTYPES


@dataclass(frozen=True, slots=True)
class LinkTensor(PagedTensor):
    """A tensor as a link of a chain gives it.

    Attributes:
        state: the state that it belongs to, which computes it when it is first read.
    """

    state: LinkState | None = None

    def will_need(self) -> None:
        """Ask the system to read ahead what the tensor is computed from. An error is ignored."""
        base = self._state().base_of(self.name)
        if base is not None:
            base.will_need()

    @contextlib.contextmanager
    def pages(self, start: int, length: int) -> Iterator[memoryview]:
        """Give a view of some bytes."""
        yield self._state().data(self.name).data[start : start + length].toreadonly()

    def fingerprint(self) -> bytes:
        """Return the BLAKE3 of dtype, shape and bytes."""
        digest = hasher(self.dtype, self.shape)
        digest.update(self._state().data(self.name).data)
        return digest.digest()

    def forget(self) -> None:
        """Give the tensor's memory back; it is computed again if it is read again."""
        self._state().drop(self.name)

    def _state(self) -> LinkState:
        assert self.state is not None
        return self.state


class LinkState:
    """What a link of a chain gives: a :class:`deltafmt.pipeline.bases.BaseSource` for the link behind it.

    Args:
        delta: the link.
        entries: its entries.
        base: what it is applied to.
        file: any weight file, which stands for the files that these tensors do not lie in.
    """

    def __init__(
        self, delta: DeltaFile, entries: Sequence[TensorEntry], base: BaseTensors, file: SafetensorsFile
    ) -> None:
        self.delta = delta
        self.base = base
        self.path = f"what {delta.container.name} gives"
        self.tensors: Mapping[str, Tensor] = {
            entry.name: LinkTensor(entry.name, entry.dtype, entry.shape, file, 0, entry.nbytes, state=self)
            for entry in entries
        }
        self._held: dict[str, NDArray[np.uint8]] = {}
        self._locks: dict[str, threading.Lock] = {entry.name: threading.Lock() for entry in entries}

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def config(self) -> dict[str, Any]:
        """Return the configuration of the model behind the chain, or an empty map."""
        return self.base.checkpoint.config()

    def check_unchanged(self) -> None:
        """Check that the model behind the chain, and all links up to this one, are those that were opened."""
        self.delta.container.check_unchanged()
        self.base.checkpoint.check_unchanged()

    def read_described(self, scaled: Mapping[str, ScaledRef]) -> None:
        """Read the 8-bit floats that the next link describes as values.

        Raises:
            WrongBaseError: this link does not give them so.
        """
        found = {name: DequantizedTensor.recorded(name, ref, self.tensors) for name, ref in scaled.items()}
        for name, tensor in found.items():
            if tensor is None:
                raise WrongBaseError(f'wrong base {self.path}: it has no 8-bit floats "{name}" with their scales')
        self.tensors = {**self.tensors, **{name: tensor for name, tensor in found.items() if tensor is not None}}

    def base_of(self, name: str) -> Tensor | None:
        """Return what the link computes a tensor from, or None."""
        return self.base.find(self.delta.resolve(name))

    def data(self, name: str) -> NDArray[np.uint8]:
        """Return the bytes of a tensor.

        Raises:
            InvalidFileError: the link breaks the format.
            WrongBaseError: the state before the link is not the one that it was made on.
        """
        with self._locks[name]:
            found = self._held.get(name)
            if found is None:
                found = self._held[name] = self._compute(name)
            return found

    def drop(self, name: str) -> None:
        """Give the memory of a tensor back."""
        with self._locks[name]:
            self._held.pop(name, None)

    def _compute(self, name: str) -> NDArray[np.uint8]:
        delta = self.delta
        entry = delta.resolve(name)
        base = self.base.find(entry)
        try:
            if base is not None and entry.base is not None and base.fingerprint() != entry.base.digest:
                raise self.base.differs(entry.name)
            check_payload_digest(delta, entry)
            out = np.empty(entry.nbytes, np.uint8)
            _fill(out, delta, entry, base)
        finally:
            if base is not None:
                base.forget()
        delta.container.release(entry)
        return out


def _fill(out: NDArray[np.uint8], delta: DeltaFile, entry: TensorEntry, base: Tensor | None) -> None:
    """Write the bytes of a tensor that an entry gives on its base."""
    if entry.exact is not None:
        exact = ExactTensor(delta, entry, base)
        for number in range(len(exact)):
            _put(out, *exact.restore(number))
        return
    if entry.terms and base is not None:
        decoder = RunDecoder(delta, entry)
        row_bytes = entry.columns * RAW_DTYPES[entry.dtype].itemsize
        for start, stop in decoder.ranges():
            with base.row_range(start, stop) as rows:
                _put(out, start * row_bytes, decoder.add(start, stop, rows, base.dtype, entry.dtype))
    elif base is not None:
        _put_pieces(out, 0, base.pieces())
    if entry.data is not None:
        _put_pieces(out, entry.nbytes - entry.data.length, delta.container.pieces(entry.data))


def _put(out: NDArray[np.uint8], offset: int, array: NDArray[Any]) -> None:
    data = np.frombuffer(raw_bytes(array), np.uint8)
    out[offset : offset + data.size] = data


def _put_pieces(out: NDArray[np.uint8], offset: int, pieces: Iterator[memoryview]) -> None:
    for piece in pieces:
        out[offset : offset + len(piece)] = np.frombuffer(piece, np.uint8)
        offset += len(piece)


@dataclass(frozen=True, slots=True)
class Chain:
    """An open chain, whose links are known to follow one another.

    Attributes:
        model: what the first link is applied to.
        deltas: the links in their order.
        entries: the entries of each link.
        bases: the base of each link.
    """

    model: Checkpoint
    deltas: list[DeltaFile]
    entries: list[list[TensorEntry]]
    bases: list[BaseTensors]

    def result(self) -> LinkState:
        """Return what the last link gives."""
        file = next(iter(self.model.tensors.values())).file
        return LinkState(self.deltas[-1], self.entries[-1], self.bases[-1], file)


@contextlib.contextmanager
def open_links(paths: Sequence[str | os.PathLike[str]], limits: Limits) -> Iterator[list[DeltaFile]]:
    """Open the delta files of a chain, and check that each is the parent of the next.

    Raises:
        UsageError: there are none, or one stands twice.
        InvalidFileError: a file is not valid.
        WrongBaseError: names the link that is missing, or stands in another place.
        StorageError: reading failed.
    """
    check_list("delta files", paths)
    if not paths:
        raise UsageError("no delta file is given")
    with contextlib.ExitStack() as stack:
        deltas = [stack.enter_context(DeltaFile(path, limits=limits)) for path in paths]
        for delta in deltas:
            check_content_id(delta.container, delta.container.entries())
        check_links(deltas)
        yield deltas


def check_links(deltas: Sequence[DeltaFile]) -> None:
    """Check that each delta file is the parent of the next. Their content ids must be known to be right.

    Raises:
        UsageError: a delta stands twice.
        WrongBaseError: names the link that is missing, or stands in another place.
    """
    names = dict[bytes, str]()
    for delta in deltas:
        name, identity = delta.container.name, delta.container.content_id
        if identity in names:
            raise UsageError(f"a delta stands twice in the chain: {names[identity]} and {name}")
        names[identity] = name
    for before, delta in itertools.pairwise(deltas):
        name, parent = delta.container.name, delta.container.parent
        if parent is None:
            raise WrongBaseError(
                f"{name} has no parent: it was made on a base, and not on what {before.container.name} gives"
            )
        if parent == before.container.content_id:
            continue
        if parent in names:
            raise WrongBaseError(
                f"wrong order: {name} was made on what {names[parent]} gives, and stands behind {before.container.name}"
            )
        raise WrongBaseError(
            f"a link is missing before {name}: it was made on what the delta {short_id(parent)} gives, and "
            f"{before.container.name} is the delta {short_id(before.container.content_id)}; name all links, or squash "
            "this one together with those before it"
        )


@contextlib.contextmanager
def open_chain(
    model: str | os.PathLike[str], deltas: Sequence[DeltaFile], renames: Renames | None = None
) -> Iterator[Chain]:
    """Open a model under the links of a chain.

    Args:
        model: a checkpoint folder or a ``.safetensors`` file, which the first link is applied to.
        deltas: the links, which are known to follow one another.
        renames: what the names that the first link records are in the model.

    Raises:
        InvalidFileError: a file is not valid, or asks for more than its limits.
        WrongBaseError: a tensor of a base is missing, or has another dtype or shape; no bytes were compared yet.
        StorageError: reading failed.
    """
    with open_base(model, deltas[0].container) as checkpoint:
        source: BaseSource = checkpoint
        file = next(iter(checkpoint.tensors.values())).file
        chain = Chain(checkpoint, list(deltas), [], [])
        for number, delta in enumerate(deltas):
            container = delta.container
            entries = list(container.entries())
            if isinstance(source, LinkState):
                source.read_described(container.scaled())
            # Names between two links are the files' own; only the model may have others.
            base = BaseTensors(source, entries, container, None if number else renames)
            total = sum(entry.nbytes for entry in entries)
            container.limits.check_output(total, container.size, source.nbytes, f"{container.name}: applying gives")
            delta.check_work((delta.resolve(entry.name) for entry in entries), source.nbytes, restores=True)
            chain.entries.append(entries)
            chain.bases.append(base)
            if number + 1 < len(deltas):
                source = LinkState(delta, entries, base, file)
        check_chain_work(chain.deltas, chain.entries, checkpoint.nbytes)
        yield chain
