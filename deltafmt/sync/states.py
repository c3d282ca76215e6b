"""The state that a publisher has sent, and the delta files that lead to it (spec/deltafmt-v1.md, section 17)."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from deltafmt.checkpoint.fingerprint import hasher
from deltafmt.checkpoint.folder_writer import TensorSpec
from deltafmt.container.writer import ContainerWriter
from deltafmt.exact.coding import CHUNK_UNITS, EncodedChunk, advance_chunk, assemble, encode_chunk
from deltafmt.exact.scratch import scratch
from deltafmt.exact.units import Units, unit_of
from deltafmt.format.constants import FEATURE_EXACT, FEATURE_PARENT
from deltafmt.index.entries import BaseRef, TensorEntry
from deltafmt.pipeline.entry_writer import EntryWriter
from deltafmt.pipeline.exact_tensors import chunk_spans
from deltafmt.pipeline.workers import in_order, worker_pool
from deltafmt.sync.live import LiveTensor
from deltafmt.sync.message import Message, state_digest


@dataclass(slots=True)
class KeptTensor:
    """A tensor of the last state that was sent.

    Attributes:
        spec: its name, dtype and shape.
        units: a copy of its units.
        fingerprint: of these units.
        tied: the names that stand for the same tensor.
    """

    spec: TensorSpec
    units: Units
    fingerprint: bytes
    tied: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Work:
    """A tensor whose chunks are being encoded."""

    tensor: KeptTensor
    base: BaseRef | None
    chunks: list[Future[EncodedChunk]]


class KeptState:
    """A copy of the last state that was sent, in host memory.

    Args:
        live: the first state.
        level, threads: how chunks are encoded.
    """

    def __init__(self, live: Mapping[str, LiveTensor], level: str, threads: int) -> None:
        self._level, self._threads = level, threads
        self.tensors = {name: _kept(tensor) for name, tensor in live.items()}

    def digest(self) -> str:
        """Return the digest of the state, in hexadecimal."""
        names = ((name, kept.fingerprint) for kept in self.tensors.values() for name in (kept.spec.name, *kept.tied))
        return state_digest(names)

    @property
    def nbytes(self) -> int:
        """Bytes of the state."""
        return sum(kept.spec.nbytes for kept in self.tensors.values())

    def fits(self, live: Mapping[str, LiveTensor]) -> bool:
        """Tell whether a state has the same tensors, so that a patch can lead to it."""
        mine = {name: (kept.spec.dtype, kept.spec.shape, kept.tied) for name, kept in self.tensors.items()}
        return mine == {name: (tensor.dtype, tensor.shape, tensor.tied) for name, tensor in live.items()}

    def take(self, live: Mapping[str, LiveTensor]) -> None:
        """Take a new state that fits. If this fails, the copy is of no use: a part of it is new."""
        for name, kept in self.tensors.items():
            kept.units[:] = live[name].units()
            kept.fingerprint = _fingerprint(kept.spec, kept.units)

    def patch(self, live: Mapping[str, LiveTensor], version: int, before: str | None) -> Message:
        """Take a new state that fits, and return the patch that leads to it.

        If this fails, the copy is of no use: a part of it is new.

        Args:
            live: the new state.
            version: its version.
            before: the content id of the message before, in hexadecimal; None if there is none.
        """
        parent = self.digest()

        def encode(kept: KeptTensor, pool: ThreadPoolExecutor) -> _Work:
            spec = kept.spec
            base = BaseRef(kept.fingerprint, spec.dtype, spec.shape) if kept.units.size else None
            units = live[spec.name].units()
            return _Work(kept, base, self._submit(pool, kept, partial(self._advance, units)))

        return self._message(encode, version, parent, before)

    def anchor(self, version: int) -> Message:
        """Return the anchor that gives this state."""

        def encode(kept: KeptTensor, pool: ThreadPoolExecutor) -> _Work:
            return _Work(kept, None, self._submit(pool, kept, self._whole))

        return self._message(encode, version, None)

    def _submit(
        self, pool: ThreadPoolExecutor, kept: KeptTensor, job: Callable[[KeptTensor, int, int], EncodedChunk]
    ) -> list[Future[EncodedChunk]]:
        return [pool.submit(job, kept, first, end) for first, end in chunk_spans(kept.spec.dtype, kept.spec.shape)]

    def _advance(self, units: Units, kept: KeptTensor, first: int, end: int) -> EncodedChunk:
        """Encode a chunk of a new state, and keep it. What is encoded is a copy, which nobody can change meanwhile."""
        live = units[first:end]
        values = scratch("values", live.nbytes)[: live.nbytes].view(live.dtype)
        values[:] = live
        return advance_chunk(values, kept.units[first:end], unit_of(kept.spec.dtype), self._level)

    def _whole(self, kept: KeptTensor, first: int, end: int) -> EncodedChunk:
        values = kept.units[first:end]
        return encode_chunk(values, np.zeros_like(values), unit_of(kept.spec.dtype), self._level)

    def _message(
        self,
        encode: Callable[[KeptTensor, ThreadPoolExecutor], _Work],
        version: int,
        parent: str | None,
        before: str | None = None,
    ) -> Message:
        file = io.BytesIO()
        container = ContainerWriter(file, features=FEATURE_EXACT | (FEATURE_PARENT if before else 0))
        writer = EntryWriter(container)
        entries: list[TensorEntry] = []
        with worker_pool(self._threads, "sync") as pool:
            for kept, work in in_order(
                self.tensors.values(), lambda kept: encode(kept, pool), lambda kept: kept.spec.nbytes
            ):
                chunks = [future.result() for future in work.chunks]
                if parent is not None and any(chunk.data for chunk in chunks):
                    kept.fingerprint = _fingerprint(kept.spec, kept.units)
                pieces = assemble(chunks)
                entries.append(writer.exact(kept.spec, work.base, CHUNK_UNITS, pieces, kept.fingerprint))
                entries += (
                    writer.alias(TensorSpec(name, kept.spec.dtype, kept.spec.shape), kept.spec.name)
                    for name in kept.tied
                )
                container.boundary()
        message = Message(version, self.digest(), parent, b"")
        link = bytes.fromhex(before) if before else None
        identity = container.finish(entries, metadata=message.metadata, parent=link)
        return replace(message, data=file.getvalue(), content_id=identity.hex())


def _kept(live: LiveTensor) -> KeptTensor:
    spec = TensorSpec(live.name, live.dtype, live.shape)
    units = live.units()
    copied = units.copy() if live.is_direct else units
    return KeptTensor(spec, copied, _fingerprint(spec, copied), list(live.tied))


def _fingerprint(spec: TensorSpec, units: Units) -> bytes:
    digest = hasher(spec.dtype, spec.shape)
    digest.update(units.view(np.uint8).data)
    return digest.digest()


def fingerprints(live: Mapping[str, LiveTensor]) -> Iterator[tuple[str, bytes]]:
    """Give the fingerprint of every tensor of a state, under each of its names."""
    for tensor in live.values():
        digest = _fingerprint(TensorSpec(tensor.name, tensor.dtype, tensor.shape), tensor.units())
        for name in (tensor.name, *tensor.tied):
            yield name, digest
