"""Writing a patch of TRL, as :mod:`deltafmt.foreign.sparse_file` reads it. It appears whole or not at all."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deltafmt.checkpoint.safetensors_file import Tensor
from deltafmt.container.partial import PartialFile
from deltafmt.errors import UsageError
from deltafmt.foreign import sparse_file as f
from deltafmt.foreign.places import Places
from deltafmt.foreign.spill import Spill, file_pieces
from deltafmt.foreign.versions import Versions
from deltafmt.format.constants import element_count

# Of TRL's tensors, those of the engine are all of this dtype: other values would be rounded to it.
DTYPE = "BF16"


@dataclass(frozen=True, slots=True)
class ChangedElements:
    """The elements of a tensor that change.

    Attributes:
        count: how many they are.
        indices: their flat positions, int32, ascending, in pieces.
        values: the bytes of their new values, in pieces.
    """

    count: int
    indices: list[NDArray[np.int32]]
    values: list[NDArray[np.uint8]]


class SparseFileWriter:
    """Write a patch of TRL. Call :meth:`add` for every tensor that changes, and :meth:`finish` once.

    Args:
        path: the file to make.
        versions: its version and that of its base, if they are known.
        elements: the elements of all tensors.
        force: replace ``path`` if it exists.

    Raises:
        UsageError: the output exists, or its name is not that of a safetensors file.
        StorageError: the folder is missing, or writing failed.
    """

    def __init__(self, path: Path, versions: Versions, elements: int, *, force: bool = False) -> None:
        if path.suffix != ".safetensors":
            raise UsageError(f"a patch of TRL is a safetensors file, and {path} is not named like one")
        self._sink = PartialFile(path, None, force=force)
        self._versions, self._elements, self._changed = versions, elements, 0
        self._spills: list[Spill] = []
        try:
            self._spills = [Spill(path.parent), Spill(path.parent)]
        except BaseException:
            self.abandon()
            raise

    def encode(self, base: Tensor, new: NDArray[np.uint8]) -> ChangedElements | None:
        """Return the elements of a tensor that change; None if none does. Several threads may call this.

        Args:
            base: the base's tensor.
            new: its new bytes.

        Raises:
            UsageError: the format cannot say it.
        """
        found = Places(base, new, 2 if base.dtype == DTYPE else 1)
        if not found.count:
            return None
        if base.dtype != DTYPE:
            raise UsageError(
                f'tensor "{base.name}" is {base.dtype}, and TRL\'s patches change {DTYPE} alone; write a '
                "version-folder, which changes tensors of every dtype"
            )
        if found.last > f.MAX_INDEX:
            raise UsageError(
                f'tensor "{base.name}" changes behind its element 2**31, which TRL\'s patches cannot say; write a '
                "version-folder"
            )
        return ChangedElements(found.count, list(found.places(f.INDEX)), list(found.values()))

    def add(self, base: Tensor, encoded: ChangedElements) -> None:
        """Write a changed tensor.

        Raises:
            StorageError: writing failed.
        """
        indices, values = self._spills
        indices.add(base.name + f.INDICES, "I32", encoded.count, *(piece.data for piece in encoded.indices))
        values.add(base.name + f.VALUES, DTYPE, encoded.count, *(piece.data for piece in encoded.values))
        self._changed += encoded.count

    def finish(self) -> None:
        """Write the file, and give it its name.

        Raises:
            StorageError: writing failed.
        """
        names = [name.removesuffix(f.INDICES) for name in self._spills[0].names]
        metadata = {
            f.SPARSE: "True",
            f.CHANGED: json.dumps(names),
            "num_changed_params": str(len(names)),
            "total_changed_elements": str(self._changed),
            "total_elements": str(self._elements),
            "sparsity": str(1 - self._changed / max(self._elements, 1)),
        }
        if self._versions.version is not None:
            metadata[f.MODEL_VERSION] = self._versions.version
        if self._versions.base is not None:
            metadata[f.PREVIOUS_VERSION] = self._versions.base
        for piece in file_pieces(self._spills, metadata):
            self._sink.write(piece)
        for spill in self._spills:
            spill.close()
        self._sink.commit()

    def abandon(self) -> None:
        """Remove what was written."""
        for spill in self._spills:
            spill.close()
        self._sink.abandon()


def total_elements(tensors: list[Tensor]) -> int:
    """Return the elements of some tensors."""
    return sum(element_count(tensor.shape) for tensor in tensors)
