"""Greedy continuations of the fine-tune: at every step the most likely token.

Only the fine-tune writes. Another model reads prompt and continuation once. Up to the first token at which it would
have chosen otherwise, its own greedy continuation is the same, so that this is where the two part.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deltafmt.analysis.evaluation.readers import Reader, Tick
from deltafmt.analysis.evaluation.texts import Span
from deltafmt.calibration.tokens import Tokens, batched


def continued(
    reader: Reader, prompts: Sequence[Tokens], count: int, ends: frozenset[int], batch_tokens: int, tick: Tick
) -> list[Span]:
    """Return prompts with their greedy continuations, which are the parts that count.

    Args:
        reader: the model.
        prompts: the tokens to begin with.
        count: the number of tokens in a continuation.
        ends: tokens that end a continuation early; the end itself counts.
        batch_tokens: about how many tokens a batch has.
        tick: called ``reader.steps`` times for each of the ``count`` tokens.
    """
    found = [np.array(prompt, np.int64) for prompt in prompts]
    running = list(range(len(found)))
    for _ in range(count):
        if not running:
            for _ in range(reader.steps):
                tick()
            continue
        batches = batched([found[number] for number in running], batch_tokens)
        reader.read(batches, tick)
        still = []
        for place, batch in enumerate(batches):
            chosen = reader.logits(place)[:, -1].argmax(-1).tolist()
            for row, token in zip(batch.numbers, chosen, strict=True):
                number = running[row]
                found[number] = np.append(found[number], token)
                if token not in ends:
                    still.append(number)
        running = sorted(still)
    return [Span(whole, prompt.size, whole.size) for whole, prompt in zip(found, prompts, strict=True)]
