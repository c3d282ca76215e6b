"""Second moments of a module's inputs, factored as GPTQ and SparseGPT need them.

For a layer y = W x the squared error of its outputs over a calibration set is trace((W - Q) H (W - Q)^T) with
H = sum of x x^T; both methods walk down the columns with the upper Cholesky factor of the inverse of H (GPTQ,
arXiv 2210.17323, section 3.3, step 3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from deltafmt.errors import NonFiniteError, UsageError

Floats = NDArray[np.float32]
Factor = TypeVar("Factor")

DAMPING = 0.01
# A matrix that cannot be factored is damped tenfold more, up to this many times the mean of its diagonal.
MOST_DAMPING = 1e4


@dataclass(frozen=True, slots=True)
class InverseFactor:
    """The factor of a damped inverse.

    Attributes:
        upper: U, float32, upper triangular, with (H + damping I)^-1 = U^T U.
        damping: the share of the diagonal's mean that was added to it; more than was asked for if H is singular.
        dead: columns whose inputs were always zero.
    """

    upper: Floats
    damping: float
    dead: NDArray[np.bool_]


def check_hessian(hessian: NDArray[np.floating], columns: int) -> None:
    """Check shape and content of H.

    Raises:
        UsageError: it is not square or not of ``columns`` columns.
        NonFiniteError: an element is NaN or infinite.
    """
    if hessian.shape != (columns, columns):
        raise UsageError(f"a hessian of shape {list(hessian.shape)} does not fit {columns} columns")
    if not np.isfinite(hessian).all():
        raise NonFiniteError("the hessian is not finite")


def damp(hessian: NDArray[np.floating], damping: float) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return H + damping * mean(diag H) I in float64, and its dead columns, which get a one on the diagonal.

    The mean is over the columns that are not dead, so that these do not weaken the damping of the others.
    """
    damped = hessian.astype(np.float64)
    diagonal = np.diagonal(damped).copy()
    dead = diagonal <= 0
    mean = diagonal[~dead].mean() if not dead.all() else 1.0
    damped[dead, :] = 0
    damped[:, dead] = 0
    np.fill_diagonal(damped, np.where(dead, mean, diagonal + damping * mean))
    return damped, dead


def inverse_factor(hessian: NDArray[np.floating], damping: float = DAMPING) -> InverseFactor:
    """Factor the damped inverse of H.

    With R the upper triangular matrix for which H = R R^T (a Cholesky factorization from the last column back), U is
    the inverse of R: one factorization and one triangular inverse, in float64.

    Args:
        hessian: shape (columns, columns), symmetric, positive semidefinite.
        damping: share of the mean diagonal to add; raised tenfold as long as the factorization fails.

    Raises:
        UsageError: the damping is negative, or no damping makes the matrix positive definite.
    """
    if damping < 0:
        raise UsageError(f"damping {damping} is negative")
    return InverseFactor(*factor_damped(hessian, damping, _upper))


def factor_damped(
    hessian: NDArray[np.floating], damping: float, factor: Callable[[NDArray[np.float64]], Factor | None]
) -> tuple[Factor, float, NDArray[np.bool_]]:
    """Factor the damped H, with more damping for as long as it cannot be factored.

    Args:
        hessian: H, symmetric, positive semidefinite.
        damping: share of the mean diagonal to add at first.
        factor: gives the factor of a damped matrix, or None if that matrix has none.

    Returns:
        The factor, the share that was added, and the dead columns.

    Raises:
        UsageError: no damping makes the matrix positive definite.
    """
    share = damping
    while True:
        damped, dead = damp(hessian, share)
        found = factor(damped)
        if found is not None:
            return found, share, dead
        share = max(share * 10, 1e-6)
        if share > MOST_DAMPING:
            raise UsageError("the hessian is not positive semidefinite, however much it is damped")


def _upper(damped: NDArray[np.float64]) -> Floats | None:
    """Return U, or None where the matrix is not positive definite or U does not fit float32."""
    try:
        lower = np.linalg.cholesky(damped[::-1, ::-1])
        upper = np.triu(np.linalg.inv(lower[::-1, ::-1])).astype(np.float32)
    except np.linalg.LinAlgError:
        return None
    return upper if np.isfinite(upper).all() and (np.diagonal(upper) > 0).all() else None


def output_error(difference: Floats, hessian: NDArray[np.floating]) -> float:
    """Return trace(D H D^T), the squared error of the outputs when a weight is off by D."""
    wide = difference.astype(np.float64)
    return float(np.einsum("ij,ij->", wide @ hessian.astype(np.float64), wide))
