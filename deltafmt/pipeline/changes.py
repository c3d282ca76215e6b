"""What a source of ``deltafmt.convert`` changes: tensors of the base with their new bytes, whatever the format."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from concurrent.futures import Future
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from deltafmt.checkpoint.adapter import is_embedding
from deltafmt.checkpoint.fingerprint import hasher
from deltafmt.checkpoint.folder import Checkpoint, natural_key
from deltafmt.checkpoint.restored import file_digest, read_heads
from deltafmt.checkpoint.safetensors_file import Tensor
from deltafmt.errors import InvalidFileError, Remedy, UnsupportedError, UsageError
from deltafmt.foreign.patch import Patch
from deltafmt.index.entries import TensorEntry
from deltafmt.pipeline.chain import Chain
from deltafmt.pipeline.lora_names import is_head
from deltafmt.pipeline.workers import Progress, in_order, worker_pool

Bytes = NDArray[np.uint8]


class Changes(Protocol):
    """What lies between two versions of a model.

    Attributes:
        base: the version before.
    """

    base: Checkpoint

    @property
    def names(self) -> Collection[str]:
        """The names of the tensors that may change. All are tensors of the base."""

    def new_bytes(self, name: str) -> Bytes | None:
        """Return the new bytes of a tensor; None if it does not change. Several threads may call this."""

    def check_unchanged(self) -> None:
        """Check that no input was replaced or written to since it was opened."""


class PatchChanges:
    """The changes of a patch of another program.

    Args:
        base: the version before.
        patch: the patch, which was checked against the base.
    """

    def __init__(self, base: Checkpoint, patch: Patch) -> None:
        self.base = base
        self._patch = patch

    @property
    def names(self) -> Collection[str]:
        """The names of the tensors that may change."""
        return self._patch.names

    def new_bytes(self, name: str) -> Bytes | None:
        """Return the new bytes of a tensor."""
        return self._patch.new_bytes(self.base.tensors[name])

    def check_unchanged(self) -> None:
        """Check that no input has changed."""
        self.base.check_unchanged()
        self._patch.check_unchanged()


class DeltaChanges:
    """The changes of a delta file.

    Args:
        chain: the delta file on its base.
        format_: the format that they are for, in messages.
        tensors_only: True to leave out what is no tensor.

    Raises:
        UsageError: the format cannot carry what the delta file gives.
        UnsupportedError: the base is read as values that its bytes mean.
    """

    def __init__(self, chain: Chain, format_: str, *, tensors_only: bool) -> None:
        self.base = chain.model
        self._state = chain.result()
        self._bases = chain.bases[0]
        (self._delta,) = chain.deltas
        # A head that is the embedding, of a model that ties them, is in no file of the base: its loader makes it.
        ties = self.base.config().get("tie_word_embeddings") is True
        heads = {_tied_head(each) for each in chain.entries[0]} if ties else set()
        entries = [each for each in chain.entries[0] if each.name in self.base.tensors or each.name not in heads]
        self._entries = {entry.name: entry for entry in entries}
        name = self._delta.container.name
        if self._delta.container.scaled():
            raise UnsupportedError(
                f"{name}: it reads 8-bit floats of its base as values, and a {format_} changes the stored bytes; apply "
                "it, and pack what it gives with the method exact"
            )
        for entry in entries:
            self._check(name, entry, format_)
        gone = next((tensor for tensor in self.base.tensors if tensor not in self._entries), None)
        if gone is not None:
            raise self._impossible(name, gone, "vanishes", format_)
        if not tensors_only:
            _check_attached(self.base, self._delta.container.name, self._attached(), format_)
            _check_heads(self.base, self._delta.container.name, self._heads(), format_)

    def _check(self, name: str, entry: TensorEntry, format_: str) -> None:
        """Refuse a tensor that the format cannot carry."""
        tensor = self.base.tensors.get(entry.name)
        if tensor is None:
            raise self._impossible(name, entry.name, "is new, or has another name in the base", format_)
        if (tensor.dtype, tensor.shape) != (entry.dtype, entry.shape):
            what = f"becomes {entry.dtype} {list(entry.shape)} from {tensor.dtype} {list(tensor.shape)}"
            raise self._impossible(name, entry.name, what, format_)
        if self._delta.resolve(entry.name).terms and self._delta.resolve(entry.name).exact is None:
            raise UsageError(
                f'{name}: tensor "{entry.name}" has lossy terms, and a {format_} holds exact changes; apply it, and '
                "pack what it gives with the method exact"
            )

    @staticmethod
    def _impossible(name: str, tensor: str, what: str, format_: str) -> UsageError:
        return UsageError(
            f'{name}: tensor "{tensor}" {what}, and a {format_} changes the elements of tensors alone; apply it, and '
            "send the whole checkpoint"
        )

    def _attached(self) -> Mapping[str, bytes]:
        return {name: each.digest for name, each in self._delta.container.attachments.items()}

    def _heads(self) -> Mapping[str, bytes]:
        container = self._delta.container
        return {name: bytes(container.buffer(file.head)) for name, file in container.files.items()}

    @property
    def metadata(self) -> Mapping[str, str]:
        """The delta file's metadata."""
        return self._delta.metadata

    @property
    def names(self) -> Collection[str]:
        """The names of the tensors that may change: all, because the base of each is compared."""
        return self._entries.keys()

    def new_bytes(self, name: str) -> Bytes | None:
        """Return the new bytes of a tensor; None if it is the base's.

        Raises:
            WrongBaseError: the base is not the one that was packed against.
            InvalidFileError: the delta file is not valid, or does not restore what was packed.
        """
        entry = self._delta.resolve(name)
        if entry.action == "same" and entry.base is not None and not entry.base.parts and entry.name == name:
            if self.base.tensors[name].fingerprint() != entry.base.digest:
                raise self._bases.differs(name)
            return None
        found = self._state.data(name)
        self._state.drop(name)
        if entry.exact is not None:
            digest = hasher(entry.dtype, entry.shape)
            digest.update(found.data)
            if digest.digest() != entry.exact.digest:
                where = f'{self._delta.container.name}: tensors["{entry.name}"]'
                raise InvalidFileError(f"{where}: what is restored is not what was packed")
        return found

    def check_unchanged(self) -> None:
        """Check that neither the base nor the delta file has changed."""
        self._state.check_unchanged()


