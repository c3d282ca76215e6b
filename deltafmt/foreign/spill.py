"""A safetensors file of tensors whose sizes are known once they are made: their bytes wait in a file without a name."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from deltafmt.checkpoint.safetensors_file import STEP
from deltafmt.output import Bytes, storage_error

# Where the tensors begin, and the bytes of the elements that come first, are multiples of so many bytes.
_ALIGNMENT = 8


class Spill:
    """Bytes of tensors, one after the other.

    Args:
        folder: where the bytes wait, in a file without a name.

    Attributes:
        size: bytes so far.

    Raises:
        StorageError: the file cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rows: list[tuple[str, str, int, int]] = []
        self.size = 0
        try:
            # Closed by close(), which its owner calls whatever happens.
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        except OSError as error:
            raise storage_error("cannot write into", folder, error) from error

    @property
    def names(self) -> list[str]:
        """The names of the tensors."""
        return [name for name, _, _, _ in self._rows]

    def add(self, name: str, dtype: str, elements: int, *data: Bytes) -> None:
        """Take a tensor of one dimension, whose bytes may come in pieces.

        Raises:
            StorageError: writing failed.
        """
        try:
            self._file.writelines(data)
        except OSError as error:
            raise storage_error("cannot write into", self._folder, error) from error
        nbytes = sum(memoryview(piece).nbytes for piece in data)
        self._rows.append((name, dtype, elements, nbytes))
        self.size += nbytes

    def rows(self) -> Iterator[tuple[str, str, int, int]]:
        """Give name, dtype, elements and bytes of every tensor, in their order."""
        yield from self._rows

    def pieces(self) -> Iterator[bytes]:
        """Give all bytes, in their order.

        Raises:
            StorageError: reading failed.
        """
        try:
            self._file.flush()
            self._file.seek(0)
            while piece := self._file.read(STEP):
                yield piece
            self._file.seek(0, os.SEEK_END)
        except OSError as error:
            raise storage_error("cannot read from", self._folder, error) from error

    def close(self) -> None:
        """Give the bytes back."""
        self._file.close()


def file_pieces(spills: Iterable[Spill], metadata: Mapping[str, str]) -> Iterator[bytes]:
    """Give the bytes of a safetensors file that has the tensors of some spills.

    Args:
        spills: the tensors; the order of the file is theirs. Those with wide elements come first, so that each is
            aligned.
        metadata: strings by name; none are written if it is empty.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    spills, position = list(spills), 0
    for spill in spills:
        for name, dtype, elements, nbytes in spill.rows():
            header[name] = {"dtype": dtype, "shape": [elements], "data_offsets": [position, position + nbytes]}
            position += nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    yield len(text).to_bytes(8, "little") + text
    for spill in spills:
        yield from spill.pieces()
