"""SparseGPT: N of every M columns, quantized, and what is lost made up for by the columns after.

Frantar, Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot" (arXiv 2301.00774),
algorithm 1 with the mask of section 3.3 and joint quantization (section 3.5), on a delta and the second moments of the
fine-tune's own inputs, as in DeltaZip (Yao, Klimovic, arXiv 2312.05215);
:mod:`deltafmt.methods.sparsegpt_solver` has it.

Not as in the papers: rows may share positions; below 3 bits the scales are refitted to the codes by default; and
matrices see the inputs of the fine-tune itself, or with ``--sequential`` those that the compressed blocks before theirs
give.

A matrix without moments keeps entries at random and rescales them as :mod:`deltafmt.methods.deltadq` does, in the same
layout: its largest entries would not do. The bytes of a file depend on the libraries that run the model and the linear
algebra.
"""

from __future__ import annotations

from dataclasses import dataclass

from deltafmt.methods.base import DeltaRows, Method
from deltafmt.methods.common import (
    BITS,
    BitsOption,
    ChosenPositionOptions,
    KeptOptions,
    ScaleOptions,
    SolverOptions,
)
from deltafmt.methods.declare import option, values_of
from deltafmt.methods.deltadq import DeltaDQ
from deltafmt.methods.gptq import damping_note, default_refits
from deltafmt.methods.sparsegpt_solver import sparsegpt
from deltafmt.terms.nm.codec import NMArrays
from deltafmt.terms.nm.layout import NMLayout


@dataclass(frozen=True)
class PrunedOptions(ScaleOptions, ChosenPositionOptions, BitsOption, KeptOptions):
    """Options of N of every M columns that are chosen by the values.

    Attributes:
        n, m: N and M: entries kept in each group of M columns of a row.
        bits: k, width of a code.
        index: ``fixed``, or ``rank`` for cold files.
        share: v, consecutive rows that keep the same positions, those of the largest sums of scores.
        scale: ``minmax``, ``mse`` or None: mse for k below 4, minmax from there on; there is one scale a row.
        scale_dtype: ``BF16`` or ``F32``.
    """

    bits: int = option(4, BITS, values="1 to 6, or 8")


@dataclass(frozen=True)
class SparseGPT(SolverOptions, PrunedOptions, Method):
    """The method: the options of :class:`PrunedOptions`, and of the solver.

    Attributes:
        damping: share of the mean second moment that is added to all.
        refits: how often scales are refitted to the codes, which are then found anew; None: 2 for k below 3, 0 above.

    Raises:
        UsageError: an option is out of range.
    """

    name = "sparsegpt"
    summary = "N of every M columns, whose loss is made up for by later columns"
    details = (
        "N of every M columns are kept and rounded to codes of k bits, and what is lost is made up for by the columns "
        "after, given the second moments of the layer's inputs. A matrix without moments, such as an embedding, is "
        "compressed as deltadq does."
    )
    paper = "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot, algorithm 1 (arXiv 2301.00774)"
    stores = "an nm term: codes, scales and positions"
    example = "sparsegpt:nm=1:8,bits=2"
    whole = True
    calibration = "required"

    def check(self) -> None:
        """Check that the options make a layout."""
        _ = self.layout

    @property
    def dropout(self) -> DeltaDQ:
        """The method that compresses a matrix without moments."""
        return DeltaDQ(**values_of(PrunedOptions, self))

    @property
    def layout(self) -> NMLayout:
        """The layout of the term."""
        return self.dropout.layout

    def layouts(self, rows: int, columns: int) -> tuple[NMLayout]:  # noqa: ARG002 - the same for every shape
        """Return the layout of its one term."""
        return (self.layout,)

    def describe(self) -> str:
        """Return the method and its options in one line."""
        how = f"{self.dropout.scale_rule} damping={self.damping} refits={default_refits(self.bits, self.refits)}"
        return f"sparsegpt {self.layout.describe()} {how}"

    def compress(self, rows: DeltaRows, seed: int) -> tuple[NMArrays]:
        """Prune and quantize a matrix, or drop out of it at random where no moments of its inputs are given."""
        if rows.hessian is None:
            return self.dropout.compress(rows, seed)
        pruned = sparsegpt(
            rows.dense(),
            rows.hessian,
            self.layout,
            rule=self.dropout.scale_rule,
            damping=self.damping,
            refits=default_refits(self.bits, self.refits),
        )
        rows.notes.extend(damping_note(self.damping, pruned.damping))
        return (pruned.arrays,)
