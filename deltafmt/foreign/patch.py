"""What every format of other programs gives: which tensors change, and their new bytes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from deltafmt.checkpoint.safetensors_file import Tensor
from deltafmt.errors import WrongBaseError
from deltafmt.foreign.versions import Versions

DELTAFMT: Final = "deltafmt"
VERSION_FOLDER: Final = "version-folder"
TRL: Final = "trl"
FORMATS: Final = (DELTAFMT, VERSION_FOLDER, TRL)

Tensors = Mapping[str, Tensor]


class Patch(Protocol):
    """An open patch of another program.

    Attributes:
        path: the file or folder.
        format: one of :data:`FORMATS`.
        versions: what it says of its versions.
        names: the tensors that it changes.
        tells_base: True if it has checksums, by which a base of the same shapes and other values is noticed.
    """

    path: Path
    format: str
    versions: Versions
    tells_base: bool

    @property
    def names(self) -> Collection[str]:
        """The names of the tensors that it changes."""

    def check(self, base: Tensors, where: Path) -> None:
        """Check all that can be known before a tensor is computed.

        Args:
            base: the tensors of the base.
            where: the name of the base in messages.

        Raises:
            InvalidFileError: the patch breaks its format.
            WrongBaseError: the base lacks a tensor, or has it in another dtype or size.
        """

    def new_bytes(self, base: Tensor) -> NDArray[np.uint8]:
        """Return the new bytes of a tensor, in a new array. Several threads may call this at the same time.

        Args:
            base: the base's tensor of that name.

        Raises:
            InvalidFileError: the patch breaks its format.
            WrongBaseError: the checksum of the new bytes is another one.
        """

    def check_unchanged(self) -> None:
        """Check that no file was replaced or written to since it was opened."""

    def close(self) -> None:
        """Close the files."""


def named_tensor(path: Path, name: str) -> str:
    """Return the beginning of a message about a tensor of a patch."""
    return f'{path}: tensor "{name}"'


def find_base(path: Path, name: str, base: Tensors, where: Path) -> Tensor:
    """Return the base's tensor that a patch changes.

    Raises:
        WrongBaseError: there is none.
    """
    if name not in base:
        raise WrongBaseError(f'wrong base {where}: {path} changes a tensor "{name}", and it has none of this name')
    return base[name]


def whole(tensor: Tensor) -> NDArray[np.uint8]:
    """Return a copy of the bytes of a tensor."""
    out, position = np.empty(tensor.nbytes, np.uint8), 0
    for piece in tensor.pieces():
        out[position : position + len(piece)] = np.frombuffer(piece, np.uint8)
        position += len(piece)
    return out
