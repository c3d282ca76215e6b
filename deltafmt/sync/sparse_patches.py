"""Patches in memory, as vLLM's weight transfer takes them: the name of a tensor, flat indices, and new values."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from numbers import Integral
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from deltafmt.checkpoint.safetensors_file import Tensor
from deltafmt.errors import InvalidFileError, UsageError, WrongBaseError
from deltafmt.foreign.patch import Tensors, find_base, whole
from deltafmt.foreign.places import Places, check_ascending
from deltafmt.foreign.sparse_file import INDEX, MAX_INDEX
from deltafmt.foreign.versions import Versions
from deltafmt.format.constants import DTYPE_BITS, element_count
from deltafmt.format.limits import DEFAULT_LIMITS, Limits
from deltafmt.pipeline.changes import write_changes
from deltafmt.pipeline.convert import ConvertResult, convert_patch, opened_changes
from deltafmt.pipeline.workers import thread_count
from deltafmt.runtime.dtypes import TORCH_DTYPES

VLLM: Final = "vllm"

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class SparsePatch(NamedTuple):
    """The elements of a tensor that change. vLLM's engines take it as their own ``SparseWeightPatch``.

    Attributes:
        name: the tensor's name in the checkpoint.
        indices: int32, 1-d: flat places in the tensor, ascending.
        values: 1-d, of the tensor's dtype: the new elements there.
        full_shape: the tensor's shape.
    """

    name: str
    indices: torch.Tensor
    values: torch.Tensor
    full_shape: tuple[int, ...]


class PatchLike(Protocol):
    """What :func:`convert_patches` takes: :class:`SparsePatch`, vLLM's ``SparseWeightPatch``, or alike."""

    @property
    def name(self) -> str:
        """The tensor's name in the checkpoint."""

    @property
    def indices(self) -> torch.Tensor:
        """Flat places in the tensor, in any order, each once."""

    @property
    def values(self) -> torch.Tensor:
        """The new elements there."""

    @property
    def full_shape(self) -> tuple[int, ...]:
        """The tensor's shape."""


