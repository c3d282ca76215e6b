"""The modules and parameters of the adapter that ``export_lora`` makes of a delta, and their factors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deltafmt.checkpoint.parameter_names import Piece
from deltafmt.delta import DeltaFile
from deltafmt.errors import NonFiniteError
from deltafmt.format import constants as c
from deltafmt.index.entries import TensorEntry
from deltafmt.pipeline.lora_factors import factors_of
from deltafmt.terms.floats import Raw, narrow, widen
from deltafmt.terms.lowrank.codec import LowRankCodec
from deltafmt.terms.lowrank.layout import LowRankLayout

Floats = NDArray[np.float32]

# Bytes of memory for each element of a term's vectors: its code, the value, and the value joined with other terms'.
VECTOR_BYTES = 12


@dataclass(frozen=True, slots=True)
class LoraModule:
    """A parameter with factors.

    Attributes:
        parameter: the parameter's name.
        shape: the parameter's shape.
        parts: the tensors that it is made of, and their entries. Tensors that do not change are left out.
        embedding: True for an embedding's weight.
        crossed: True if a matrix has the rows and columns of a linear module's exchanged, as GPT-2's have.
        own: True if the parameter is a target by itself (``target_parameters``), not by its module.
        dtype: the dtype in which the factors are written.
    """

    parameter: str
    shape: tuple[int, ...]
    parts: tuple[tuple[Piece, TensorEntry], ...]
    embedding: bool = False
    crossed: bool = False
    own: bool = False
    dtype: str = "F32"

    @property
    def name(self) -> str:
        """The module's name."""
        return self.parameter.rpartition(".")[0]

    @property
    def target(self) -> str:
        """What PEFT looks up patterns by: the module's name, or that of a parameter that is a target itself."""
        return self.parameter if self.own else self.name

    @property
    def experts(self) -> int:
        """The matrices of the parameter."""
        return self.shape[0] if len(self.shape) == 3 else 1

    def rank(self, delta: DeltaFile) -> int:
        """Return the vectors of each matrix, at most."""
        if self.experts == 1:
            return sum(_rank(entry) for _, entry in self.parts)
        by_expert = dict.fromkeys(range(self.experts), 0)
        for piece, entry in self.parts:
            if piece.expert is None:
                u, _ = vectors(delta, entry)
                blocks = np.asarray(u.reshape(len(u), self.experts, -1).any(axis=2))
                for expert in by_expert:
                    by_expert[expert] += int(blocks[:, expert].sum())
            else:
                by_expert[piece.expert] += _rank(entry)
        return max(by_expert.values()) or 1

    def shapes(self, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the shapes of A and B."""
        rows, columns = self.shape[-2:]
        into, out = (rows, columns) if self.embedding or self.crossed else (columns, rows)
        return (rank * self.experts, into), (out, rank * self.experts)

    def factors(self, delta: DeltaFile, rank: int) -> tuple[Raw, Raw]:
        """Decode A and B.

        Raises:
            NonFiniteError: an element is beyond the dtype's range.
        """
        rows, columns = self.shape[-2:]
        u = np.zeros((self.experts, rank, rows), np.float32)
        v = np.zeros((self.experts, rank, columns), np.float32)
        filled = [0] * self.experts
        for piece, entry in self.parts:
            mine, theirs = vectors(delta, entry)
            for expert in range(self.experts) if piece.expert is None else (piece.expert,):
                part, other = mine, theirs
                if piece.expert is None and self.experts > 1:
                    block = mine.reshape(len(mine), self.experts, rows)[:, expert]
                    used = block.any(axis=1)
                    part, other = block[used], theirs[used]
                first, last = filled[expert], filled[expert] + len(part)
                u[expert, first:last, piece.start : piece.start + part.shape[1]] = part
                v[expert, first:last] = other
                filled[expert] = last
        if self.experts == 1:
            both = factors_of(u[0], v[0], transposed=self.embedding or self.crossed)
        else:
            a, b = (u, v) if self.crossed else (v, u)
            # PEFT counts A's rows expert by expert, and B's columns rank by rank.
            both = a.reshape(-1, a.shape[2]), np.ascontiguousarray(b.swapaxes(0, 1).reshape(-1, b.shape[2]).T)
        found = narrow(both[0], self.dtype), narrow(both[1], self.dtype)
        if not all(np.isfinite(widen(factor, self.dtype)).all() for factor in found):
            raise NonFiniteError(f'tensor "{self.parameter}": a factor has values beyond the range of {self.dtype}')
        return found


def vectors(delta: DeltaFile, entry: TensorEntry) -> tuple[Floats, Floats]:
    """Decode the vectors of all terms of an entry, u and v."""
    rows = c.row_count(entry.shape)
    elements = _rank(entry) * (rows + entry.columns)
    container = delta.container
    what = f'{container.name}: the vectors of "{entry.name}" take'
    container.limits.check_memory(VECTOR_BYTES * elements, container.size, what)
    both = [
        LowRankCodec(term.layout, rows, entry.columns).vectors(delta.term_views(entry, term))
        for term in entry.terms
        if isinstance(term.layout, LowRankLayout)
    ]
    u, v = (np.concatenate(parts) for parts in zip(*both, strict=True))
    return u, v


def stored_dtype(entries: list[TensorEntry], dtype: str | None) -> str:
    """Return the dtype in which factors are written: as all terms are stored, or F32 for codes and for several."""
    stored = {
        term.layout.factors if isinstance(term.layout.factors, str) else "F32"
        for entry in entries
        for term in entry.terms
        if isinstance(term.layout, LowRankLayout)
    }
    return dtype or (stored.pop() if len(stored) == 1 else "F32")


def _rank(entry: TensorEntry) -> int:
    return sum(term.layout.rank for term in entry.terms if isinstance(term.layout, LowRankLayout))
