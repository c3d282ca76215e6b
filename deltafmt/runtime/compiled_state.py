"""What compiled code reads of the call that it runs in: the tokens by slot, in memory that stays where it is.

A CUDA graph repeats launches with the addresses that they had. So before a call whose code may hold such graphs, the
slots of its rows are written to the same memory as for the call before. Each thread has memory of its own, as torch
gives each thread graphs of its own.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch

from deltafmt.errors import UsageError
from deltafmt.kernels.segments import FixedSegments
from deltafmt.runtime.call_rows import mixed_error
from deltafmt.runtime.selection import BASE, Selection

Active = Callable[[], Selection | None]
Wanted = defaultdict[int, set[tuple[int, int, int]]]


class Rows:
    """The slots of a batch of some number of rows.

    Args:
        rows: the number of rows.
        count: the number of slots of the operand tables.
        device: the device of the deltas.
        wanted: the tiles that launches have asked for, by the number of tokens.
    """

    def __init__(self, rows: int, count: int, device: torch.device, wanted: Wanted) -> None:
        self.count = count
        self._tiles = wanted
        self._rows = rows
        self._device = device
        self._slots: list[int] = [BASE] * rows
        self._shown: Sequence[int] | None = None
        self._segments: dict[int, FixedSegments] = {}
        self._wanted: set[int] = set()

    def shows(self, slots: Sequence[int]) -> bool:
        """Tell whether the slots of a call's rows are written already, and all that modules have asked for is there."""
        if slots != self._shown or self._wanted:
            return False
        return not any(segments.lacks_tiles for segments in self._segments.values())

    def show(self, slots: Sequence[int]) -> None:
        """Write the slots of a call's rows, and make what modules have asked for; no graph is captured now."""
        for segments in self._segments.values():
            segments.prepare()
        each = self._rows // len(slots)
        spread = [slot for slot in slots for _ in range(each)]
        for size in (self._rows, *self._wanted):
            if size not in self._segments:
                segments = self._segments[size] = self._new(size)
                segments.fill(self._of_tokens(self._slots, size))
                segments.prepare()
        self._wanted.clear()
        if spread != self._slots:
            self._slots = spread
            for size, segments in self._segments.items():
                segments.fill(self._of_tokens(spread, size))
        self._shown = slots

    def _new(self, tokens: int) -> FixedSegments:
        return FixedSegments(tokens, self.count, self._device, self._tiles[tokens])

    def _of_tokens(self, slots: list[int], tokens: int) -> list[int]:
        return [slot for slot in slots for _ in range(tokens // self._rows)]

    def segments(self, tokens: int, where: str) -> FixedSegments:
        """Return the segments of a module's tokens.

        Raises:
            UsageError: the tokens do not tell which of them belongs to which row.
        """
        if tokens in self._segments:
            return self._segments[tokens]
        if tokens % self._rows:
            raise UsageError(f"{where} has {tokens} tokens, which is not a multiple of the batch's {self._rows} rows")
        self._wanted.add(tokens)
        # Kept from the next call on: a graph that is being captured owns the memory that is taken now.
        found = self._new(tokens)
        rows = self._segments[self._rows].slots
        found.fill(self._of_tokens(self._slots, tokens), rows.repeat_interleave(tokens // self._rows))
        return found


class _Thread(threading.local):
    def __init__(self) -> None:
        self.rows: dict[int, Rows] = {}
        self.now: Rows | None = None
        self.stream: torch.cuda.Stream | None = None


class CompiledState:
    """What compiled code of one model reads.

    Args:
        device: the device of the deltas.
        active: a function that returns the selection of the calling thread, or None.

    Attributes:
        used: True once code of the model, or of a module in it, was compiled.
        device: the device of the deltas.
        ahead: while the compiler looks on: the key of a group, the input that it computed outputs ahead for, these, and
            the graph of both.
            There is one for all groups, because compiled code writes such a variable back in every call.
    """

    def __init__(self, device: torch.device, active: Active) -> None:
        self.ahead: tuple[torch.Tensor, torch.Tensor, list[torch.Tensor | None], str] | None = None
        self.used = False
        self.active = active
        self.device = device
        self._thread = _Thread()
        self._wanted: Wanted = defaultdict(set)

    def begin(self, selection: Selection | None, rows: int, count: int) -> None:
        """Write what a call of the model serves."""
        thread = self._thread
        if self.device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return  # a graph that the caller captures holds what is chosen now
            stream = torch.cuda.current_stream(self.device)
            if thread.stream is not None and thread.stream != stream:
                stream.wait_stream(thread.stream)  # its graphs may still read what is written now
            thread.stream = stream
        held = thread.rows.get(rows)
        if held is None or held.count != count:
            held = thread.rows[rows] = Rows(rows, count, self.device, self._wanted)
        slots = (BASE,) if selection is None else selection.slots
        if not held.shows(slots):
            # Tensors that are made in inference mode could not be written to outside of it.
            with torch.inference_mode(mode=False), torch.no_grad():
                held.show(slots)
        thread.now = held

    def end(self) -> None:
        """Note that no call of the model is under way in this thread."""
        self._thread.now = None

    def segments(self, given: torch.Tensor, site: object, where: str) -> FixedSegments | None:
        """Return the segments of a module's tokens; None if they all use the base.

        Args:
            given: the module's input, shape (..., columns).
            site: the module's site, which tells whose rows these are.
            where: its name, for messages.

        Raises:
            UsageError: a module is captured outside of a call of its model, or a row uses a sum of deltas; or whose
                rows these are cannot be told.
        """
        tokens = given.numel() // given.shape[-1]
        self.used = True
        if self._thread.now is not None:
            return self._thread.now.segments(tokens, where)
        self.refuse_captured(where)
        selection = self.active()
        if selection is None or not selection.touched:
            return None
        refuse_mixes(selection)
        order = selection.order(site, 0, given, given.shape[:-1], where)
        if order is None:
            raise mixed_error(where, given.shape)
        # Not kept: it may lie in the memory of a graph that is about to be captured.
        segments = FixedSegments(tokens, selection.count, self.device, self._wanted[tokens])
        segments.fill(order.host_slots())
        return segments

    def refuse_captured(self, where: str) -> None:
        """Refuse to be captured in a CUDA graph.

        Raises:
            UsageError: the calling thread captures a graph.
        """
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise UsageError(
                f"{where} is captured in a CUDA graph outside of a call of its model, and could not follow the choice "
                "of deltas; call the model, or compile without CUDA graphs"
            )


def refuse_mixes(selection: Selection) -> None:
    """Refuse sums of deltas, which compiled code does not compute.

    Raises:
        UsageError: a row uses a sum.
    """
    if selection.mixes:
        raise UsageError("compiled code serves no sums of deltas with weights; call the module as it is")
