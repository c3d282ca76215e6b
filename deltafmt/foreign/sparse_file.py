"""Reading TRL's sparse patches: a safetensors file with ``NAME.indices`` and ``NAME.values`` of each changed tensor.

The indices are flat positions, I32 and ascending; the values are the new elements, in the tensor's own dtype.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from deltafmt.checkpoint.safetensors_file import SafetensorsFile, Tensor
from deltafmt.errors import InvalidFileError, UnsupportedError, WrongBaseError
from deltafmt.foreign.patch import TRL, Tensors, find_base, named_tensor, whole
from deltafmt.foreign.places import check_ascending, put
from deltafmt.foreign.versions import Versions, one_before, read_versions
from deltafmt.format.constants import DTYPE_BITS, element_count

INDICES: Final = ".indices"
VALUES: Final = ".values"
INDEX: Final = np.dtype("<i4")
MAX_INDEX: Final = 2**31 - 1

SPARSE: Final = "sparse"
MODEL_VERSION: Final = "model_version"
PREVIOUS_VERSION: Final = "prev_model_version"
CHANGED: Final = "changed_params"
STATE: Final = "checksum_sha256"
# What these keys say is not needed to apply a patch.
_TOLD = ("anchor_step", "base_model_id", "num_changed_params", "total_changed_elements", "total_elements", "sparsity")
# What these keys must say, if they are there.
_FIXED = {SPARSE: ("True",), "format": ("sparse_weight_patch", "pt"), "version": ("1",), "encoding": ("raw",)}
# The endings of names in a later draft of the same program, whose indices are coded.
_LATER = {"idx", "val"}
_KNOWN = (MODEL_VERSION, PREVIOUS_VERSION, CHANGED, STATE, *_TOLD, *_FIXED)


class SparseFile:
    """An open patch of TRL; :class:`deltafmt.foreign.patch.Patch` says what it offers.

    Args:
        file: the file, which is closed with the patch.

    Raises:
        InvalidFileError: the file is not valid.
        UnsupportedError: its metadata say what is not known.
        StorageError: it cannot be read.
    """

    format = TRL

    @classmethod
    def open(cls, path: Path) -> Self | None:
        """Open a patch; None if the file is of another kind.

        Raises:
            InvalidFileError, UnsupportedError, StorageError: as the class raises them.
        """
        file = SafetensorsFile(path)
        endings = {name.rpartition(".")[2] for name in file.tensors}
        if endings and endings <= _LATER:
            file.close()
            raise UnsupportedError(
                f"{path}: a patch of the later form of TRL, with NAME.idx and NAME.val, which is not read; have TRL "
                "write NAME.indices and NAME.values"
            )
        if not endings & {INDICES[1:], VALUES[1:]} and file.metadata.get(SPARSE) != "True":
            file.close()
            return None
        return cls(file)

    def __init__(self, file: SafetensorsFile) -> None:
        self.path = file.path
        self._file = file
        try:
            self._pairs = self._read_pairs()
            self.versions = self._read_metadata(self._file.metadata)
            self.tells_base = STATE in self._file.metadata
        except BaseException:
            self.close()
            raise

    def _read_pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return indices and values of every changed tensor."""
        tensors, found = self._file.tensors, {}
        for stored in tensors:
            ending = INDICES if stored.endswith(INDICES) else VALUES
            if not stored.endswith(ending):
                raise InvalidFileError(f"{named_tensor(self.path, stored)}: neither {INDICES} nor {VALUES} of a tensor")
            name = stored.removesuffix(ending)
            indices, values = tensors.get(name + INDICES), tensors.get(name + VALUES)
            where = named_tensor(self.path, name)
            if indices is None or values is None:
                raise InvalidFileError(f"{where}: its {VALUES if values is None else INDICES} are missing")
            if indices.dtype != "I32":
                raise InvalidFileError(f"{where}: its indices are {indices.dtype}, not I32")
            if len(indices.shape) != 1 or indices.shape != values.shape:
                shapes = f"{list(indices.shape)} and {list(values.shape)}"
                raise InvalidFileError(f"{where}: indices and values of the shapes {shapes} are not two rows alike")
            found[name] = indices, values
        return found

    def _read_metadata(self, metadata: dict[str, str]) -> Versions:
        for key, value in metadata.items():
            if key not in _KNOWN:
                raise UnsupportedError(f"{self.path}: the key {key!r} of its metadata is not known")
            if key in _FIXED and value not in _FIXED[key]:
                raise UnsupportedError(f"{self.path}: {key} is {value!r}, and only {_FIXED[key][0]!r} can be read")
        if CHANGED in metadata:
            try:
                changed = json.loads(metadata[CHANGED])
            except (ValueError, RecursionError):
                changed = None
            if not isinstance(changed, list) or sorted(map(str, changed)) != sorted(self._pairs):
                raise InvalidFileError(f"{self.path}: {CHANGED} does not name the tensors that the file holds")
        state = metadata.get(STATE)
        if state is not None and not re.fullmatch("[0-9a-f]{64}", state):
            raise InvalidFileError(f"{self.path}: {STATE} is {state!r:.80}, not a SHA-256")
        version, base = metadata.get(MODEL_VERSION), metadata.get(PREVIOUS_VERSION)
        # TRL counts its patches, and says -1 where it has sent none before.
        return read_versions(
            self.path, version, one_before(version) if base is None else None if base == "-1" else base
        )

    @property
    def names(self) -> Collection[str]:
        """The names of the tensors that change."""
        return self._pairs.keys()

    def check(self, base: Tensors, where: Path) -> None:
        """Check that the base has the tensors, in the dtype of the values; and the new state, if its checksum is there.

        TRL's checksum is a SHA-256 over the bytes of all tensors, in the order of their names.
        """
        for name, (indices, values) in self._pairs.items():
            found = find_base(self.path, name, base, where)
            if found.dtype != values.dtype or DTYPE_BITS[found.dtype] % 8:
                raise WrongBaseError(
                    f'wrong base {where}: tensor "{name}" is {found.dtype}, and its new values in {self.path} are '
                    f"{values.dtype}"
                )
            if indices.shape[0] > element_count(found.shape):
                raise InvalidFileError(
                    f"{named_tensor(self.path, name)}: {indices.shape[0]:,} indices are more than the "
                    f"{element_count(found.shape):,} elements of the tensor"
                )
        told = self._file.metadata.get(STATE)
        if told is not None and told != self._state(base):
            raise WrongBaseError(
                f"wrong base {where}: the new state has another SHA-256 than {self.path} says; it was made on another "
                "version, or the file is damaged"
            )

    def _state(self, base: Tensors) -> str:
        """Return the SHA-256 of the new state."""
        digest = hashlib.sha256()
        for name in sorted(base):
            if name in self._pairs:
                digest.update(self.new_bytes(base[name]).data)
                continue
            for piece in base[name].pieces():
                digest.update(piece)
        return digest.hexdigest()

    def new_bytes(self, base: Tensor) -> NDArray[np.uint8]:
        """Return the new bytes of a tensor."""
        indices, values = self._pairs[base.name]
        out = whole(base)
        positions = whole(indices).view(INDEX)
        try:
            check_ascending(positions, element_count(base.shape), "index")
        except InvalidFileError as error:
            raise error.located(named_tensor(self.path, base.name)) from error
        unit = np.dtype(f"V{DTYPE_BITS[base.dtype] // 8}")
        put(out.view(unit), positions, whole(values).view(unit))
        return out

    def check_unchanged(self) -> None:
        """Check that the file was not replaced or written to since it was opened."""
        self._file.check_unchanged()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