def sparse_patches(
    source: str | os.PathLike[str],
    base: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    threads: int | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> list[SparsePatch]:
    """Return what a delta file, or a patch that :func:`deltafmt.convert` reads, changes.

    All tensors are computed and checked before any is returned.

    Args:
        source: an exact delta file, a version folder or a sparse safetensors file.
        base: the checkpoint that it was made on. A patch of TRL without a SHA-256 cannot tell whether it is.
        device: where the patches go.
        threads: worker threads; one for each processor if None.
        limits: how much memory, work and output a delta file may ask for.

    Raises:
        UsageError: vLLM cannot take a change: to NaN, of a dtype that is no float, beyond 2**31 elements, or one that
            no patch can carry. Attached files and the heads of weight files are left out.
        InvalidFileError: the source, or the base, is not valid.
        WrongBaseError: the base is not the one that the source was made on.
        StorageError: reading failed.

    Example::

        engine.send_weights(sparse_patches("step.deltafmt", "base", device="cuda"))   # a trainer's engine of vLLM
    """
    collected = _Collected(torch.device(device))
    with opened_changes(source, base, "patch of vLLM", limits) as changes:
        write_changes(changes, collected, thread_count(threads))
    return collected.patches


class _Collected:
    """Takes changed tensors as patches.

    Attributes:
        patches: what came so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.patches: list[SparsePatch] = []
        self._device = device

    def encode(self, base: Tensor, new: NDArray[np.uint8]) -> SparsePatch | None:
        """Return the elements that change; None if none does."""
        found = Places(base, new, max(DTYPE_BITS[base.dtype] // 8, 1))
        if not found.count:
            return None
        where, dtype = f'tensor "{base.name}"', TORCH_DTYPES.get(base.dtype)
        if dtype is None or not dtype.is_floating_point or DTYPE_BITS[base.dtype] % 8:
            raise UsageError(f"{where} is {base.dtype}, and vLLM patches floats alone; send the whole tensor")
        if found.last > MAX_INDEX:
            raise UsageError(f"{where} changes behind its element 2**31, which vLLM's indices cannot say")
        values = torch.from_numpy(np.concatenate(list(found.values()))).view(dtype)
        if values.float().isnan().any():
            raise UsageError(f"{where} changes to NaN, which means unchanged to vLLM; send the whole tensor")
        indices = torch.from_numpy(np.concatenate(list(found.places(INDEX))))
        return SparsePatch(base.name, indices.to(self._device), values.to(self._device), base.shape)

    def add(self, base: Tensor, encoded: SparsePatch) -> None:  # noqa: ARG002
        """Take a patch."""
        self.patches.append(encoded)

    def finish(self) -> None:
        """Do nothing: nothing is written."""

    def abandon(self) -> None:
        """Do nothing: nothing was written."""


def convert_patches(
    patches: Iterable[PatchLike],
    out: str | os.PathLike[str],
    base: str | os.PathLike[str],
    *,
    parent: str | os.PathLike[str] | None = None,
    force: bool = False,
    threads: int | None = None,
) -> ConvertResult:
    """Make a delta file of patches, which gives the base's files with these elements in them.

    Patches of one tensor are applied in their order, as vLLM does it.

    Args:
        patches: such as a list of vLLM's ``SparseWeightPatch``. They must not change during the call.
        out: the delta file to make.
        base: the checkpoint that they were made on. Patches cannot tell whether it is.
        parent: a delta file whose result is ``base``. The delta file that is made is the next link of a chain.
        force: True to replace ``out`` if it exists.
        threads: worker threads; one for each processor if None.

    Raises:
        UsageError: a patch is none that vLLM would take, or the output exists.
        WrongBaseError: the base lacks a tensor, or has it in another dtype or shape; or ``parent`` does not give it.
        InvalidFileError: the base is not valid.
        StorageError: reading or writing failed.
    """
    return convert_patch(_Patches(patches), out, base, parent=parent, force=force, threads=threads)


class _Patches:
    """Patches in memory; :class:`deltafmt.foreign.patch.Patch` says what they offer."""

    format = VLLM
    tells_base = False
    path = Path("the list of patches")
    versions = Versions()

    def __init__(self, patches: Iterable[PatchLike]) -> None:
        self._held: dict[str, list[PatchLike]] = {}
        if not isinstance(patches, Iterable):
            raise UsageError(f"the patches are a {type(patches).__name__}; give a list of them")
        for patch in patches:
            checked = _checked(patch)
            self._held.setdefault(checked.name, []).append(checked)

    @property
    def names(self) -> Collection[str]:
        """The names of the tensors that change."""
        return self._held.keys()

    def check(self, base: Tensors, where: Path) -> None:
        """Check that the base has the tensors, in the dtypes and shapes of the patches."""
        for name, patches in self._held.items():
            found = find_base(self.path, name, base, where)
            for patch in patches:
                dtype, shape = _NAMES[patch.values.dtype], tuple(patch.full_shape)
                if (dtype, shape) != (found.dtype, found.shape):
                    raise WrongBaseError(
                        f'wrong base {where}: tensor "{name}" is {found.dtype} {list(found.shape)}, and a patch of it '
                        f"is for {dtype} {list(shape)}"
                    )
                _places(patch)

    def new_bytes(self, base: Tensor) -> NDArray[np.uint8]:
        """Return the new bytes of a tensor."""
        out, unit = whole(base), np.dtype(f"V{DTYPE_BITS[base.dtype] // 8}")
        for patch in self._held[base.name]:
            places, order = _places(patch)
            values = patch.values.detach().cpu().contiguous().view(torch.uint8).numpy()
            out.view(unit)[places] = values.view(unit)[order]
        return out

    def check_unchanged(self) -> None:
        """Do nothing: patches in memory are the caller's."""

    def close(self) -> None:
        """Do nothing."""


def _checked(patch: PatchLike) -> PatchLike:
    """Refuse a patch that vLLM would not take, as far as it shows without the indices' values."""
    missing = [name for name in SparsePatch._fields if not hasattr(patch, name)]
    if missing:
        raise UsageError(f"a {type(patch).__name__} is no patch: it has no {missing[0]}")
    where = f'the patch of "{patch.name}"'
    for what, given in (("indices", patch.indices), ("values", patch.values)):
        if not isinstance(given, torch.Tensor):
            raise UsageError(f"{where}: {what} are a {type(given).__name__}, not a tensor of torch")
        if given.layout is not torch.strided or given.is_meta or given.is_conj() or given.is_neg():
            raise UsageError(
                f"{where}: {what} have no bytes of their own: they are sparse, on no device, or a view of other values"
            )
    shape: object = patch.full_shape
    if not isinstance(shape, Sequence) or not all(isinstance(size, Integral) for size in shape):
        raise UsageError(f"{where}: full_shape {shape!r} is not a row of sizes")
    if patch.indices.dtype not in (torch.int32, torch.int64) or patch.indices.ndim != 1:
        raise UsageError(
            f"{where}: indices of {patch.indices.dtype} {list(patch.indices.shape)} are not a row of int32"
        )
    if patch.indices.shape != patch.values.shape:
        counts = f"{list(patch.indices.shape)} and {list(patch.values.shape)}"
        raise UsageError(f"{where}: indices and values of the shapes {counts} are not two rows alike")
    if patch.values.dtype not in _NAMES or not patch.values.dtype.is_floating_point:
        raise UsageError(f"{where}: values of {patch.values.dtype} are no floats")
    if patch.values.float().isnan().any():
        raise UsageError(f"{where}: a value is NaN, which means unchanged to vLLM")
    return patch


def _places(patch: PatchLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the places of a patch, ascending, and the order of its values by them.

    Raises:
        UsageError: a place stands twice, or lies outside.
    """
    indices = patch.indices.detach().cpu().numpy().astype(np.int64)
    order = np.argsort(indices, kind="stable")
    places = indices[order]
    try:
        check_ascending(places, element_count(_shape(patch.full_shape)), "index")
    except InvalidFileError as error:
        raise UsageError(f'the patch of "{patch.name}": {error}') from error
    return places, order


def _shape(sizes: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(size) for size in sizes)
