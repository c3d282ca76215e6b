"""The values of a tensor as PEFT computes with it, row by row: what no term of low rank says is stored so.

DoRA scales each output's weights to a learned length: ``m / |W + s B A| (W + s B A)``, where the length is that of the
weights of one output (Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", equation 5). The result is a tensor of
full rank, as a convolution's change is in general, and as trained rows of an embedding are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from deltafmt.checkpoint.safetensors_file import Tensor
from deltafmt.errors import InvalidFileError, NonFiniteError
from deltafmt.pipeline.lora_factors import Product, values_of
from deltafmt.terms.buffers import raw_bytes
from deltafmt.terms.floats import Raw, narrow, widen

Doubles = NDArray[np.float64]

# Elements that are computed at a time.
_STEP: Final = 2**20


@dataclass(slots=True)
class Change:
    """What an adapter does to one tensor.

    Attributes:
        products: products that are added; for a convolution and with DoRA there is one.
        own: the base's tensor as the adapter's model had it, if that differs from the base's.
        whole: a tensor that replaces it.
        rows: numbers of rows that are replaced, and the rows.
        bias: a vector that is added, and what it is multiplied by.
    """

    products: list[Product] = field(default_factory=list)
    own: Tensor | None = None
    whole: Tensor | None = None
    rows: tuple[tuple[int, ...], Tensor] | None = None
    bias: tuple[Tensor, float] | None = None

    @property
    def magnitude(self) -> Tensor | None:
        """DoRA's lengths, if there are any."""
        return next((p.factors.magnitude for p in self.products if p.factors.magnitude is not None), None)

    @property
    def low_rank(self) -> bool:
        """True if the change is a sum of products of matrices alone."""
        plain = self.whole is None and self.rows is None and self.bias is None and self.magnitude is None
        return plain and bool(self.products) and all(len(p.factors.a.shape) == 2 for p in self.products)


