"""The base's checkpoint, from which the engine loaded its model: what a delta is compared with before it is served.

The engine's own weights cannot be compared: it stacks, cuts and packs them, and may drop what it has packed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import numpy as np
import torch

from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.checkpoint.weight_names import METADATA_VARIANT
from deltafmt.container.reader import Container
from deltafmt.errors import StorageError
from deltafmt.index.entries import TensorEntry
from deltafmt.pipeline.bases import BaseTensors, open_base
from deltafmt.runtime.dtypes import TORCH_DTYPES


class EngineBase:
    """The checkpoint of the engine's model.

    Args:
        folder: the folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = folder
        self.checkpoint = Checkpoint(folder, lenient=True)
        self._digests: dict[object, bytes] = {}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all tensors by name."""
        return {name: tuple(tensor.shape) for name, tensor in self.checkpoint.tensors.items()}

    def check(self, container: Container, entries: Iterable[TensorEntry]) -> None:
        """Check that a delta was made for this base. Every tensor of the base is hashed once.

        Raises:
            WrongBaseError: the base lacks a tensor, or it differs; names the first one.
        """
        wanted = list(entries)
        plain = not container.scaled() and METADATA_VARIANT not in container.metadata
        checkpoint = self.checkpoint if plain else open_base(self.folder, container)
        base = BaseTensors(checkpoint, wanted, container)
        for entry in wanted:
            tensor = base.find(entry)
            if tensor is None or entry.base is None:
                continue
            key = (entry.name, tensor.name, tensor.dtype, tensor.shape, entry.base.parts)
            digest = self._digests.get(key)
            if digest is None:
                digest = self._digests[key] = tensor.fingerprint()
            if digest != entry.base.digest:
                raise base.differs(entry.name)

    def values(self, name: str) -> torch.Tensor:
        """Return the values of a tensor."""
        tensor = self.checkpoint.tensors[name]
        raw = np.frombuffer(b"".join(tensor.pieces()), np.uint8).copy()
        return torch.from_numpy(raw).view(TORCH_DTYPES[tensor.dtype]).view(tuple(tensor.shape))


def folder_of(model: str, revision: str | None) -> str:
    """Return the folder of a model that the engine has loaded, given a folder or a name on the hub.

    Raises:
        StorageError: it is not on this machine.
    """
    if os.path.isdir(model):
        return model
    try:
        from huggingface_hub import snapshot_download  # noqa: PLC0415 - needed for names on the hub alone

        found: str = snapshot_download(model, revision=revision, local_files_only=True)
    except Exception as error:
        raise StorageError(
            f"{model}: its checkpoint is not on this machine, and deltas are compared with it"
        ) from error
    return found
