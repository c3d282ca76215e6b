"""Is a checkpoint what a delta file gives? Told from the checkpoint and the delta alone, without the delta's base."""

from __future__ import annotations

import os

from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.checkpoint.safetensors_file import Tensor
from deltafmt.delta import DeltaFile
from deltafmt.errors import WrongBaseError
from deltafmt.index.entries import TensorEntry
from deltafmt.pipeline.digests import check_content_id, digest_of
from deltafmt.pipeline.workers import worker_pool


def check_gives(parent: DeltaFile, base: str | os.PathLike[str], threads: int) -> bytes:
    """Check that a base is what a delta file gives, and return the content id of that file.

    Raises:
        WrongBaseError: it gives another base.
        InvalidFileError, StorageError: a file cannot be read, or is not valid.
    """
    container = parent.container
    check_content_id(container, container.entries())
    with Checkpoint(base, lenient=True) as checkpoint:
        found = difference_from_result(checkpoint, parent, threads)
    if found:
        raise WrongBaseError(
            f"{base} is not what {container.name} gives: {found}; apply {container.name} first, and name the folder "
            "that it gives as the base"
        )
    return container.content_id


def difference_from_result(checkpoint: Checkpoint, delta: DeltaFile, threads: int) -> str:
    """Return what tells a checkpoint from what a delta file gives, in words; empty if nothing does.

    Tensors that are exact, stored whole or the base's are compared by their digests. For those that are the base's plus
    terms the file has no digest: the checkpoint must then say, as ``unpack`` and ``apply`` have it say, that this delta
    gave it.

    Args:
        checkpoint: the checkpoint; 8-bit floats are not read as values.
        delta: the delta file, whose content id is known to be right.
        threads: worker threads.
    """
    entries = list(delta.container.entries())
    for entry in entries:
        tensor = checkpoint.tensors.get(entry.name)
        if tensor is None:
            return f'it has no tensor "{entry.name}"'
        if (tensor.dtype, tensor.shape) != (entry.dtype, entry.shape):
            return f'tensor "{entry.name}" is {tensor.dtype} {list(tensor.shape)}'
    more = next((name for name in checkpoint.tensors if name not in delta), None)
    if more is not None:
        return f'it has a tensor "{more}"'
    lossy = next((entry.name for entry in entries if entry.action == "add" and entry.exact is None), None)
    if lossy is not None and not _says(checkpoint, delta.content_id):
        return f'"{lossy}" is lossy, and no metadata of the weight files says that this delta gave them'
    with worker_pool(threads, "gives") as pool:
        equal = pool.map(lambda entry: _is_result(checkpoint.tensors[entry.name], entry, checkpoint), entries)
        for entry, same in zip(entries, equal, strict=True):
            if not same:
                return f'tensor "{entry.name}" differs'
    return ""


def _says(checkpoint: Checkpoint, content_id: str) -> bool:
    """Tell whether every weight file says that a delta, on its own base, gave it."""
    said = [file.metadata for _, file in checkpoint.weight_files()]
    return all(found.get("deltafmt.content_id") == content_id and "deltafmt.forced_base" not in found for found in said)


def _is_result(tensor: Tensor, entry: TensorEntry, checkpoint: Checkpoint) -> bool:
    """Tell whether a tensor has the digest that an entry gives, if the entry gives one."""
    if entry.target is not None:
        return tensor.equals(checkpoint.tensors[entry.target])
    if entry.action == "replace":
        return digest_of(tensor.pieces()) == entry.digest
    if entry.exact is not None:
        return tensor.fingerprint() == entry.exact.digest
    if entry.action == "same" and entry.base is not None:
        return tensor.fingerprint() == entry.base.digest
    return True
