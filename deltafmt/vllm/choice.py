"""Whose rows the tensors of a step are: the slot of each token's delta, and of each row of logits.

The engine says so once before each step. Layers see one row a token; the head sees one row for each token that is
sampled, or, for log-probabilities of a prompt, a run of tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from enum import Enum

import torch

from deltafmt.errors import UsageError
from deltafmt.kernels.segments import FixedSegments, Segments, TokenTiles

BASE = -1


class Rows(Enum):
    """What the rows of a layer's input are."""

    TOKENS = "tokens"
    LOGITS = "logits"


class StepSegments(Segments):
    """The first tokens of a step, as a captured graph of so many tokens reads them.

    A step that is shorter than its graph is padded with rows of the base, which are sorted behind all others. So the
    order and the tiles of the first T tokens are the beginnings of those of the longest step, and one sort serves the
    graphs of all sizes.

    Args:
        whole: the segments of the longest step.
        tokens: the number of tokens of the graph.
    """

    fixed = True

    def __init__(self, whole: FixedSegments, tokens: int) -> None:
        super().__init__(whole.slots[:tokens], whole.count)
        self._whole = whole
        self._lengths = {}  # what a graph launches cannot depend on them
        self.usual = FixedSegments(tokens, 1, torch.device("cpu")).usual

    def tiles(self, size: int, shortest: int = 1, longest: int | None = None) -> TokenTiles:
        """Return the beginning of the longest step's tiles."""
        found = self._whole.tiles(size, shortest, longest)
        bound = min(self.tokens, self.tokens // size + self.count)
        return TokenTiles(size, found.order[: self.tokens], found.table[:bound])


class Choice:
    """What the rows of the step that is under way use.

    Args:
        slots: the number of slots.
        device: of the model.
        longest: the most tokens of a step.

    Attributes:
        busy: True if a row uses a delta.
        lenient: True if a head may be called with rows that nobody has announced: those of a draft model.
        lost: the slots of deltas that were lost while requests for them were under way.
        end: the token that ends such a request's text; None if there is none.
        announce: told the first token and the number of the tokens that a head is given for log-probabilities.
    """

    def __init__(self, slots: int, device: torch.device, longest: int) -> None:
        self.slots = slots
        self.device = device
        self.busy = False
        self.lenient = False
        self.lost: set[int] = set()
        self.end: int | None = None
        self.announce: Callable[[int, int], None] | None = None
        self._of: dict[Rows, list[int]] = {Rows.TOKENS: [], Rows.LOGITS: []}
        self._segments: dict[tuple[Rows, bool, int, int], Segments] = {}
        self._prompt = self._warming = False
        self._fixed: FixedSegments | None = None
        self._sized: dict[int, StepSegments] = {}
        if device.type == "cuda":
            with torch.inference_mode(mode=False):
                self._fixed = FixedSegments(longest, slots, device)

    def show(self, tokens: Sequence[int], logits: Sequence[int]) -> None:
        """Note the slots of a step's tokens and of its rows of logits, -1 for the base."""
        self._of = {Rows.TOKENS: list(tokens), Rows.LOGITS: list(logits)}
        self._segments.clear()
        self.busy = any(slot != BASE for slot in tokens) or any(slot != BASE for slot in logits)
        if self._fixed is not None:
            with torch.inference_mode(mode=False), torch.no_grad():
                self._fixed.prepare()
                slots = [*tokens, *[BASE] * (self._fixed.tokens - len(tokens))]
                # From pinned memory, so that nobody waits for the step that is under way.
                pinned = torch.tensor(slots, dtype=torch.int32, pin_memory=True)
                self._fixed.fill(slots, pinned.to(self.device, non_blocking=True))

    @contextlib.contextmanager
    def prompts(self) -> Iterator[None]:
        """Within the block, heads are given runs of the step's tokens, and not the rows that are sampled."""
        self._prompt = True
        try:
            yield
        finally:
            self._prompt = False

    @contextlib.contextmanager
    def warming(self) -> Iterator[None]:
        """Within the block, layers are given the segments that they are given while a graph is captured."""
        self._warming = True
        try:
            yield
        finally:
            self._warming = False

    def note_logits(self, x: torch.Tensor) -> None:
        """Note that a head is given rows, which may be tokens of a prompt."""
        if self._prompt and self.announce is not None:
            self.announce(_first(x), x.shape[0])

    def segments(self, rows: Rows, x: torch.Tensor, where: str) -> Segments | None:
        """Return the segments of the rows of a layer's input; None if all of them are the base's.

        Args:
            rows: what its rows are.
            x: the input, shape (rows, ...).
            where: the layer's name, for messages.

        Raises:
            UsageError: it has other rows than the engine announced, so that nobody knows whose they are.
        """
        count = x.shape[0]
        in_graph = self._warming or (self.device.type == "cuda" and torch.cuda.is_current_stream_capturing())
        if self._fixed is not None and rows is Rows.TOKENS and in_graph:
            return self._captured(count)
        if not self.busy or not count:
            return None
        first = 0
        slots = self._of[rows]
        if rows is Rows.LOGITS and self._prompt:
            slots = self._of[Rows.TOKENS]
            first = _first(x)
            if first + count > len(slots):
                raise _unannounced(where, count, len(slots))
        elif count < len(slots) or (rows is Rows.LOGITS and count != len(slots)):
            if self.lenient and rows is Rows.LOGITS:
                return None
            raise _unannounced(where, count, len(slots))
        key = rows, self._prompt, first, count
        found = self._segments.get(key)
        if found is None:
            mine = slots[first : first + count]
            mine = [*mine, *[BASE] * (count - len(mine))]
            found = self._segments[key] = Segments.of(mine, self.slots, self.device)
        return found

    def _captured(self, count: int) -> Segments:
        assert self._fixed is not None
        if count > self._fixed.tokens:
            raise UsageError(f"a graph of {count} tokens is longer than the longest step, {self._fixed.tokens}")
        if count not in self._sized:
            self._sized[count] = StepSegments(self._fixed, count)
        return self._sized[count]


def _first(x: torch.Tensor) -> int:
    """Return the place of the first row of a slice of a tensor."""
    return x.storage_offset() // max(x.stride(0), 1)


def _unannounced(where: str, count: int, announced: int) -> UsageError:
    return UsageError(f"{where} was given {count} rows where the engine announced {announced}")
