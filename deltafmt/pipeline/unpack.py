"""``deltafmt.unpack``: base and delta file to a checkpoint folder, streamed and in bounded memory.

The folder appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from deltafmt import core
from deltafmt.checkpoint.fingerprint import hasher
from deltafmt.checkpoint.folder import Checkpoint, natural_key
from deltafmt.checkpoint.folder_writer import DEFAULT_SHARD_BYTES, CheckpointWriter, TensorSpec, check_output_folder
from deltafmt.checkpoint.in_place import PatchedFolder
from deltafmt.checkpoint.name_changes import NameChange
from deltafmt.checkpoint.renames import Renames
from deltafmt.checkpoint.restored import FolderRestorer
from deltafmt.checkpoint.safetensors_file import Tensor
from deltafmt.checkpoint.weight_names import WeightNames
from deltafmt.delta import BATCH_ELEMENTS, DeltaFile, RunDecoder, row_ranges
from deltafmt.errors import InvalidFileError, UsageError, WrongBaseError
from deltafmt.format.choices import check_choice
from deltafmt.format.limits import DEFAULT_LIMITS, Limits
from deltafmt.index.entries import BaseRef, TensorEntry
from deltafmt.index.exact import ExactRef
from deltafmt.pipeline.attached_code import CODE, chosen_files, code_of
from deltafmt.pipeline.bases import BaseTensors, compare_bases, open_base, short_id
from deltafmt.pipeline.chunk_hashes import ChunkHashes
from deltafmt.pipeline.digests import check_content_id, check_payload_digest
from deltafmt.pipeline.exact_tensors import ExactTensor
from deltafmt.pipeline.outputs import refuse_input_folder
from deltafmt.pipeline.read_as_values import Dequantized, dequantized
from deltafmt.pipeline.workers import Progress, in_order, thread_count, worker_pool
from deltafmt.terms.buffers import raw_bytes
from deltafmt.terms.floats import RAW_DTYPES


@dataclass(slots=True)
class UnpackResult:
    """What an unpack did.

    Attributes:
        path: the folder.
        tensors: number of tensors written.
        nbytes: bytes of the tensors written.
        files: names of the attached files that were written.
        code: names of the attached files of Python code, whether they were written or left out.
        removed: names of tensors that only the base has; the folder lacks them.
        mismatched: names of base tensors that differ from those packed against; only ``force_base`` allows any.
        names: what differs between the names that the file records for its base and those of this base.
        dequantized: how many tensors of either side were 8-bit floats that were read as the values that they mean.
        restored: names of the weight files and indexes that are, byte for byte, those that were packed.
    """

    path: Path
    tensors: int = 0
    nbytes: int = 0
    files: list[str] = field(default_factory=list)
    code: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    names: list[NameChange] = field(default_factory=list)
    dequantized: Dequantized = field(default_factory=Dequantized)
    restored: list[str] = field(default_factory=list)


def unpack(
    base: str | os.PathLike[str],
    delta: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    force_base: bool = False,
    code: str | None = None,
    rename: Sequence[str] = (),
    strip_prefix: Sequence[str] = (),
    max_shard_bytes: int | None = None,
    threads: int | None = None,
    limits: Limits = DEFAULT_LIMITS,
    progress: Progress | None = None,
) -> UnpackResult:
    """Apply a delta to its base and write the fine-tuned checkpoint as a folder.

    Args:
        base: a checkpoint folder or a ``.safetensors`` file; the number of its shards does not matter.
        delta: the delta file.
        out: the folder to make.
        force: True to replace ``out`` if it is a checkpoint folder that exists.
        force_base: True to go on if the base's bytes differ from those packed against. The output's metadata then
            names the tensors that differ.
        code: what is done with attached files of Python code: ``write`` writes them, ``leave`` leaves them out. Without
            it they are written, but a delta is refused if one has the name of a module that this Python has: a Python
            that runs in the folder would take the file for it.
        rename: rules FROM=TO that say what a name that the file records is in this base. FROM is how the name begins,
            or a pattern with ``*``. Bases whose names differ in a known way are recognized without rules.
        strip_prefix: beginnings of names that do not count, on either side.
        max_shard_bytes: bytes of tensors in one shard of the output. If not given, files that the delta restores byte
            for byte are restored, and a shard of other files has 5 GB.
        threads: worker threads; one for each processor if not given.
        limits: how much memory, work and output the file may ask for.
        progress: called with a tensor's name and bytes as each is done.

    Raises:
        UsageError: the output exists or is an input, or the delta holds code that could be taken for a module.
        InvalidFileError: the delta, or the base, is not valid.
        WrongBaseError: names the first tensor of the base that differs.
        StorageError: reading or writing failed.
    """
    core.warn_if_missing()
    path = Path(out)
    if code is not None:
        check_choice("code", code, CODE)
    if max_shard_bytes is not None and max_shard_bytes < 1:
        raise UsageError(f"a shard of {max_shard_bytes} bytes holds nothing")
    renames = Renames.parse(rename, strip_prefix)
    check_output_folder(path, force=force)
    refuse_input_folder(path, [base, delta])
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(DeltaFile(delta, limits=limits))
        if opened.container.parent is not None:
            raise UsageError(
                f"{opened.container.name} was made on what the delta {short_id(opened.container.parent)} gives; apply "
                "writes what a chain of deltas gives"
            )
        checkpoint = stack.enter_context(open_base(base, opened.container))
        entries = sorted(opened.container.entries(), key=lambda entry: natural_key(entry.name))
        # ``force_base`` allows other bytes, but no other dtypes and shapes.
        found = BaseTensors(checkpoint, entries, opened.container, renames)
        total = sum(entry.nbytes for entry in entries)
        limits.check_output(
            total, opened.container.size, checkpoint.nbytes, f"{opened.container.name}: unpacking gives"
        )
        opened.check_work((opened.resolve(entry.name) for entry in entries), checkpoint.nbytes, restores=True)
        result = UnpackResult(path, removed=list(opened.container.removed), names=found.changes)
        result.dequantized = dequantized(opened.container.scaled(), opened.metadata)
        check_content_id(opened.container, entries)
        result.files, result.code = chosen_files(opened.container, code), code_of(opened.container)
        unpacker = Unpacker(
            opened, found, entries, result, force=force, threads=thread_count(threads), progress=progress
        )
        return unpacker.run(force_base=force_base, max_shard_bytes=max_shard_bytes)


@dataclass(slots=True)
class _Pending:
    """The work on one tensor that has been submitted."""

    fingerprint: Future[bytes] | None = None
    hashes: ChunkHashes | None = None
    digest: Future[None] | None = None
    parts: list[Future[None]] = field(default_factory=list)


class Unpacker:
    """One run of unpack, or of the last link of a chain."""

    def __init__(
        self,
        delta: DeltaFile,
        base: BaseTensors,
        entries: list[TensorEntry],
        result: UnpackResult,
        *,
        force: bool = False,
        patched: PatchedFolder | None = None,
        threads: int = 1,
        progress: Progress | None = None,
    ) -> None:
        self._delta = delta
        self._base = base
        self._entries = entries
        self._result = result
        self._force = force
        self._patched = patched
        self._threads = threads
        self._progress = progress

    def run(self, *, force_base: bool = False, max_shard_bytes: int | None = None) -> UnpackResult:
        """Write every tensor, then the attached files, and put the folder in its place."""
        prefix = "safetensors."
        own = self._delta.metadata
        metadata = {key.removeprefix(prefix): value for key, value in own.items() if key.startswith(prefix)}
        if force_base:
            compared = compare_bases(self._base, self._entries, self._threads)
            self._result.mismatched = [name for name, equal in compared if not equal]
            exact = {entry.name for entry in self._entries if entry.exact is not None}
            other = next((name for name in self._result.mismatched if name in exact), None)
            if other is not None:
                raise WrongBaseError(f'{self._base.differs(other)}; "{other}" is exact, and no other base restores it')
            if self._result.mismatched:
                metadata["deltafmt.forced_base"] = ",".join(self._result.mismatched)[:4096]
        metadata["deltafmt.content_id"] = self._delta.content_id
        specs = [TensorSpec(entry.name, entry.dtype, entry.shape) for entry in self._entries]
        writer: CheckpointWriter
        restores = self._delta.container.files and max_shard_bytes is None and not self._result.mismatched
        if restores:
            writer = restorer = self._restorer(specs)
            # Files are hashed as they are written, which is from their beginning on.
            self._entries = sorted(self._entries, key=lambda entry: restorer.order(entry.name))
        else:
            writer = CheckpointWriter(
                self._result.path,
                specs,
                metadata=metadata,
                max_shard_bytes=DEFAULT_SHARD_BYTES if max_shard_bytes is None else max_shard_bytes,
                names=WeightNames.from_metadata(own, self._delta.container.name),
                force=self._force,
                patched=self._patched,
            )
        try:
            self._write(writer, not force_base)
            if isinstance(writer, FolderRestorer):
                self._check_restored(writer)
            for name in self._result.files:
                writer.add_file(name, self._delta.attachment(name))
            self._base.checkpoint.check_unchanged()
            self._delta.container.check_unchanged()
            beside = writer.keep_others()
            if beside is not None:
                check_read(self._result.path, beside, writer.weights)
            writer.commit()
        except BaseException:
            writer.abandon()
            raise
        return self._result

    def _restorer(self, specs: list[TensorSpec]) -> FolderRestorer:
        """Return the writer of the files that the delta restores byte for byte."""
        container = self._delta.container
        heads = {name: bytes(container.buffer(file.head)) for name, file in container.files.items()}
        try:
            return FolderRestorer(self._result.path, specs, heads, force=self._force, patched=self._patched)
        except InvalidFileError as error:
            raise error.located(container.name) from error

    def _check_restored(self, writer: FolderRestorer) -> None:
        """Compare every restored file with the one that was packed."""
        container = self._delta.container
        for name, file in container.files.items():
            if writer.restored_digest(name) != file.digest:
                raise InvalidFileError(f'{container.name}: files["{name}"]: what is restored is not what was packed')
            self._result.restored.append(name)

    def _write(self, writer: CheckpointWriter, check_base: bool) -> None:
        with worker_pool(self._threads, "unpack") as pool:
            for entry, pending in in_order(
                self._entries, lambda entry: self._submit(pool, writer, entry, check_base), lambda entry: entry.nbytes
            ):
                # Another base is said to be one, before its chunks are said to be wrong.
                if pending.fingerprint is not None:
                    self._check_base(entry, entry.base, pending.fingerprint.result())
                if pending.hashes is not None:
                    wait(pending.parts)
                    if not pending.hashes.failed:
                        self._check_base(entry, entry.base, pending.hashes.digest())
                if pending.digest is not None:
                    pending.digest.result()
                for part in pending.parts:
                    part.result()
                # The digests of files that are restored cover all of their tensors.
                if entry.exact is not None and not isinstance(writer, FolderRestorer):
                    self._check_exact(writer, entry, entry.exact)
                source = self._delta.resolve(entry.name)
                base = self._base.find(source)
                if base is not None:
                    base.forget()
                self._delta.container.release(source)
                self._result.tensors += 1
                self._result.nbytes += entry.nbytes
                if self._progress:
                    self._progress(entry.name, entry.nbytes)

    def _check_exact(self, writer: CheckpointWriter, entry: TensorEntry, exact: ExactRef) -> None:
        """Compare what was written of an exact tensor with its digest."""
        digest = hasher(entry.dtype, entry.shape)
        for piece in writer.pieces(entry.name, entry.nbytes):
            digest.update(piece)
        if digest.digest() != exact.digest:
            where = f'{self._delta.container.name}: tensors["{entry.name}"]'
            raise InvalidFileError(f"{where}: what is restored is not what was packed")

    def _check_base(self, entry: TensorEntry, base: BaseRef | None, digest: bytes) -> None:
        if base is not None and digest != base.digest:
            raise self._base.differs(entry.name)

    def _submit(
        self, pool: ThreadPoolExecutor, writer: CheckpointWriter, entry: TensorEntry, check_base: bool
    ) -> _Pending:
        """Start the work on one tensor."""
        pending = _Pending()
        source = self._delta.resolve(entry.name)
        # An alias is its target's base plus its target's terms.
        tensor = self._base.find(source)
        if entry.digest is not None:
            pending.digest = pool.submit(check_payload_digest, self._delta, entry)
        if tensor is not None:
            tensor.will_need()
        is_checked = tensor is not None and check_base and entry.target is None
        exact = None if source.exact is None else ExactTensor(self._delta, source, tensor)
        if exact is not None and is_checked:
            pending.hashes = exact.hashes()
        if tensor is not None and is_checked and pending.hashes is None:
            pending.fingerprint = pool.submit(tensor.fingerprint)
        if exact is not None:
            chunks = range(len(exact))
            pending.parts += [
                pool.submit(_restore, writer, entry.name, exact, number, pending.hashes) for number in chunks
            ]
        elif source.terms and tensor is not None:
            part = _Part(writer, entry.name, source, tensor, RunDecoder(self._delta, source))
            for start, stop in row_ranges(0, source.delta_rows, part.decoder.width, part.decoder.step, BATCH_ELEMENTS):
                pending.parts.append(pool.submit(part.write, start, stop))
        elif tensor is not None:
            pending.parts.append(pool.submit(_copy, writer, entry.name, tensor))
        if source.data is not None and source.exact is None:
            offset = source.nbytes - source.data.length
            for piece in self._delta.container.pieces(source.data):
                pending.parts.append(pool.submit(writer.write, entry.name, offset, piece))
                offset += len(piece)
        return pending


@dataclass(frozen=True, slots=True)
class _Part:
    """Writes batches of rows of a tensor that is its base plus terms."""

    writer: CheckpointWriter
    name: str
    entry: TensorEntry
    tensor: Tensor
    decoder: RunDecoder

    def write(self, start: int, stop: int) -> None:
        """Decode, add and write rows ``start`` to ``stop``."""
        dtype, columns = self.entry.dtype, self.entry.columns
        row_bytes = columns * RAW_DTYPES[dtype].itemsize
        with self.tensor.row_range(start, stop) as base:
            for first, last in row_ranges(start, stop, self.decoder.width, self.decoder.step):
                rows = self.decoder.add(first, last, base[first - start : last - start], self.tensor.dtype, dtype)
                self.writer.write(self.name, first * row_bytes, raw_bytes(rows))


def check_read(path: Path, made: Path, weights: Sequence[str]) -> None:
    """Refuse to patch a folder whose loader would read other weights than those that were written.

    Raises:
        UsageError: names the other weights.
    """
    with Checkpoint(made, lenient=True) as checkpoint:
        read = {name for name, _ in checkpoint.weight_files()}
    other = next(iter(sorted(read ^ set(weights))), None)
    if other is not None:
        raise UsageError(
            f"{path} holds other weights beside those that are patched: a loader would not agree on {other}; write a "
            "new folder"
        )


def _restore(writer: CheckpointWriter, name: str, exact: ExactTensor, number: int, hashes: ChunkHashes | None) -> None:
    """Write one chunk of an exact tensor."""
    offset, units = exact.restore(number, hashes)
    writer.write(name, offset, raw_bytes(units))


def _copy(writer: CheckpointWriter, name: str, tensor: Tensor) -> None:
    """Write a tensor that equals its base."""
    offset = 0
    for piece in tensor.pieces():
        writer.write(name, offset, piece)
        offset += len(piece)
