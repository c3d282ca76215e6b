"""What calibration hands to whoever asked for it, and what it takes back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Moments:
    """Second moments of a linear module's inputs.

    Attributes:
        matrix: H = sum of x x^T, float32, shape (in_features, in_features).
        tokens: how many inputs were summed.
        axis: the dimension of the weight that runs over the inputs: 1, or 0 for modules that store ``weight[in, out]``.
    """

    matrix: NDArray[np.float32]
    tokens: int
    axis: int = 1


# Given a module's name, its weight's name and the moments of its inputs, returns the weight that the modules after it
# shall see (a numpy array or a torch tensor of the weight's shape), or None to leave it as it is.
OnModule = Callable[[str, str, Moments], Any]
# Given the names of parameters of which all moments have been handed out, and of those whose moments are still to come,
# returns names and new values of parameters, float arrays of their shapes: what runs after them sees these.
OnStage = Callable[[Sequence[str], frozenset[str]], Iterable[tuple[str, Any]]]
# Given how many steps are done and how many there are.
OnProgress = Callable[[int, int], None]


@dataclass(slots=True)
class CalibrationResult:
    """What a calibration did.

    Attributes:
        tokens: in all sequences together.
        blocks: of the model; 0 where the model was run as a whole.
        modules: names of those whose moments were handed out in this run, in order.
        uncalled: names of linear modules that the texts never reached.
        resumed: blocks that an earlier run had finished.
    """

    tokens: int
    blocks: int
    modules: list[str] = field(default_factory=list)
    uncalled: list[str] = field(default_factory=list)
    resumed: int = 0
