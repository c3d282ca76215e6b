"""Check that a model in memory is the base that a delta was packed against (spec/deltafmt-v1.md, section 7.5)."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from deltafmt.checkpoint.fingerprint import hasher
from deltafmt.errors import WrongBaseError
from deltafmt.index.entries import BaseRef, TensorEntry
from deltafmt.runtime.dtypes import TORCH_DTYPES
from deltafmt.runtime.values import version_of

_THREADS = 4  # each thread holds one tensor in host memory


class BaseCheck:
    """Compare a model's parameters with the fingerprints in deltas; an unchanged parameter is hashed only once."""

    def __init__(self, model_name: str) -> None:
        self._model = model_name
        self._known: dict[int, _Known] = {}

    def check(self, entries: Mapping[str, TensorEntry], parameters: Mapping[str, torch.Tensor]) -> list[str]:
        """Check every tensor that a delta takes from the base.

        Args:
            entries: the delta's entries by tensor name.
            parameters: the model's parameters by tensor name; tensors without a parameter are not checked.

        Returns:
            The names of the tensors that cannot be checked, because the model holds them in another form: quantized,
            or in a dtype from which the base's bits cannot be restored.

        Raises:
            WrongBaseError: a tensor differs; the message names the first one.
        """
        needed = [(name, entry.base) for name, entry in entries.items() if entry.base is not None]
        unchecked = []
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="deltafmt-base") as pool:
            digests = pool.map(lambda pair: self._digest(parameters.get(pair[0]), pair[1]), needed)
            try:
                for (name, base), digest in zip(needed, digests, strict=True):
                    if digest is None:
                        unchecked.append(name)
                    elif digest != base.digest:
                        raise WrongBaseError(
                            f'wrong base {self._model}: tensor "{name}" differs from the one that was packed against'
                        )
            finally:
                pool.shutdown(cancel_futures=True)
        return unchecked

    def _digest(self, parameter: torch.Tensor | None, base: BaseRef) -> bytes | None:
        if parameter is None or base.dtype not in TORCH_DTYPES or tuple(parameter.shape) != base.shape:
            return None
        known = self._known.get(id(parameter))
        state = (version_of(parameter), parameter.data_ptr(), parameter.dtype, base.dtype)
        if known is None or known.parameter() is not parameter or known.state != state:
            known = _Known(weakref.ref(parameter), state, fingerprint(parameter, base.dtype))
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


def fingerprint(parameter: torch.Tensor, dtype: str) -> bytes | None:
    """Return the fingerprint that a parameter has in the dtype of its file, or None if its bits are lost.

    A model that was loaded in a wider dtype, for example a BF16 file in float32, still has the file's bits.
    """
    wanted = TORCH_DTYPES[dtype]
    held = parameter.detach()
    wider = held.is_floating_point() and wanted.is_floating_point and torch.promote_types(held.dtype, wanted)
    if held.is_meta or held.dtype not in (wanted, wider):
        return None
    narrow = held.to(wanted)
    if narrow.dtype != held.dtype and not torch.equal(narrow.to(held.dtype), held):
        return None
    digest = hasher(dtype, tuple(held.shape))
    # numpy has no BF16, so the bytes are taken as uint8.
    digest.update(narrow.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()
