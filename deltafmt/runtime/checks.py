"""What is attached is what is verified: the rules of section 15 for reading a tensor, asked on the device.

Checksums tell that the bytes are those that were written. These checks tell that they mean something: no scale is
negative or not finite, no value is not finite, positions ascend, and every entry lies inside its matrix. They run where
the bytes are, in blocks, and the host waits once for all values of a delta.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from deltafmt.errors import InvalidFileError
from deltafmt.format.constants import DELTA_DTYPES
from deltafmt.kernels.device_memory import PlacedBuffers
from deltafmt.kernels.nm.index import positions
from deltafmt.kernels.operand import Operand, buffer_forms
from deltafmt.kernels.packed_words import fields
from deltafmt.runtime.device_delta import DeviceTensor
from deltafmt.terms.nm.layout import NMLayout
from deltafmt.terms.sparse.checks import BlockRun, runs_of_blocks
from deltafmt.terms.sparse.layout import SparseLayout
from deltafmt.terms.tiles import TILE_ROWS

# Elements that are looked at by one launch; small buffers are joined up to so many.
BLOCK_ELEMENTS = 1 << 22
# Slots of a run of blocks of a sparse term, each with 32 lanes.
RUN_SLOTS = 1 << 17

SCALE = "a scale is negative or not finite"
VALUE = "a value is not finite"
POSITIONS = "positions do not ascend, or are not below M"
STARTS = "the starts of the blocks do not ascend"
BEYOND = "an entry lies beyond its block"
ABSENT = "a row that does not exist has an entry"

# Of each dtype: the integers of its bits, and its infinity. As integers, numbers from 0 to infinity ascend.
_BITS = {
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float32: (torch.int32, 0x7F800000),
}


class _Found(NamedTuple):
    """A flag on the device that is set if a problem was found, and what that says of which tensors."""

    flag: torch.Tensor
    problem: str
    tensors: tuple[str, ...]


def check_terms(where: str, tensors: Mapping[str, DeviceTensor]) -> None:
    """Check the terms of tensors on a device.

    Args:
        where: the file's name, for the message.
        tensors: by name; aliases are checked once.

    Raises:
        InvalidFileError: names the first tensor that breaks a rule, and the rule.
    """
    operands = {
        (tensor.entry.name, number): operand
        for tensor in tensors.values()
        for number, operand in enumerate(tensor.terms)
    }
    found: list[_Found] = []
    with torch.inference_mode():
        found += _check_numbers(operands)
        for (name, _), operand in operands.items():
            if isinstance(operand.layout, NMLayout):
                found += (_Found(flag, POSITIONS, (name,)) for flag in _position_flags(operand, operand.layout))
            elif isinstance(operand.layout, SparseLayout):
                found += _check_slots(where, name, operand, operand.layout)
        flags = torch.stack([each.flag for each in found]).tolist() if found else []
    for each, is_set in zip(found, flags, strict=True):
        if is_set:
            named = each.tensors[0] if len(each.tensors) == 1 else _first(operands, each)
            raise InvalidFileError(f'{where}: tensors["{named}"]: {each.problem}')


def _check_numbers(operands: Mapping[tuple[str, int], Operand]) -> Iterator[_Found]:
    """Check all scales and values: the buffers of one dtype together."""
    groups: dict[tuple[str, torch.dtype], list[tuple[str, torch.Tensor]]] = {}
    for (name, _), operand in operands.items():
        for problem, tensor in numbers_of(operand):
            groups.setdefault((problem, tensor.dtype), []).append((name, tensor.reshape(-1)))
    for (problem, _), members in groups.items():
        joined: list[tuple[str, torch.Tensor]] = []
        size = 0
        for name, flat in members:
            if flat.numel() > BLOCK_ELEMENTS:
                yield from (
                    _Found(_is_wrong(part, problem), problem, (name,)) for part in torch.split(flat, BLOCK_ELEMENTS)
                )
                continue
            joined.append((name, flat))
            size += flat.numel()
            if size >= BLOCK_ELEMENTS:
                yield _of_joined(joined, problem)
                joined, size = [], 0
        if joined:
            yield _of_joined(joined, problem)


def _of_joined(members: Sequence[tuple[str, torch.Tensor]], problem: str) -> _Found:
    flats = [flat for _, flat in members]
    whole = flats[0] if len(flats) == 1 else torch.cat(flats)
    return _Found(_is_wrong(whole, problem), problem, tuple(name for name, _ in members))


def numbers_of(operand: Operand) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the buffers of scales and of values, with the rules that they have to keep; words and bytes have none."""
    held = operand.buffers
    if isinstance(held, PlacedBuffers):
        forms = held.forms
    else:
        forms = buffer_forms(operand.layout, operand.rows, operand.columns, operand.slots)
    for buffer, form in forms.items():
        if form.dtype in DELTA_DTYPES and form.nbytes:
            yield SCALE if buffer.endswith("scales") else VALUE, held[buffer]


