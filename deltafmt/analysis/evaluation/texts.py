"""From a text to the sequences that models read, with the tokens of each that count, and to prompts to continue."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from deltafmt.calibration.text import Document
from deltafmt.calibration.tokens import Encoder, Tokens

# The tokens of a plain text that a continuation begins with.
PROMPT = 32


@dataclass(frozen=True, slots=True)
class Span:
    """A sequence that is read, and the part of it that is predicted.

    Attributes:
        tokens: the token numbers.
        first, stop: tokens from ``first`` up to ``stop`` count; ``first`` is at least 1, for nothing predicts token 0.
        asked: the number of tokens at the beginning that are a prompt with an answer behind it; 0 if there is none.
    """

    tokens: Tokens
    first: int
    stop: int
    asked: int = 0

    @property
    def counted(self) -> int:
        """The number of tokens that count."""
        return self.stop - self.first


def spans(documents: Iterable[Document], encoder: Encoder, length: int, limit: int) -> list[Span]:
    """Cut documents into spans of at most ``length`` tokens, with about ``limit`` tokens together.

    All tokens of a text count but the first. Of a prompt with its answer, the tokens of the answer count, and the token
    that ends it. Every document is read from its beginning; of a document that is longer than ``length``, the rest is
    read by itself. Spans of which nothing counts are left out.
    """
    found: list[Span] = []
    read = 0
    for document in documents:
        tokens = np.array(encoder.document(document), np.int64)
        asked = len(encoder.before) + len(encoder.encode(document.pieces[0])) if len(document.pieces) > 1 else 0
        for start in range(0, tokens.size, length):
            if read >= limit:
                return found
            part = tokens[start : start + length]
            first = max(asked - start, 1)
            if first < part.size:
                found.append(Span(part, first, part.size, asked if start == 0 else 0))
                read += part.size
    return found


def prompts(found: Sequence[Span], count: int, longest: int) -> list[Tokens]:
    """Return up to ``count`` prompts of at most ``longest`` tokens, evenly spaced over the text.

    The prompt of a prompt with an answer is that prompt. The prompt of a text is its first ``PROMPT`` tokens, where
    more follow.
    """
    possible = [
        span.tokens[: span.asked or PROMPT] for span in found if span.asked or (span.first == 1 and span.stop > PROMPT)
    ]
    possible = [prompt for prompt in possible if prompt.size <= longest]
    if count >= len(possible):
        return possible
    return [possible[i * len(possible) // count] for i in range(count)]
