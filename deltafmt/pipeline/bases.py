"""Checks that a checkpoint is the base that a delta was packed against (spec/deltafmt-v1.md, section 7.5)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.checkpoint.safetensors_file import Tensor
from deltafmt.checkpoint.weight_names import METADATA_VARIANT
from deltafmt.errors import WrongBaseError
from deltafmt.index.entries import TensorEntry
from deltafmt.pipeline.workers import drain


def open_base(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> Checkpoint:
    """Open the base of a delta: the weights of the variant that the delta was packed against, if it names one."""
    return Checkpoint(path, variant=metadata.get(METADATA_VARIANT), lenient=True)


def find_base(checkpoint: Checkpoint, entry: TensorEntry) -> Tensor | None:
    """Return the base tensor that an entry needs, or None if it needs none.

    Raises:
        WrongBaseError: the base lacks the tensor, or has it in another dtype or shape.
    """
    if entry.base is None:
        return None
    tensor = checkpoint.tensors.get(entry.name)
    if tensor is None:
        raise WrongBaseError(f'wrong base {checkpoint.path}: it has no tensor "{entry.name}"')
    if (tensor.dtype, tensor.shape) != (entry.base.dtype, entry.base.shape):
        raise WrongBaseError(
            f'wrong base {checkpoint.path}: tensor "{entry.name}" is {tensor.dtype} {list(tensor.shape)}, '
            f"not {entry.base.dtype} {list(entry.base.shape)}"
        )
    return tensor


def wrong_bytes(checkpoint: Checkpoint, name: str) -> WrongBaseError:
    """Return the error for a base tensor whose bytes differ."""
    return WrongBaseError(f'wrong base {checkpoint.path}: tensor "{name}" differs from the one that was packed against')


def compare_bases(base: Checkpoint, entries: Iterable[TensorEntry], threads: int) -> Iterator[tuple[str, bool]]:
    """Give the name of every base tensor that the entries need, and True if its bytes are those packed against.

    Args:
        base: the checkpoint.
        entries: the entries of a delta file.
        threads: worker threads for the fingerprints.

    Raises:
        WrongBaseError: the base lacks a tensor, or has it in another dtype or shape.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="deltafmt-base")
    try:
        needed = [(entry, tensor) for entry in entries if (tensor := find_base(base, entry)) is not None]
        digests = pool.map(Tensor.fingerprint, [tensor for _, tensor in needed])
        for (entry, _), digest in zip(needed, digests, strict=True):
            yield entry.name, entry.base is not None and digest == entry.base.digest
    finally:
        drain(pool)
