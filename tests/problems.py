"""Random layers for the calibrated methods: weights, inputs of unlike scales that go together, their second moments."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def layer(seed: int, rows: int, columns: int, tokens: int = 0) -> tuple[Floats, Floats]:
    """Return weights and the Hessian of inputs whose features go together and differ in scale, as activations do."""
    rng = np.random.default_rng(seed)
    tokens = tokens or 4 * columns
    mixing = rng.standard_normal((columns, columns)) / np.sqrt(columns) + np.eye(columns)
    inputs = rng.standard_normal((tokens, columns)) @ mixing * np.exp(rng.normal(0, 0.7, columns))
    return rng.standard_normal((rows, columns), np.float32), (inputs.T @ inputs).astype(np.float32)


def weighted_error(difference: Floats, hessian: Floats) -> float:
    """Return trace(D H D^T) the long way."""
    wide = difference.astype(np.float64)
    return float(np.trace(wide @ hessian.astype(np.float64) @ wide.T))
