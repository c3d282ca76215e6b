"""The obvious product with a packed ``nm`` delta, in torch: unpack words, place values, multiply (spec, section 11).

Written apart from the numpy decoder, from the specification alone, so that each checks the other; kernels are compared
with it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from deltafmt.errors import UsageError
from deltafmt.terms.nm import hashing
from deltafmt.terms.nm.layout import NMLayout

_MASK = 0xFFFFFFFF


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Section 11.4: the 32-bit mix, on int64 tensors that hold values below 2**32."""
    x = x ^ (x >> 16)
    x = _multiply(x, hashing.MIX_FIRST)
    x = x ^ (x >> 15)
    x = _multiply(x, hashing.MIX_SECOND)
    return x ^ (x >> 16)


def _multiply(x: torch.Tensor, factor: int) -> torch.Tensor:
    """Return ``x * factor`` modulo 2**32; in two halves, because int64 would overflow."""
    high = ((x >> 16) * factor) & 0xFFFF
    return ((high << 16) + (x & 0xFFFF) * factor) & _MASK


def tiled_rows(tiled: torch.Tensor, rows: int, share: int) -> torch.Tensor:
    """Section 11.2, "Tiles": return the items of every row.

    Args:
        tiled: words or scales, shape (tiles, items, 32).
        rows: of the stream.
        share: v, the rows of a mask row; 1 for an index.

    Returns:
        Shape (rows, items).
    """
    r = torch.arange(rows, device=tiled.device)
    tile = r // (32 * share) * share + r % share
    lane = r % (32 * share) // share
    return tiled[tile, :, lane]


def _mix64(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Section 11.4: 64 bits for each number below 2**32, as their lower and upper halves."""
    low, high = _wide(x ^ (x >> 16), hashing.FOLD)
    return _wide(low ^ high, hashing.SPREAD)


def _wide(x: torch.Tensor, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the lower and upper 32 bits of ``x * factor``, from products that int64 holds."""
    total = ((x & 0xFFFF) * factor >> 16) + (x >> 16) * factor
    return _multiply(x, factor), total >> 16


def unpack_fields(words: torch.Tensor, rows: int, count: int, width: int, share: int) -> torch.Tensor:
    """Section 11.2: return the fields of a word stream.

    Args:
        words: int32, shape (tiles, words, 32), the bits of the packed words.
        rows, count, width: of the stream; width at most 16.
        share: v, the rows of a mask row; 1 for an index.

    Returns:
        int64, shape (rows, count).
    """
    by_row = tiled_rows(words, rows, share).long() & _MASK
    field = torch.arange(count, device=words.device)
    fields = torch.zeros(rows, count, dtype=torch.int64, device=words.device)
    first = low = 0
    while low < width:
        plane = 1
        while 2 * plane <= min(width - low, 32):
            plane *= 2
        bit = field * plane
        part = by_row[:, first + bit // 32] >> bit % 32 & (1 << plane) - 1
        fields |= part << low
        first += -(-count * plane // 32)
        low += plane
    return fields


def seeded_positions(layout: NMLayout, seed: int, mask_rows: int, groups: int) -> torch.Tensor:
    """Section 11.4, ``seeded``: return positions, int64, shape (mask_rows, groups, N)."""
    log_m = layout.m.bit_length() - 1
    needed = log_m if layout.n == 1 else 2 * log_m - 1
    width = 4 if needed <= 4 else 8 if needed <= 8 else 16
    row = torch.arange(mask_rows)
    key = _mix((_multiply(row, hashing.ROW_STEP) + seed) & _MASK)
    g = torch.arange(groups)
    per_hash = 64 // width
    low, high = _mix64((key[:, None] + _multiply(g // per_hash, hashing.BLOCK_STEP)) & _MASK)
    shift = g % per_hash * width
    lane = torch.where(shift < 32, low >> shift, high >> (shift - 32).clamp(min=0))
    b = lane & (layout.m - 1)
    a = (lane >> (log_m - 1)) & (layout.m - 1) | 1
    i = torch.arange(layout.n)
    return (a[:, :, None] * i + b[:, :, None]) & (layout.m - 1)


def nm_delta(layout: NMLayout, buffers: Mapping[str, torch.Tensor], seed: int, rows: int, columns: int) -> torch.Tensor:
    """Sections 11.5 and 11.6: return the dense float32 delta, shape (rows, columns).

    Args:
        layout: of the term; ``seeded`` or ``fixed``.
        buffers: ``codes`` and ``index`` as int32 of shape (tiles, words, 32), ``scales`` as BF16 or F32 of shape
            (tiles, scales per row, 32).
        seed: the tensor seed.
        rows, columns: of the delta.

    Raises:
        UsageError: the index is ``rank``, which is made ``fixed`` before a product.
    """
    groups, kept = layout.groups(columns), layout.kept(columns)
    mask_rows = layout.mask_rows(rows)
    if layout.index == "seeded":
        positions = seeded_positions(layout, seed, mask_rows, groups).to(buffers["codes"].device)
    elif layout.index == "fixed":
        positions = unpack_fields(buffers["index"], mask_rows, kept, layout.position_bits, 1)
        positions = positions.reshape(mask_rows, groups, layout.n)
    else:
        raise UsageError("a rank index is made fixed before it is multiplied with")
    codes = unpack_fields(buffers["codes"], rows, kept, layout.bits, layout.share)
    scales = tiled_rows(buffers["scales"], rows, layout.share).float()
    per_entry = (scales * 0.5).repeat_interleave(min(layout.scale_group or kept, kept), 1)[:, :kept]
    values = (2 * codes - layout.top).float() * per_entry
    start = torch.arange(groups, device=positions.device) * layout.m
    column = (positions + start[:, None]).reshape(mask_rows, kept)
    column = column.repeat_interleave(layout.share, 0)[:rows]
    wide = torch.zeros(rows, groups * layout.m, device=values.device)
    return wide.scatter(1, column, values)[:, :columns]


def nm_matmul(
    x: torch.Tensor,
    layout: NMLayout,
    buffers: Mapping[str, torch.Tensor],
    seed: int,
    rows: int,
    base_output: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``x @ delta.T``, added to the base's output if that is given.

    Args:
        x: shape (tokens, columns), any floating dtype.
        layout, buffers, seed, rows: of the delta, see :func:`nm_delta`.
        base_output: shape (tokens, rows).

    Returns:
        Shape (tokens, rows), in the dtype of ``x``; the sum is taken in float32.
    """
    product = x.float() @ nm_delta(layout, buffers, seed, rows, x.shape[1]).T
    if base_output is not None:
        product = product + base_output.float()
    return product.to(x.dtype)
