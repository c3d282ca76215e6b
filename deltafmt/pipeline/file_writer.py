"""One delta file from one job: tensors are compressed, written and recorded in order, then attachments and index."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from deltafmt.checkpoint.folder_errors import is_adapter_file
from deltafmt.checkpoint.name_changes import entry_changes
from deltafmt.checkpoint.restored import read_heads
from deltafmt.container.partial import PartialFile
from deltafmt.container.stream import StreamFile
from deltafmt.container.writer import About, ContainerWriter
from deltafmt.delta import DeltaFile
from deltafmt.errors import InvalidFileError, UsageError
from deltafmt.format import constants as c
from deltafmt.format.limits import Limits
from deltafmt.index.entries import TensorEntry
from deltafmt.index.exact import ExactRef, FileRef
from deltafmt.index.sections import BufferRef
from deltafmt.output import storage_error
from deltafmt.pipeline.compress import Compressed, Compressor
from deltafmt.pipeline.entry_writer import EntryWriter
from deltafmt.pipeline.exact_packing import exact_parts
from deltafmt.pipeline.file_hashes import FileHashes
from deltafmt.pipeline.job import Delivery, PackJob
from deltafmt.pipeline.outputs import kept_if_interrupted
from deltafmt.pipeline.pack_result import PackResult
from deltafmt.pipeline.plan import NO_SMALLER, Plan
from deltafmt.pipeline.quantized_pairs import scaled_refs
from deltafmt.pipeline.read_as_values import dequantized
from deltafmt.pipeline.workers import Progress, worker_pool

# With so many columns or fewer, keeping under half of a row at random is likely to cost accuracy (docs/benchmarks.md).
NARROW_COLUMNS = 256

# A served part that is read back asks for what its own pack has taken.
UNLIMITED = Limits(2**62, 2**62, 2**62)


def write_file(job: PackJob, delivery: Delivery, most: int | None = None) -> PackResult:
    """Write a job's file, or go on with what an interrupted run of the same job has written.

    Args:
        job: what is packed.
        delivery: where the file goes.
        most: the bytes that the file may have. A larger file is removed again; the result says its size.

    Raises:
        UsageError: a stream has already taken more than ``most`` bytes.
        KeyboardInterrupt: says whether the next run can go on.
    """
    writer = FileWriter.open(job, delivery)
    sink, result = writer.sink, writer.result
    with kept_if_interrupted(sink.keep, sink.abandon):
        writer.run(delivery.threads, delivery.progress, most=most)
        writer.check_sources()
        if most is not None and result.target_size > most:
            if delivery.path is None:
                raise UsageError(f"the output has {result.size:,} bytes, and the target was {most:,}")
            sink.abandon()
        else:
            sink.commit()
    return result


def _check_adapter(job: PackJob, result: PackResult) -> None:
    """Refuse a fine-tune whose weights are the base's, and that lies in an adapter beside them: it would be lost.

    Raises:
        InvalidFileError: the adapter is not merged.
    """
    beside = [name for name in (*result.left_out, *result.attached) if is_adapter_file(name)]
    if beside and not result.actions.keys() & {"add", "replace"}:
        raise InvalidFileError(
            f"{job.finetuned.path}: its weights are the base's, and the adapter beside them ({beside[0]}) is not "
            "merged; merge it, or make the delta file with import-lora"
        )


def write_tensors(job: PackJob, path: Path, threads: int) -> None:
    """Write a file of a job's tensors alone, without attachments.

    Raises:
        StorageError: writing failed.
    """
    try:
        with open(path, "wb") as file:
            sink = StreamFile(file)
            FileWriter(job, sink, PackResult(path)).run(threads, None, attach=False)
            sink.commit()
    except OSError as error:
        raise storage_error("cannot write", path, error) from error


class FileWriter:
    """One run of writing a file: :meth:`take` every tensor that is still to be packed, then :meth:`finish`.

    Attributes:
        sink: takes the bytes. Whoever made the writer keeps, abandons or commits it.
        result: what the run reports.
        todo: the plans of the tensors that no earlier run has packed, in the order of the file.
        files: take the digests of the fine-tune's weight files from the work on tensors.
    """

    def __init__(self, job: PackJob, sink: PartialFile | StreamFile, result: PackResult) -> None:
        self.sink = sink
        self.result = result
        self._job = job
        self._container = ContainerWriter(sink, job.profile, sink.sections, job.features())
        self._writer = EntryWriter(self._container)
        self._recorded = len(sink.sections)
        layouts = tuple(sink.layouts)
        for layout in layouts:
            self._container.layout_number(layout)
        self._entries = {name: TensorEntry.from_obj(name, obj, layouts) for name, obj in sink.entries.items()}
        self._unrecorded: dict[str, Any] = {}
        result.resumed = len(self._entries)
        self.todo = [plan for plan in job.plans if plan.tensor.name not in self._entries]
        self.files = FileHashes(job, self.todo)

    @classmethod
    def open(cls, job: PackJob, delivery: Delivery) -> Self:
        """Begin a job's file, or go on with what an interrupted run of the same job has written."""
        finetuned, path = job.finetuned, delivery.path
        sink: PartialFile | StreamFile
        if isinstance(delivery.out, Path):
            sink = PartialFile(delivery.out, job.digest(), force=delivery.force, features=job.features())
        else:
            sink = StreamFile(delivery.out)
        result = PackResult(
            path,
            finetuned_bytes=finetuned.file_bytes,
            removed=job.removed(),
            taken=list(job.completeness.taken),
            unlisted=dict(finetuned.unlisted),
            attached=list(finetuned.files),
            left_out=dict(finetuned.left_out),
            remarks=job.remarks(),
        )
        return cls(job, sink, result)

    def run(self, threads: int, progress: Progress | None, *, attach: bool = True, most: int | None = None) -> None:
        """Pack every tensor, then :meth:`finish`."""
        with worker_pool(threads, "pack") as pool:
            for plan, compressed in Compressor(self._job, pool, self.files).results(self.todo):
                self.take(plan, compressed)
                if progress:
                    progress(plan.tensor.name, plan.tensor.nbytes)
        self.finish(threads, progress, attach=attach, most=most)

    def take(self, plan: Plan, compressed: Compressed) -> None:
        """Write one tensor; they come in the order of ``todo``."""
        self._add(self._entry(plan, compressed))
        if compressed.notes:
            self.result.notes[plan.tensor.name] = "; ".join(compressed.notes)

    def finish(
        self, threads: int, progress: Progress | None = None, *, attach: bool = True, most: int | None = None
    ) -> None:
        """Write what follows the tensors: the attachments if they are wanted, and the index.

        Of a progressive file, this ends the served part. Exact parts follow, unless it has more than ``most`` bytes.
        """
        job, container = self._job, self._container
        files = job.finetuned.files if attach else {}
        scaled, metadata = scaled_refs(job.scaled(), threads), job.metadata()
        self.result.dequantized = dequantized(scaled, metadata)
        about = About(removed=self.result.removed, metadata=metadata, scaled=scaled or None, parent=job.parent)
        if job.progressive and attach and isinstance(self.sink, PartialFile):
            self._serve(self.sink, about)
            if most is not None and self.result.served > most:
                return
            self._add_exact_parts(self.sink, threads, progress)
        else:
            about["attachments"] = {name: container.attach(job.finetuned.attachment(name)) for name in files}
        about["files"] = self._files() if attach and job.restores else None
        self._report(container.finish(self._entries.values(), **about))

    def _serve(self, sink: PartialFile, about: About) -> None:
        """End the served part, unless an interrupted run has done so; note it, and complete what the index says."""
        container, result = self._container, self.result
        if container.sections and container.sections[-1].kind == c.SECTION_KIND_SERVED:
            with DeltaFile(sink.partial, limits=UNLIMITED) as served:
                about["attachments"] = served.container.attachments
                identity = served.container.content_id
        else:
            finetuned = self._job.finetuned
            about["attachments"] = {name: container.attach(finetuned.attachment(name)) for name in finetuned.files}
            identity = container.serve(self._entries.values(), **about)
            self._record()
        last = container.sections[-1]
        result.served, result.served_id = last.offset + last.length, identity.hex()

    def _add_exact_parts(self, sink: PartialFile, threads: int, progress: Progress | None) -> None:
        """Write the exact part of every tensor with terms; the terms are read from the served part."""
        plans = [plan for plan in self._job.plans if self._entries[plan.tensor.name].terms]
        with DeltaFile(sink.partial, limits=UNLIMITED) as served:
            for entry, exact in exact_parts(served, plans, threads):
                ref = ExactRef(exact.chunk, BufferRef(0, 0, 0), exact.digest, exact.factors)
                self._entries[entry.name] = self._writer.with_exact(entry, ref, exact.pieces)
                self._container.boundary()
                if progress:
                    progress(entry.name, entry.nbytes)

    def check_sources(self) -> None:
        """Check that the sources are what they were, and that nothing of the fine-tune is lost.

        Raises:
            StorageError: a weight file has changed.
            InvalidFileError: an adapter beside the fine-tune's weights is not merged.
        """
        for source in (self._job.base, self._job.finetuned):
            source.check_unchanged()
        _check_adapter(self._job, self.result)

    def _files(self) -> dict[str, FileRef]:
        """Write the heads of the fine-tune's weight files, and return the files' rows of the index."""
        files = {}
        for name, file in read_heads(self._job.finetuned).items():
            head = self._container.add(file.head, c.SECTION_KIND_ATTACHMENTS)
            files[name] = FileRef(self.files.digest(file), head)
        self.result.restored = list(files)
        return files

    def _entry(self, plan: Plan, compressed: Compressed) -> TensorEntry:
        """Write one tensor's buffers and return its entry."""
        tensor, base = plan.tensor, compressed.base
        if plan.alias is not None:
            return self._writer.alias(tensor, plan.alias)
        exact = compressed.exact
        if exact is not None:
            return self._writer.exact(tensor, base, exact.chunk, exact.pieces, exact.digest)
        if base is None:
            return self._writer.replace(tensor, tensor.pieces())
        if not compressed.terms:
            return self._writer.same(tensor, base)
        base_bytes = c.byte_count(tensor.dtype, base.shape)
        new_rows = tensor.pieces(base_bytes) if tensor.nbytes > base_bytes else None
        return self._writer.add(tensor, base, compressed.terms, new_rows, leading=tensor.leading)

    def _add(self, entry: TensorEntry) -> None:
        """Take an entry; once its section is complete, record what a later run needs to go on behind it."""
        self._entries[entry.name] = entry
        self._unrecorded[entry.name] = entry.to_obj()
        if self._container.boundary():
            self._record()

    def _record(self) -> None:
        """Record the sections that are complete, and the entries of their tensors."""
        container = self._container
        self.sink.record(container.sections[self._recorded :], container.layouts, self._unrecorded)
        self._unrecorded, self._recorded = {}, len(container.sections)

    def _report(self, identity: bytes) -> None:
        """Fill in what is known once the file is complete."""
        result, moments = self.result, self._job.moments
        for plan in self._job.plans:
            entry = self._entries[plan.tensor.name]
            result.actions[entry.action] = result.actions.get(entry.action, 0) + 1
            if entry.action == "replace" and len(entry.shape) > 1:
                result.kept[entry.name] = plan.reason or NO_SMALLER
            if entry.columns <= NARROW_COLUMNS and plan.method is not None and plan.method.at_random:
                result.narrow += any(term.layout.drops_most for term in entry.terms)
        result.names = entry_changes(self._entries.values())
        result.unmatched, result.unmatched_base = list(self._job.pairing.left), list(self._job.pairing.free)
        result.architecture = self._job.pairing.architecture
        result.base_name = self._job.base_name
        if moments is not None:
            result.calibration_tokens, result.sequential = moments.tokens, moments.sequential
            added = (name for name, entry in self._entries.items() if entry.action == "add")
            result.uncalibrated = [name for name in added if moments.lacks(name)]
        result.size = self._container.position
        result.content_id = identity.hex()
