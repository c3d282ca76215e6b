"""Exact tensors decoded where the live tensor is, with operations of torch (spec/deltafmt-v1.md, section 17).

Reference: :func:`deltafmt.exact.chunk.decode`. The host reads places and planes, which a patch has few of; the device
makes the units, and their checksums are taken there.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
import xxhash

from deltafmt.errors import InvalidFileError
from deltafmt.exact.chunk import DIFFERENCES, SAME, SORTED, SPARSE, parts
from deltafmt.exact.coding import ExactDecoder
from deltafmt.exact.units import Unit
from deltafmt.kernels.xxh3.digests import digests
from deltafmt.sync.live import INTEGERS, LiveTensor
from deltafmt.sync.staged import Change, PlacesChange, WholeChange

# A message of more bytes has the same XXH3-64 as the lower half of its XXH3-128.
_LONG = 240


def runs_on(live: LiveTensor) -> bool:
    """Tell whether a live tensor is decoded on its own device; units of 8 bytes are decoded by the host."""
    return live.tensor.device.type != "cpu" and live.unit.width < 8


def stream_of(live: LiveTensor) -> AbstractContextManager[object]:
    """Return a context in which another thread works on the caller's stream, after what the caller has begun there."""
    device = live.tensor.device
    return torch.cuda.stream(torch.cuda.current_stream(device)) if device.type == "cuda" else nullcontext()


def change_of(decoder: ExactDecoder, live: LiveTensor, *, has_base: bool) -> Change | None:
    """Decode a tensor on its device, and return the change; None if nothing changes.

    Args:
        decoder: its chunks.
        live: the live tensor.
        has_base: whether its units are the prediction; zeros otherwise.

    Raises:
        InvalidFileError: a chunk breaks the format, or the prediction is not the one that it was made with.
    """
    unit, integers = decoder.unit, INTEGERS[live.unit.width]
    flat = live.flat().view(integers)
    new = flat.clone()
    for number in range(len(decoder)):
        first, end = decoder.span(number)
        old = flat[first:end] if has_base else torch.zeros_like(flat[first:end])
        _, form, data = decoder.stored(number)
        try:
            new[first:end] = _decoded(form, data, old, unit)
        except InvalidFileError as error:
            raise error.located(f"chunk {number}") from error
    _check(decoder, new)
    places = (new != flat).nonzero().flatten()
    if not len(places):
        return None
    if live.tensor.is_contiguous() and len(places) <= PlacesChange.MOST * len(new):
        return PlacesChange(flat, places, new[places])
    return WholeChange(live, new)


def _decoded(form: int, data: memoryview, old: torch.Tensor, unit: Unit) -> torch.Tensor:
    """Return the units of a chunk, as integers of the unit's width.

    Args:
        form, data: the chunk.
        old: the prediction.
        unit: the unit.
    """
    if form == SAME:
        if len(data):
            raise InvalidFileError(f"{len(data)} bytes where 0 are needed")
        return old
    places, planes = parts(form, data, len(old), unit)
    sent = torch.from_numpy(planes if planes.flags.writeable else planes.copy()).to(old.device)
    codes = torch.zeros(sent.shape[1], dtype=torch.int64, device=old.device)
    for number in range(unit.width):
        codes |= sent[number].to(torch.int64) << 8 * number
    mask = (1 << 8 * unit.width) - 1
    if form not in (DIFFERENCES, SORTED, SPARSE):
        return _narrow(codes, old.dtype)
    where = None if places is None else torch.from_numpy(places).to(old.device)
    predicted = (old if where is None else old[where]).to(torch.int64) & mask
    if form != DIFFERENCES and unit.is_float:
        keys = predicted >> unit.shift & (1 << unit.bits) - 1
        order = torch.argsort(keys.to(torch.int16), stable=True)
        codes = torch.empty_like(codes).index_copy_(0, order, codes)
    difference = codes >> 1 ^ -(codes & 1)
    units = _unordered(_ordered(predicted, unit) + difference & mask, unit)
    if where is None:
        return _narrow(units, old.dtype)
    return old.index_copy(0, where, _narrow(units, old.dtype))


def _ordered(units: torch.Tensor, unit: Unit) -> torch.Tensor:
    if not unit.is_float:
        return units
    top = 1 << 8 * unit.width - 1
    return torch.where(units >= top, 2 * top - 1 - units, units + top)


def _unordered(integers: torch.Tensor, unit: Unit) -> torch.Tensor:
    if not unit.is_float:
        return integers
    top = 1 << 8 * unit.width - 1
    return torch.where(integers >= top, integers - top, 2 * top - 1 - integers)


def _narrow(units: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return integers from 0 on in the bits of a narrower dtype."""
    bits = 8 * dtype.itemsize
    return (units if dtype == torch.uint8 else torch.where(units >= 1 << bits - 1, units - (1 << bits), units)).to(
        dtype
    )


def _check(decoder: ExactDecoder, new: torch.Tensor) -> None:
    """Compare the checksums of all chunks with what was packed."""
    whole, width = new.view(torch.uint8), decoder.unit.width
    padding = -len(whole) % 8
    memory = torch.nn.functional.pad(whole, (0, padding)) if padding else whole
    spans = [(first * width, end * width) for first, end in map(decoder.span, range(len(decoder)))]
    long = [(start, end - start) for start, end in spans if end - start > _LONG]
    found = iter(digests(memory, long) if long else ())
    for number, (start, end) in enumerate(spans):
        if end - start > _LONG:
            checksum = int.from_bytes(next(found)[8:], "big")
        else:
            checksum = xxhash.xxh3_64_intdigest(np.ascontiguousarray(whole[start:end].cpu().numpy()).data)
        if checksum != decoder.stored(number)[0]:
            raise InvalidFileError(f"chunk {number}: what it restores is not what was packed")