class Merged:
    """A tensor with its change.

    Args:
        base: the tensor that the change applies to.
        change: the change; ``whole`` is not set.
    """

    def __init__(self, base: Tensor, change: Change) -> None:
        self._source = change.own or base
        self._change = change
        self.dtype, self.shape = self._source.dtype, self._source.shape
        self._blocks = [block for product in change.products for block in _blocks(product, self._source)]
        self._factors = self._dora()

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self._source.nbytes

    def pieces(self, first_row: int = 0) -> Iterator[bytes]:
        """Give the tensor's bytes from a row on.

        Raises:
            NonFiniteError: an element is beyond the dtype's range.
        """
        for start, stop in self._steps(first_row):
            yield bytes(raw_bytes(self.raw(start, stop)))

    def raw(self, start: int, stop: int) -> Raw:
        """Return rows, rounded to the tensor's dtype."""
        values = self._values(start, stop)
        with np.errstate(over="ignore"):
            raw = narrow(values.astype(np.float32), self.dtype)
            if not np.isfinite(widen(raw, self.dtype)).all():
                raise NonFiniteError(f'tensor "{self._source.name}" plus its change is not finite in {self.dtype}')
        return raw

    def _values(self, start: int, stop: int) -> Doubles:
        values = self._sum(start, stop)
        if self._factors is not None:
            # One factor an output: for a run of rows of a convolution, for a column of what is stored transposed.
            transposed = self._change.products[0].transposed
            inner = self._source.rows // self._source.shape[0]
            values *= self._factors[None] if transposed else self._factors[np.arange(start, stop) // inner, None]
        if self._change.rows is not None:
            numbers, tensor = self._change.rows
            with tensor.row_range(0, tensor.rows) as trained:
                for place, row in enumerate(numbers):
                    if start <= row < stop:
                        values[row - start] = widen(trained[place : place + 1], tensor.dtype)[0]
        if self._change.bias is not None:
            tensor, scaling = self._change.bias
            values += values_of(tensor).reshape(1, -1).astype(np.float64) * scaling
        return values

    def _sum(self, start: int, stop: int) -> Doubles:
        """Return rows of the base plus the products."""
        with self._source.row_range(start, stop) as raw:
            values = widen(raw, self.dtype).astype(np.float64)
        for at, u, v in self._blocks:
            if len(self._change.products[0].factors.a.shape) == 2:
                first, last = max(start, at), min(stop, at + u.shape[1])
                if first < last:
                    part = u[:, first - at : last - at].astype(np.float64).T @ v.astype(np.float64)
                    values[first - start : last - start] += part
            else:
                # A convolution's rows are parts of the product's rows.
                inner, columns = self._source.rows // u.shape[1], self._source.columns
                first, last = start // inner, -(-stop // inner)
                dense = u[:, first:last].astype(np.float64).T @ v.astype(np.float64)
                values += dense.reshape(-1, columns)[start - first * inner : stop - first * inner]
        return values

    def _dora(self) -> Doubles | None:
        """Return what each output's weights are multiplied by, or None without DoRA."""
        magnitude = self._change.magnitude
        if magnitude is None:
            return None
        (product,) = self._change.products
        squares: Doubles
        if product.transposed:
            squares = np.zeros(self._source.columns)
            for start, stop in self._steps():
                squares += np.square(self._sum(start, stop)).sum(axis=0)
        else:
            squares = np.zeros(self._source.rows)
            for start, stop in self._steps():
                squares[start:stop] = np.square(self._sum(start, stop)).sum(axis=1)
            squares = squares.reshape(self._source.shape[0], -1).sum(axis=1)
        lengths = values_of(magnitude).astype(np.float64).ravel()
        if lengths.shape != squares.shape:
            raise InvalidFileError(
                f'{magnitude.file.path}: tensor "{magnitude.name}" {list(magnitude.shape)} is not one length for each '
                f'of the {squares.size} outputs of "{self._source.name}"'
            )
        with np.errstate(divide="ignore", invalid="ignore"):
            return lengths / np.sqrt(squares)

    def _steps(self, first: int = 0) -> Iterator[tuple[int, int]]:
        rows, step = self._source.rows, max(1, _STEP // max(self._source.columns, 1))
        for start in range(first, rows, step):
            yield start, min(start + step, rows)


def _blocks(product: Product, source: Tensor) -> Iterator[tuple[int, NDArray[np.floating], NDArray[np.floating]]]:
    """Give the vectors of a product by blocks of rows: the first row, and the vectors; a block for each expert.

    Those of a convolution's kernels have all of a kernel's elements in v.
    """
    if product.experts > 1 and product.expert is None:
        rows = source.rows // product.experts
        a, b = product.stacked()
        u, v = (a, b) if product.transposed else (b, a)
        for expert in range(product.experts):
            yield expert * rows, u[expert], v[expert]
        return
    u, v = product.sides()
    if u.shape[1] * v.shape[1] != source.rows * source.columns:
        message = f"{list(source.shape)} where the factors are of {[u.shape[1], v.shape[1]]}"
        raise InvalidFileError(f'{source.file.path}: tensor "{source.name}" is {message}')
    yield 0, u, v


def same_change(first: Change, second: Change) -> bool:
    """Tell whether two tied tensors are changed alike: an embedding and the head that has its transpose's factors."""
    if first.rows is not None or second.rows is not None:
        if first.rows is None or second.rows is None or first.rows[0] != second.rows[0]:
            return False
        return first.rows[1].equals(second.rows[1]) and not (first.products or second.products)
    if (first.whole is None) != (second.whole is None) or len(first.products) != len(second.products):
        return False
    if first.whole is not None and second.whole is not None:
        return first.whole.equals(second.whole)
    if first.own is not None and second.own is not None and not first.own.equals(second.own):
        return False
    for mine, theirs in zip(first.products, second.products, strict=True):
        if mine.scaling != theirs.scaling or mine.rank != theirs.rank:
            return False
        if mine.factors.magnitude is not None or theirs.factors.magnitude is not None:
            return False
        # The scaling is left out: it lies on either side.
        plain = (replace(product, scaling=1.0).sides() for product in (mine, theirs))
        (u, v), (other_u, other_v) = plain
        if not np.array_equal(u, other_u) or not np.array_equal(v, other_v):
            return False
    return True
