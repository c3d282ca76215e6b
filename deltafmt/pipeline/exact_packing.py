"""The exact parts of a progressive file, packed from the served part as it was written (specification, 17.8)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from deltafmt.checkpoint.safetensors_file import Tensor
from deltafmt.delta import DeltaFile
from deltafmt.exact.coding import EncodedChunk, assemble, encode_chunk
from deltafmt.exact.prediction import units_at
from deltafmt.exact.units import unit_of
from deltafmt.index.entries import TensorEntry
from deltafmt.pipeline.exact_parts import ExactPart, chunk_units, measured_factors
from deltafmt.pipeline.exact_tensors import ExactBytes, chunk_spans
from deltafmt.pipeline.plan import Plan
from deltafmt.pipeline.workers import in_order, worker_pool


@dataclass(frozen=True, slots=True)
class _Work:
    """The work on one tensor.

    Attributes:
        entry: its entry in the served part.
        chunk: units of a chunk.
        digest: of the fine-tuned tensor.
        part: the prediction, and the factors that it was made with.
        chunks: the encoded chunks.
    """

    entry: TensorEntry
    chunk: int
    digest: Future[bytes]
    part: Future[tuple[ExactPart, tuple[int, ...]]]
    chunks: list[Future[EncodedChunk]]

    def result(self) -> ExactBytes:
        """Wait for the parts of the work."""
        pieces = assemble([chunk.result() for chunk in self.chunks])
        return ExactBytes(pieces, self.digest.result(), self.chunk, self.part.result()[1])


def exact_parts(served: DeltaFile, plans: Sequence[Plan], threads: int) -> Iterator[tuple[TensorEntry, ExactBytes]]:
    """Give the exact part of every tensor with terms, in order, with the tensor's entry.

    Args:
        served: the served part.
        plans: the plans of tensors that have terms there; plans know the checkpoints' tensors.
        threads: worker threads.
    """
    with worker_pool(threads, "exact") as pool:

        def submit(plan: Plan) -> _Work:
            tensor, base = plan.tensor, plan.base
            assert base is not None
            entry = served[tensor.name]
            tensor.will_need()
            base.will_need()
            chunk = chunk_units(served, entry)
            # Chunks wait for the part. It was submitted before them, so a thread is at work on it by then.
            part = pool.submit(_part, served, entry, tensor, base)
            spans = chunk_spans(tensor.dtype, tensor.shape, chunk)
            chunks = [pool.submit(_encoded, tensor, part, first, end) for first, end in spans]
            return _Work(entry, chunk, pool.submit(tensor.fingerprint), part, chunks)

        for _, work in in_order(plans, submit, lambda plan: plan.tensor.nbytes):
            yield work.entry, work.result()
            served.container.release(work.entry)


def _part(served: DeltaFile, entry: TensorEntry, tensor: Tensor, base: Tensor) -> tuple[ExactPart, tuple[int, ...]]:
    """Return the prediction of a tensor, and its factors."""
    factors = measured_factors(served, entry, tensor, base)
    return ExactPart(served, entry, base, factors), factors


def _encoded(tensor: Tensor, part: Future[tuple[ExactPart, tuple[int, ...]]], first: int, end: int) -> EncodedChunk:
    """Encode some units of a tensor."""
    unit = unit_of(tensor.dtype)
    prediction, marks = part.result()[0].predicted(first, end)
    with tensor.pages(first * unit.width, (end - first) * unit.width) as view:
        return encode_chunk(units_at(view, tensor.dtype), prediction, unit, marks=marks)
