"""Check that a model in memory is the base that a delta was packed against (spec/deltafmt-v1.md, section 7.5)."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from deltafmt.checkpoint.fingerprint import hasher
from deltafmt.errors import WrongBaseError
from deltafmt.format.constants import element_count
from deltafmt.index.entries import BaseRef, TensorEntry
from deltafmt.index.scaled import ScaledRef
from deltafmt.runtime.dtypes import TORCH_DTYPES
from deltafmt.runtime.float8 import is_float8
from deltafmt.runtime.model_batch import is_distributed
from deltafmt.runtime.values import version_of

_THREADS = 4  # each thread holds one tensor in host memory


class BaseCheck:
    """Compare a model's parameters with the fingerprints in deltas; an unchanged parameter is hashed only once."""

    def __init__(self, model_name: str) -> None:
        self._model = model_name
        self._known: dict[int, _Known] = {}

    def check(
        self,
        entries: Mapping[str, TensorEntry],
        parameters: Mapping[str, torch.Tensor],
        scaled: Mapping[str, ScaledRef] = MappingProxyType({}),
        scales: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> list[str]:
        """Check every tensor that a delta takes from the base.

        Args:
            entries: the delta's entries by tensor name.
            parameters: the model's parameters by tensor name; tensors without a parameter are not checked.
            scaled: how the base keeps tensors as 8-bit floats with scales, by the base's names.
            scales: the scales of parameters that are 8-bit floats, by tensor name.

        Returns:
            The names of the tensors that cannot be checked, because the model holds them in another form: quantized,
            or in a dtype from which the base's bits cannot be restored.

        Raises:
            WrongBaseError: a tensor differs; the message names the first one.
        """
        needed = [(name, entry.base) for name, entry in entries.items() if entry.base is not None]
        unchecked = []
        # All processes gather the parts of a parameter at the same time, and so in the same order.
        for name, base in needed:
            if is_distributed(parameters.get(name)):
                self._digest(parameters[name], base.dtype, base.shape)
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="deltafmt-base") as pool:

            def compare(pair: tuple[str, BaseRef]) -> bool | None:
                name, base = pair
                parameter = parameters.get(name)
                if parameter is None or not is_float8(parameter) or base.dtype.startswith("F8"):
                    digest = self._digest(parameter, base.dtype, base.shape)
                    return None if digest is None else digest == base.digest
                return self._compare_scaled(parameter, scales.get(name), scaled.get(_base_name(name, base)))

            found = pool.map(compare, needed)
            try:
                for (name, _), equal in zip(needed, found, strict=True):
                    if equal is None:
                        unchecked.append(name)
                    elif not equal:
                        raise WrongBaseError(
                            f'wrong base {self._model}: tensor "{name}" differs from the one that was packed against'
                        )
            finally:
                pool.shutdown(cancel_futures=True)
        return unchecked

    def _compare_scaled(self, codes: torch.Tensor, scales: torch.Tensor | None, ref: ScaledRef | None) -> bool | None:
        """Tell whether 8-bit floats and their scales are the base's; None if that cannot be told."""
        if ref is None or (ref.scales is not None and scales is None):
            return None
        held = (
            [(codes, ref.codes)] if ref.scales is None or scales is None else [(codes, ref.codes), (scales, ref.scales)]
        )
        digests = [self._digest(tensor, stored.dtype, stored.shape) for tensor, stored in held]
        if None in digests:
            return None
        return all(digest == stored.digest for digest, (_, stored) in zip(digests, held, strict=True))

    def _digest(self, parameter: torch.Tensor | None, dtype: str, shape: tuple[int, ...]) -> bytes | None:
        if parameter is None or dtype not in TORCH_DTYPES or not _has_shape(parameter, shape):
            return None
        known = self._known.get(id(parameter))
        state = (version_of(parameter), parameter.data_ptr(), parameter.dtype, dtype)
        if known is None or known.parameter() is not parameter or known.state != state:
            known = _Known(weakref.ref(parameter), state, fingerprint(parameter, dtype, shape))
            self._known[id(parameter)] = known
        return known.digest

    def forget(self) -> None:
        """Hash every parameter again when it is next checked."""
        self._known.clear()


@dataclass(frozen=True, slots=True)
class _Known:
    parameter: weakref.ref[torch.Tensor]
    state: tuple[int, int, torch.dtype, str]
    digest: bytes | None


def _base_name(name: str, base: BaseRef) -> str:
    """Return what an entry's base is called in the base."""
    return base.parts[0].name if len(base.parts) == 1 else name


def _has_shape(parameter: torch.Tensor, shape: tuple[int, ...]) -> bool:
    """Tell whether a parameter has a shape; single scales count with any number of dimensions."""
    return tuple(parameter.shape) == shape or parameter.numel() == element_count(shape) == 1


def fingerprint(parameter: torch.Tensor, dtype: str, shape: tuple[int, ...] | None = None) -> bytes | None:
    """Return the fingerprint that a parameter has in the dtype of its file, or None if its bits are lost.

    A model that was loaded in a wider dtype, for example a BF16 file in float32, still has the file's bits.
    """
    wanted = TORCH_DTYPES[dtype]
    held: Any = parameter.detach()
    if is_distributed(held):
        held = held.full_tensor()
    plain = held.is_floating_point() and wanted.is_floating_point and 1 not in (held.element_size(), wanted.itemsize)
    wider = plain and torch.promote_types(held.dtype, wanted)
    if held.is_meta or held.dtype not in (wanted, wider):
        return None
    narrow = held.to(wanted)
    if narrow.dtype != held.dtype and not torch.equal(narrow.to(held.dtype), held):
        return None
    digest = hasher(dtype, tuple(held.shape) if shape is None else shape)
    # numpy has no BF16, so the bytes are taken as uint8.
    digest.update(narrow.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()
