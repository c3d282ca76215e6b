"""The loss of a delta file, tensor by tensor, in the weights and in the outputs (Delta-CoMe, section 6.1, table 8).

Every loss compares the true delta with the delta that the file decodes to.
"""

from __future__ import annotations

import contextlib
import glob
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltafmt.analysis.norms import relative
from deltafmt.analysis.pairs import Floats, TensorPair
from deltafmt.delta import DeltaFile, RunDecoder
from deltafmt.errors import WrongBaseError
from deltafmt.index.entries import TensorEntry
from deltafmt.methods.base import Method
from deltafmt.pipeline.pack import pack

OUTLIERS = 0.01  # the share of a layer's outputs that count as outliers: the 1% largest in magnitude


@dataclass(frozen=True, slots=True)
class Approximation:
    """The loss of one tensor as sums of squares.

    Attributes:
        squares: the sum of squares of the delta's elements.
        lost: the sum of squares of the difference between the delta and its decoded form.
        output_squares, output_lost: the same two sums over the delta's outputs for some inputs.
        outputs: the number of outputs; 0 if the tensor is not the weight of a linear layer.
        outliers, outlier_lost: the number of the fine-tune's outputs that are outliers, and ``output_lost`` over those.
    """

    squares: float
    lost: float
    output_squares: float = 0.0
    output_lost: float = 0.0
    outputs: int = 0
    outliers: int = 0
    outlier_lost: float = 0.0

    def to_obj(self) -> dict[str, Any]:
        """Return a plain object for JSON."""
        obj: dict[str, Any] = {"relative_squared": ratio(self.lost, self.squares)}
        if self.outputs:
            obj |= {
                "output_relative_squared": ratio(self.output_lost, self.output_squares),
                "output_mean_squared": self.output_lost / self.outputs,
                "outlier_mean_squared": self.outlier_lost / self.outliers,
            }
        return obj


def ratio(lost: float, squares: float) -> float | None:
    """Return ``lost / squares``; 0 for 0 / 0, and None if only ``squares`` is 0."""
    root = relative(lost, squares)
    return None if root is None else root * root


def pooled(several: Sequence[Approximation]) -> Approximation:
    """Return the loss of several tensors together."""
    return Approximation(*(sum(getattr(one, name) for one in several) for name in Approximation.__slots__))


@contextlib.contextmanager
def packed(
    base: str | os.PathLike[str],
    finetuned: str | os.PathLike[str],
    method: Method,
    leave_out: Sequence[str] = (),
    **named: Any,
) -> Iterator[Path]:
    """Give the path of a temporary delta file that a method makes.

    Args:
        base, finetuned: the checkpoints.
        method: the method.
        leave_out: names of tensors that are stored whole.
        named: the arguments of :func:`deltafmt.pack` about names and variants.
    """
    with tempfile.TemporaryDirectory(prefix="deltafmt-") as folder:
        out = Path(folder) / "analyzed.deltafmt"
        exclude = [glob.escape(name) for name in leave_out]
        pack(base, finetuned, out, method=method, exclude=exclude, missing="removed", **named)
        yield out


def approximation_of(pair: TensorPair, delta: DeltaFile, inputs: Floats | None) -> Approximation | None:
    """Return the loss of a tensor in a delta file; None if the file stores the tensor exactly.

    Args:
        pair: the tensor in both checkpoints.
        delta: the delta file.
        inputs: vectors x, shape (vectors, columns), for which outputs are compared; None to compare weights only.

    Raises:
        WrongBaseError: the file lacks the tensor, or has it in another shape.
    """
    entry = _entry(pair, delta)
    if not entry.terms:
        return None
    if entry.leading != pair.finetuned.leading:
        # A writer may choose other rows than pack does, and other columns than the inputs have.
        pair, inputs = pair.as_matrix(entry.leading), None
    decoder = RunDecoder(delta, entry)
    squares = lost = 0.0
    outputs: list[list[NDArray[np.float64]]] = [[], [], []]
    for start, stop in decoder.ranges():
        block = pair.rows_of(start, stop)
        error = block.delta - decoder.rows(start, stop)
        squares += float(np.square(block.delta, dtype=np.float64).sum())
        lost += float(np.square(error, dtype=np.float64).sum())
        if inputs is not None:
            for parts, rows in zip(outputs, (block.finetuned, block.delta, error), strict=True):
                parts.append((rows @ inputs.T).astype(np.float64).reshape(-1))
    if inputs is None:
        return Approximation(squares, lost)
    whole, wanted, missed = map(np.concatenate, outputs)
    count = max(round(OUTLIERS * len(whole)), 1)
    largest = np.argpartition(-np.abs(whole), count - 1)[:count]
    return Approximation(
        squares,
        lost,
        float(np.square(wanted).sum()),
        float(np.square(missed).sum()),
        len(whole),
        count,
        float(np.square(missed[largest]).sum()),
    )


def _entry(pair: TensorPair, delta: DeltaFile) -> TensorEntry:
    if pair.name not in delta:
        raise WrongBaseError(f'{delta.container.name}: no tensor "{pair.name}", which the fine-tune has')
    entry = delta.resolve(pair.name)
    if entry.shape != pair.finetuned.shape:
        found = f"{list(entry.shape)}, not {list(pair.finetuned.shape)}"
        raise WrongBaseError(f'{delta.container.name}: tensor "{pair.name}" has shape {found}')
    return entry
