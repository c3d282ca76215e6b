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

from deltafmt.errors import UsageError
from deltafmt.methods.base import DeltaRows, Method
from deltafmt.methods.deltadq import DeltaDQ, read_nm
from deltafmt.methods.gptq import check_solver, damping_note, default_refits
from deltafmt.methods.hessian import DAMPING
from deltafmt.methods.options import option
from deltafmt.methods.sparsegpt_solver import sparsegpt
from deltafmt.terms.nm.codec import NMArrays
from deltafmt.terms.nm.layout import NMLayout


@dataclass(frozen=True, slots=True)
class SparseGPT(Method):
    """Options of the method.

    Attributes:
        n, m: N and M: entries kept in each group of M columns of a row.
        bits: k, width of a code.
        index: ``fixed``, or ``rank`` for cold files.
        share: v, consecutive rows that keep the same positions, those of the largest sums of scores.
        scale: ``minmax``, ``mse`` or None: mse for k below 4, minmax from there on; there is one scale a row.
        scale_dtype: ``BF16`` or ``F32``.
        damping: share of the mean second moment that is added to all.
        refits: how often scales are refitted to the codes, which are then found anew; None: 2 for k below 3, 0 above.

    Raises:
        UsageError: an option is out of range.
    """

    n: int = option(4, "keep N of every M columns (4:16)", "N:M", key="nm", parse=read_nm)
    m: int = 16
    bits: int = option(4, "bits of a code: 1-6, 8 (4)", "K")
    index: str = option("fixed", "fixed, or rank (cold files) (fixed)", "KIND")
    share: int = option(1, "rows that share positions: 1, 2, 4, 8 (1)", "V")
    scale: str | None = option(None, "minmax or mse (mse below 4 bits)", "RULE")
    scale_dtype: str = option("BF16", "BF16 or F32 (BF16)", "DTYPE")
    damping: float = option(DAMPING, "added to the moments, as a share of their mean (0.01)", "SHARE")
    refits: int | None = option(None, "times that scales are refitted to the codes (2 below 3 bits, else 0)", "N")

    name = "sparsegpt"
    summary = "N of every M columns, what is lost made up for by later columns (SparseGPT; needs --calibration)"
    whole = True
    calibration = "required"

    def __post_init__(self) -> None:
        check_solver(self.damping, self.refits)
        if self.index == "seeded":
            raise UsageError("index 'seeded' cannot hold positions that the values choose; use fixed or rank")
        _ = self.layout

    @property
    def dropout(self) -> DeltaDQ:
        """What a matrix without moments is compressed by."""
        return DeltaDQ(
            self.n,
            self.m,
            self.bits,
            self.index,
            self.share,
            scale=self.scale,
            scale_dtype=self.scale_dtype,
        )

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
