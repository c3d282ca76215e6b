"""The callbacks of a calibration: the values that it hands to its caller, and the values that it takes back."""

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
        tokens: the number of inputs x in the sum.
        axis: the dimension of the weight that runs over the inputs: 1, or 0 for modules that store ``weight[in, out]``.
    """

    matrix: NDArray[np.float32]
    tokens: int
    axis: int = 1


# on_module(module name, weight name, moments of the inputs) is called for each linear module. It returns a new weight
# for the run of the later modules (a numpy array or torch tensor of the weight's shape), or None to keep the old one.
OnModule = Callable[[str, str, Moments], Any]
# on_stage(settled, awaited) receives the names of parameters whose moments are all handed out, and the names of weights
# whose moments are still to come. It returns names and new values of parameters (float arrays of the parameters'
# shapes), with which the later modules are run.
OnStage = Callable[[Sequence[str], frozenset[str]], Iterable[tuple[str, Any]]]
# on_progress(done, total) receives the number of finished steps and the number of all steps.
OnProgress = Callable[[int, int], None]


@dataclass(slots=True)
class CalibrationResult:
    """The result of a calibration.

    Attributes:
        tokens: the number of tokens in all sequences together.
        blocks: the number of the model's blocks; 0 if the model was run as a whole.
        modules: the names of the modules whose moments were handed out in this run, in order.
        uncalled: the names of the linear modules that the texts never reached.
        resumed: the number of blocks that an earlier run had finished.
    """

    tokens: int
    blocks: int
    modules: list[str] = field(default_factory=list)
    uncalled: list[str] = field(default_factory=list)
    resumed: int = 0
