"""The figures of an evaluation: what base, fine-tune and deltas predict of a text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@dataclass(frozen=True, slots=True)
class ModelFigures:
    """What one model predicts, beside the fine-tune.

    Attributes:
        label: the path of the base, of the fine-tune, or of the delta file.
        role: ``base``, ``finetuned`` or ``delta``.
        size: the bytes of the weight files, or of the delta file.
        log_likelihood: the mean log-likelihood of a token, in nats.
        lost: how much lower that is than the fine-tune's, in nats.
        lost_error: the standard error of ``lost``, from the spread over sequences; None for fewer than two sequences.
        agreement: the share of tokens for which the most likely token is the fine-tune's.
        divergence: the mean KL divergence from the fine-tune's distribution, in nats; None where the vocabularies
            differ, so that it does not exist.
        quantiles: the divergence's quantiles ``QUANTILES`` over tokens; empty where ``divergence`` is None.
        followed: for each continuation, the number of tokens before the first one that the model would have chosen
            otherwise; all of them if there is none.
    """

    label: str
    role: str
    size: int
    log_likelihood: float
    lost: float
    lost_error: float | None
    agreement: float
    divergence: float | None
    quantiles: tuple[float, ...]
    followed: tuple[int, ...]

    def to_obj(self, lengths: Sequence[int], finetuned_bytes: int) -> dict[str, Any]:
        """Return a plain object for JSON; ``lengths`` are those of the whole continuations."""
        return {
            "label": self.label,
            "role": self.role,
            "bytes": self.size,
            "ratio": finetuned_bytes / self.size,
            "log_likelihood": finite(self.log_likelihood),
            "perplexity": perplexity(self.log_likelihood),
            "lost": finite(self.lost),
            "lost_standard_error": finite(self.lost_error),
            "agreement": self.agreement,
            "divergence": finite(self.divergence),
            "divergence_quantiles": dict(zip(map(str, QUANTILES), map(finite, self.quantiles), strict=False)) or None,
            "same_continuations": sum(a == b for a, b in zip(self.followed, lengths, strict=True)),
            "followed": list(self.followed),
        }


@dataclass(slots=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        text: the text's path.
        tokens: the number of tokens that were read.
        counted: the number of tokens whose predictions count.
        sequences: the number of sequences.
        continuations: the number of tokens in each continuation of the fine-tune.
        prompts: the number of tokens in front of each.
        finetuned_bytes: the bytes of the fine-tune's weight files.
        models: the base, the fine-tune, and the deltas in the order given.
        left_out: why a model has no figures, by its label.
    """

    text: str
    tokens: int
    counted: int
    sequences: int
    continuations: tuple[int, ...]
    prompts: tuple[int, ...]
    finetuned_bytes: int
    models: list[ModelFigures] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def base(self) -> ModelFigures | None:
        """The base's figures; None if it was left out."""
        return next((model for model in self.models if model.role == "base"), None)

    @property
    def finetuned(self) -> ModelFigures:
        """The fine-tune's figures."""
        return next(model for model in self.models if model.role == "finetuned")

    @property
    def deltas(self) -> list[ModelFigures]:
        """The figures of the deltas."""
        return [model for model in self.models if model.role == "delta"]

    def same(self, model: ModelFigures) -> int:
        """Return how many continuations a model would have written token for token."""
        return sum(a == b for a, b in zip(model.followed, self.continuations, strict=True))

    def to_obj(self) -> dict[str, Any]:
        """Return a plain object for JSON."""
        return {
            "text": self.text,
            "tokens": self.tokens,
            "counted": self.counted,
            "sequences": self.sequences,
            "continuations": list(self.continuations),
            "prompts": list(self.prompts),
            "finetuned_bytes": self.finetuned_bytes,
            "models": [model.to_obj(self.continuations, self.finetuned_bytes) for model in self.models],
            "left_out": self.left_out,
        }


def finite(value: float | None) -> float | None:
    """Return a number, or None for what JSON has no word for: a model may give a token of the text no chance at all."""
    return value if value is not None and math.isfinite(value) else None


def perplexity(log_likelihood: float) -> float | None:
    """Return the exponential of the mean loss; None where that is more than 1e300."""
    return math.exp(-log_likelihood) if -log_likelihood < math.log(1e300) else None


def lost_of(theirs: Sequence[NDArray[np.float64]], mine: Sequence[NDArray[np.float64]]) -> tuple[float, float | None]:
    """Return the mean difference of log-likelihoods over all tokens, and its standard error.

    Tokens of one sequence are not independent. The error is that of a ratio of sums over sequences: the root of
    n / (n - 1) sum (d_i - m t_i)^2 over the number of tokens, for the sum d_i of the differences of sequence i, its
    tokens t_i, the mean m and n sequences (Cochran, "Sampling Techniques", 3rd edition, equation 6.13).

    Args:
        theirs, mine: log-likelihoods of each token, an array for each sequence.
    """
    sums = np.array([float((a - b).sum()) for a, b in zip(theirs, mine, strict=True)])
    tokens = np.array([len(a) for a in theirs])
    mean = float(sums.sum() / tokens.sum())
    count = len(sums)
    if count < 2:
        return mean, None
    squares = float(np.square(sums - mean * tokens).sum())
    return mean, math.sqrt(count / (count - 1) * squares) / int(tokens.sum())


def followed(agreed: NDArray[np.bool_]) -> int:
    """Return the number of tokens before the first that differs."""
    other = np.flatnonzero(~agreed)
    return int(other[0]) if other.size else len(agreed)
