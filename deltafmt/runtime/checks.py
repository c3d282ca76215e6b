"""What is attached is what is verified: the rules of section 15 for reading a tensor, asked on the device.

Checksums tell that the bytes are those that were written. These checks tell that they mean something: no scale is
negative or not finite, no value is not finite, positions ascend, and every entry lies inside its matrix. They run where
the bytes are, in blocks, and the host waits once for all values of a delta.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from deltafmt.errors import InvalidFileError
from deltafmt.kernels.nm.index import positions
from deltafmt.kernels.operand import Operand, buffer_forms
from deltafmt.kernels.packed_words import fields
from deltafmt.runtime.device_delta import DeviceDelta, DeviceTensor
from deltafmt.runtime.device_views import DeviceTensors
from deltafmt.runtime.layout_checks import SCALE, has_positions, rules
from deltafmt.terms.nm.layout import NMLayout
from deltafmt.terms.sparse.checks import BlockRun, runs_of_blocks
from deltafmt.terms.sparse.layout import SparseLayout
from deltafmt.terms.tiles import TILE_ROWS

# Elements that are looked at by one launch; small buffers are joined up to so many.
BLOCK_ELEMENTS = 1 << 22
# Slots of a run of blocks of a sparse term, each with 32 lanes.
RUN_SLOTS = 1 << 17

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
    found: list[_Found] = []
    with torch.inference_mode():
        found += _check_numbers(_numbers(tensors))
        for name, operand in _walked(tensors):
            if isinstance(operand.layout, NMLayout):
                found += (_Found(flag, POSITIONS, (name,)) for flag in _position_flags(operand, operand.layout))
            elif isinstance(operand.layout, SparseLayout):
                found += _check_slots(where, name, operand, operand.layout)
        flags = torch.stack([each.flag for each in found]).tolist() if found else []
    for each, is_set in zip(found, flags, strict=True):
        if is_set:
            named = each.tensors[0] if len(each.tensors) == 1 else _first(tensors, each)
            raise InvalidFileError(f'{where}: tensors["{named}"]: {each.problem}')


def _known(tensors: Mapping[str, DeviceTensor]) -> DeviceTensors | None:
    """Return the tensors of an allocation whose layout says what is looked at; None for others."""
    held = tensors.tensors if isinstance(tensors, DeviceDelta) else tensors
    return held if isinstance(held, DeviceTensors) and held.seeds is not None else None


def _operands(tensors: Mapping[str, DeviceTensor]) -> Iterator[tuple[str, Operand]]:
    """Give every operand, with the name of its tensor; those of aliases are their targets'."""
    by_name = {tensor.entry.name: tensor for tensor in tensors.values()}
    return ((name, operand) for name, tensor in by_name.items() for operand in tensor.terms)


def _walked(tensors: Mapping[str, DeviceTensor]) -> Iterator[tuple[str, Operand]]:
    """Give the operands whose positions or slots are looked at."""
    known = _known(tensors)
    if known is None:
        return _operands(tensors)
    return ((name, known.of_entry(name).terms[number]) for name, number in known.layout.checks.walked)


def _numbers(tensors: Mapping[str, DeviceTensor]) -> Iterator[tuple[str, tuple[str, ...], torch.Tensor]]:
    """Give all scales and values: the rule that they keep, their tensors' names, and the numbers, 1-d."""
    known = _known(tensors)
    if known is None:
        for name, operand in _operands(tensors):
            yield from ((problem, (name,), tensor.reshape(-1)) for problem, tensor in numbers_of(operand))
        return
    for run in known.layout.checks.runs:
        for part in run.cut(BLOCK_ELEMENTS):
            yield part.problem, part.names, known.of_run(part).reshape(-1)


def _check_numbers(numbers: Iterable[tuple[str, tuple[str, ...], torch.Tensor]]) -> Iterator[_Found]:
    """Check all scales and values: those of one dtype together."""
    groups: dict[tuple[str, torch.dtype], list[tuple[tuple[str, ...], torch.Tensor]]] = {}
    for problem, names, flat in numbers:
        groups.setdefault((problem, flat.dtype), []).append((names, flat))
    for (problem, _), members in groups.items():
        joined: list[tuple[tuple[str, ...], torch.Tensor]] = []
        size = 0
        for names, flat in members:
            if flat.numel() > BLOCK_ELEMENTS:
                yield from (
                    _Found(_is_wrong(part, problem), problem, names) for part in torch.split(flat, BLOCK_ELEMENTS)
                )
                continue
            joined.append((names, flat))
            size += flat.numel()
            if size >= BLOCK_ELEMENTS:
                yield _of_joined(joined, problem)
                joined, size = [], 0
        if joined:
            yield _of_joined(joined, problem)


def _of_joined(members: Sequence[tuple[tuple[str, ...], torch.Tensor]], problem: str) -> _Found:
    flats = [flat for _, flat in members]
    whole = flats[0] if len(flats) == 1 else torch.cat(flats)
    return _Found(_is_wrong(whole, problem), problem, tuple(name for names, _ in members for name in names))


def numbers_of(operand: Operand) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the buffers of scales and of values, with the rules that they have to keep; words and bytes have none."""
    forms = buffer_forms(operand.layout, operand.rows, operand.columns, operand.slots)
    return ((problem, operand.buffers[buffer]) for buffer, problem in rules(forms))


def _is_wrong(flat: torch.Tensor, problem: str) -> torch.Tensor:
    """Return a flag that is set if a number breaks the rule."""
    integers, infinity = _BITS[flat.dtype]
    bits = flat.view(integers)
    if problem == SCALE:  # the sign is the highest bit: -0 is negative
        return ((bits < 0) | (bits >= infinity)).any()
    return (bits & infinity == infinity).any()


def _first(tensors: Mapping[str, DeviceTensor], found: _Found) -> str:
    """Return the first of several tensors that breaks a rule."""
    for name, operand in _operands(tensors):
        for problem, tensor in numbers_of(operand):
            is_one = name in found.tensors and problem == found.problem
            if is_one and bool(_is_wrong(tensor.reshape(-1), found.problem)):
                return name
    return found.tensors[0]


def _position_flags(operand: Operand, layout: NMLayout) -> Iterator[torch.Tensor]:
    """Check a fixed index; seeded positions need no check."""
    if not has_positions(layout):
        return
    full = layout.m == 1 << layout.position_bits
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