def _tied_head(entry: TensorEntry) -> str | None:
    """Return the name of a head that an entry says to be the input embedding of its model; None if it says no such."""
    # Of the two, either may be the copy: a publisher has first what comes first in the alphabet.
    for name, other in ((entry.name, entry.target or ""), (entry.target or "", entry.name)):
        head, embedding = name.removesuffix(".weight"), other.removesuffix(".weight")
        # A part of a model has both behind its name: language_model.lm_head, language_model.model.embed_tokens.
        if is_head(head) and is_embedding(embedding) and embedding.startswith(head.rpartition(".")[0]):
            return name
    return None


def _check_attached(base: Checkpoint, name: str, attached: Mapping[str, bytes], format_: str) -> None:
    """Refuse attached files that the base does not have."""
    for path, digest in attached.items():
        place = base.path / path
        if not (base.path.is_dir() and place.is_file() and file_digest(place) == digest):
            raise UsageError(
                f"{name}: the attached file {path} is not the base's, and a {format_} carries tensors alone",
                Remedy("tensors_only"),
            )


def _check_heads(base: Checkpoint, name: str, heads: Mapping[str, bytes], format_: str) -> None:
    """Refuse weight files whose heads are others than those of the base."""
    if not heads:
        return
    there = {path: file.head for path, file in read_heads(base).items()}
    other = next((path for path in sorted({*heads, *there}) if heads.get(path) != there.get(path)), None)
    if other is not None:
        raise UsageError(
            f"{name}: the weight file {other} has another header than in the base, and a {format_} carries tensors "
            "alone",
            Remedy("tensors_only"),
        )


class ChangeWriter(Protocol):
    """What writes a patch of another program; what it encodes, it alone can read."""

    def encode(self, base: Tensor, new: Bytes) -> Any:
        """Return what the patch has of a tensor; None if it does not change."""

    def add(self, base: Tensor, encoded: Any) -> None:
        """Write a changed tensor."""

    def finish(self) -> None:
        """Write what follows the tensors, and give the output its name."""

    def abandon(self) -> None:
        """Remove what was written."""


def write_changes(changes: Changes, writer: ChangeWriter, threads: int, progress: Progress | None = None) -> int:
    """Write a patch, and return how many tensors it changes.

    Args:
        changes: what it says.
        writer: writes it; after an error, what it has written is removed.
        threads: worker threads.
        progress: called with a tensor's name and bytes as each is done.
    """
    tensors, count = changes.base.tensors, 0

    def encoded(name: str) -> Any:
        new = changes.new_bytes(name)
        return None if new is None else writer.encode(tensors[name], new)

    def size(name: str) -> int:
        return tensors[name].nbytes

    try:
        with worker_pool(threads, "convert") as pool:

            def submit(name: str) -> Future[Any]:
                return pool.submit(encoded, name)

            for name, work in in_order(sorted(changes.names, key=natural_key), submit, size):
                found = work.result()
                if found is not None:
                    writer.add(tensors[name], found)
                    count += 1
                if progress:
                    progress(name, tensors[name].nbytes)
        changes.check_unchanged()
        writer.finish()
    except BaseException:
        writer.abandon()
        raise
    return count