def _is_wrong(flat: torch.Tensor, problem: str) -> torch.Tensor:
    """Return a flag that is set if a number breaks the rule."""
    integers, infinity = _BITS[flat.dtype]
    bits = flat.view(integers)
    if problem == SCALE:  # the sign is the highest bit: -0 is negative
        return ((bits < 0) | (bits >= infinity)).any()
    return (bits & infinity == infinity).any()


def _first(operands: Mapping[tuple[str, int], Operand], found: _Found) -> str:
    """Return the first of several tensors that breaks a rule."""
    for (name, _), operand in operands.items():
        for problem, tensor in numbers_of(operand):
            is_one = name in found.tensors and problem == found.problem
            if is_one and bool(_is_wrong(tensor.reshape(-1), found.problem)):
                return name
    return found.tensors[0]


def _position_flags(operand: Operand, layout: NMLayout) -> Iterator[torch.Tensor]:
    """Check a fixed index; seeded positions need no check."""
    full = layout.m == 1 << layout.position_bits
    if layout.seeded or (layout.n == 1 and full):
        return
    mask_rows = layout.mask_rows(operand.rows)
    step = max(BLOCK_ELEMENTS // (layout.groups(operand.columns) * layout.n), 1)
    for first in range(0, mask_rows, step):
        rows = torch.arange(first, min(first + step, mask_rows), device=operand.device)
        found = positions(operand, rows)
        if layout.n > 1:
            yield (found[:, :, 1:] <= found[:, :, :-1]).any()
        if not full:
            yield (found >= layout.m).any()


def _check_slots(where: str, name: str, operand: Operand, layout: SparseLayout) -> Iterator[_Found]:
    """Check the slots of a sparse term, some blocks at a time."""
    starts = operand.buffers["starts"].cpu().numpy().view(np.uint32)
    if starts[0] != 0 or starts[-1] != operand.slots or (starts[1:] < starts[:-1]).any():
        raise InvalidFileError(f'{where}: tensors["{name}"]: {STARTS} from 0 to {operand.slots}')
    gaps = operand.buffers["gaps"].T
    lanes = (operand.rows - 1) % TILE_ROWS + 1
    last_tile = int(starts[starts.size - 1 - layout.blocks(operand.columns)])
    try:
        for _, run in runs_of_blocks(layout, starts, operand.columns, RUN_SLOTS):
            first, last = int(run.starts[0]), int(run.starts[-1])
            of_run = fields(gaps, operand.slots, layout.gap_bits, first, last)
            yield _Found(_is_beyond(of_run, run, layout.filler), BEYOND, (name,))
            absent = of_run[lanes:, max(last_tile - first, 0) :]
            if absent.numel():
                yield _Found((absent != layout.filler).any(), ABSENT, (name,))
    except InvalidFileError as error:
        raise InvalidFileError(f'{where}: tensors["{name}"]: {error}') from error


def _is_beyond(gaps: torch.Tensor, run: BlockRun, filler: int) -> torch.Tensor:
    """Return a flag that is set if an entry lies beyond its block; :func:`deltafmt.terms.sparse.checks.within`."""
    counts, starts = np.diff(run.starts), run.starts[:-1] - run.starts[0]
    is_entry = gaps != filler
    passed = torch.cumsum(gaps + is_entry, 1, dtype=torch.int64)
    before = torch.nn.functional.pad(passed, (1, 0))
    at, widths, repeats = (torch.from_numpy(each).to(gaps.device) for each in (starts, run.widths, counts))
    ends = (before[:, at] + widths).repeat_interleave(repeats, dim=1, output_size=gaps.shape[1])
    return ((passed > ends) & is_entry).any()
