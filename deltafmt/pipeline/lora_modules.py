"""The modules of the adapter that ``export_lora`` makes of a delta, and their factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltafmt.checkpoint.adapter import PREFIX, is_conv1d, is_embedding, may_be_conv1d
from deltafmt.checkpoint.folder_writer import TensorSpec
from deltafmt.delta import DeltaFile
from deltafmt.errors import NonFiniteError, Remedy, UsageError
from deltafmt.index.entries import TensorEntry
from deltafmt.pipeline.lora_factors import factors_of
from deltafmt.terms.floats import Raw, narrow, widen
from deltafmt.terms.lowrank.codec import LowRankCodec
from deltafmt.terms.lowrank.layout import LowRankLayout


@dataclass(frozen=True, slots=True)
class LoraModule:
    """A module with factors.

    Attributes:
        name: the module's name.
        entry: the entry of the module's weight.
        bands: the layouts of the entry's terms.
        embedding: True for an embedding.
        conv1d: True for a Conv1D module of GPT-2, which stores the transpose of its weight.
        dtype: the dtype in which the factors are written.
    """

    name: str
    entry: TensorEntry
    bands: tuple[LowRankLayout, ...]
    embedding: bool
    conv1d: bool
    dtype: str

    @property
    def rank(self) -> int:
        """Number of vectors of all bands."""
        return sum(band.rank for band in self.bands)

    @property
    def transposed(self) -> bool:
        """True if the weight is the transpose of a linear module's weight."""
        return self.embedding or self.conv1d

    def specs(self) -> tuple[TensorSpec, TensorSpec]:
        """Return A and B as PEFT names them."""
        start = f"{PREFIX}{self.name}.lora_{'embedding_' if self.embedding else ''}"
        end = "" if self.embedding else ".weight"
        into, out = self.entry.shape if self.transposed else self.entry.shape[::-1]
        a = TensorSpec(f"{start}A{end}", self.dtype, (self.rank, into))
        return a, TensorSpec(f"{start}B{end}", self.dtype, (out, self.rank))

    def factors(self, delta: DeltaFile) -> tuple[Raw, Raw]:
        """Decode A and B.

        Raises:
            NonFiniteError: an element is beyond the dtype's range.
        """
        entry = self.entry
        both = [
            LowRankCodec(band, *entry.shape).vectors(delta.term_views(entry, term))
            for band, term in zip(self.bands, entry.terms, strict=True)
        ]
        u, v = (np.concatenate(parts) for parts in zip(*both, strict=True))
        a, b = (narrow(factor, self.dtype) for factor in factors_of(u, v, transposed=self.transposed))
        if not all(np.isfinite(widen(factor, self.dtype)).all() for factor in (a, b)):
            raise NonFiniteError(f'tensor "{entry.name}": a factor has values beyond the range of {self.dtype}')
        return a, b


def lora_modules(
    delta: DeltaFile, entries: list[TensorEntry], config: Mapping[str, Any], dtype: str | None
) -> list[LoraModule]:
    """Return the modules that have factors, in natural order.

    Raises:
        UsageError: a tensor's delta cannot be an adapter's (names the first), or no tensor has a low-rank delta.
    """
    found = []
    for entry in entries:
        where = f'{delta.container.name}: tensor "{entry.name}"'
        if entry.target is not None and delta[entry.target].action != "same":
            raise UsageError(f"{where} is tied to {entry.target}, which an adapter cannot say")
        if not entry.terms:
            continue
        bands = tuple(term.layout for term in entry.terms if isinstance(term.layout, LowRankLayout))
        if len(bands) < len(entry.terms):
            kind = next(term.layout.kind for term in entry.terms if term.layout.kind != LowRankLayout.kind)
            raise UsageError(f"{where} has a term of kind {kind}; an adapter has lowrank terms alone")
        module, _, last = entry.name.rpartition(".")
        if not module or last != "weight" or len(entry.shape) != 2:
            raise UsageError(f"{where} of shape {list(entry.shape)} is not the weight matrix of a module")
        if entry.base is None or entry.base.shape != entry.shape:
            raise UsageError(f"{where} has other rows than its base, which an adapter cannot say")
        if not config and may_be_conv1d(module):
            text = f"{where} may be stored transposed, which only its base's config.json tells"
            raise UsageError(text, Remedy("base", None))
        stored = {band.factors if isinstance(band.factors, str) else "F32" for band in bands}
        written = dtype or (stored.pop() if len(stored) == 1 else "F32")
        found.append(LoraModule(module, entry, bands, is_embedding(module), is_conv1d(module, config), written))
    if not found:
        raise UsageError(f"{delta.container.name}: no tensor has a low-rank delta")
    return found
