"""What a model predicts beside what the fine-tune predicts, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from deltafmt.analysis.evaluation.readers import Reader
from deltafmt.analysis.evaluation.texts import Span
from deltafmt.calibration.tokens import Batch

Doubles = NDArray[np.float64]


@dataclass(slots=True)
class Predictions:
    """Figures of the tokens of each span that count, in the order of the spans.

    Attributes:
        likelihoods: the log-likelihood of each token, in nats.
        agreed: True where the most likely token is the fine-tune's.
        divergences: the KL divergence of the model's distribution from the fine-tune's, in nats; empty if they are
            over different vocabularies.
    """

    likelihoods: list[Doubles] = field(default_factory=list)
    agreed: list[NDArray[np.bool_]] = field(default_factory=list)
    divergences: list[Doubles] = field(default_factory=list)


def compared(reader: Reader, reference: Reader, spans: Sequence[Span], batches: Sequence[Batch]) -> Predictions:
    """Compare a model with the fine-tune; both have read the batches of the spans.

    The divergence of Q from the fine-tune's P is KL(P || Q) = sum of p (log p - log q), 0 if they are equal.

    Args:
        reader: the model; may be the fine-tune's reader itself.
        reference: the fine-tune's reader.
        spans: the spans.
        batches: their batches.

    Raises:
        NonFiniteError: a prediction is not finite.
    """
    likelihoods: dict[int, Doubles] = {}
    agreed: dict[int, NDArray[np.bool_]] = {}
    divergences: dict[int, Doubles] = {}
    for place, batch in enumerate(batches):
        wanted = reference.logits(place)
        found = wanted if reader is reference else reader.logits(place)
        for row, number in enumerate(batch.numbers):
            span = spans[number]
            # The prediction of a token is made after the token before it.
            made = slice(span.first - 1, span.stop - 1)
            targets = torch.from_numpy(span.tokens[span.first : span.stop]).to(found.device)
            theirs = wanted[row, made].log_softmax(-1)
            mine = theirs if found is wanted else found[row, made].log_softmax(-1)
            likelihoods[number] = _numbers(mine.gather(-1, targets[:, None])[:, 0])
            agreed[number] = (mine.argmax(-1) == theirs.argmax(-1)).cpu().numpy()
            if mine.shape == theirs.shape:
                divergences[number] = _numbers(_divergence(theirs, mine))
    order = range(len(spans))
    result = Predictions([likelihoods[i] for i in order], [agreed[i] for i in order])
    if len(divergences) == len(spans):
        result.divergences = [divergences[i] for i in order]
    return result


def _divergence(theirs: torch.Tensor, mine: torch.Tensor) -> torch.Tensor:
    """Return KL(theirs || mine) of log-probabilities along the last dimension; rounding never makes it negative."""
    parts = theirs.exp() * (theirs - mine)
    # A token that the fine-tune never says adds nothing, whatever the model says of it.
    parts = torch.where(theirs > -torch.inf, parts, torch.zeros_like(parts))
    return parts.sum(-1, dtype=torch.float64).clamp_min(0)


def _numbers(values: torch.Tensor) -> Doubles:
    numbers: Doubles = values.double().cpu().numpy()
    return numbers
