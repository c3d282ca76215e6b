"""A store of moments in a folder: they are gathered once and read by any number of methods and threads.

A file holds the moments of one weight in NumPy's ``.npz`` form: ``matrix`` (the upper triangle of H, row by row),
``tokens``, ``axis`` and ``name``. The file's name is a digest of the weight's name, which may have any character.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
from blake3 import blake3

from deltafmt.calibration.callbacks import Moments
from deltafmt.errors import InvalidFileError, UsageError
from deltafmt.output import storage_error


class MomentStore:
    """Moments by weight name.

    Args:
        folder: the store's folder, which is made when the first moments are written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, weight_name: str) -> Path:
        """Return the path of a weight's file, which need not exist."""
        return self.folder / f"{blake3(weight_name.encode()).hexdigest(16)}.npz"

    def on_module(self, name: str, weight_name: str, moments: Moments) -> None:  # noqa: ARG002  # a calibration calls it
        """Store the moments that a calibration hands out; a weight's file appears whole or not at all.

        Raises:
            StorageError: writing failed.
        """
        path = self.path(weight_name)
        temporary = path.with_suffix(".tmp")
        upper = moments.matrix[np.triu_indices(len(moments.matrix))]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                np.savez(file, matrix=upper, tokens=moments.tokens, axis=moments.axis, name=weight_name)
            os.replace(temporary, path)
        except OSError as error:
            raise storage_error("cannot write", path, error) from error

    def load(self, weight_name: str) -> Moments:
        """Return the moments of a weight.

        Raises:
            UsageError: the store has no moments of this weight.
            StorageError: reading failed.
            InvalidFileError: the file was not written by a store.
        """
        path = self.path(weight_name)
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as held:
                upper, tokens, axis = held["matrix"], int(held["tokens"]), int(held["axis"])
        except FileNotFoundError:
            raise UsageError(f'{self.folder} holds no moments of "{weight_name}"') from None
        except OSError as error:
            raise storage_error("cannot read", path, error) from error
        except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise InvalidFileError(f"{path}: not the moments of a weight") from error
        columns = (np.sqrt(8 * upper.size + 1) - 1) / 2
        if upper.ndim != 1 or upper.dtype != np.float32 or columns != int(columns):
            raise InvalidFileError(f"{path}: not the upper triangle of a matrix")
        matrix = np.zeros((int(columns), int(columns)), np.float32)
        matrix[np.triu_indices(int(columns))] = upper
        return Moments(matrix + np.triu(matrix, 1).T, tokens, axis)
