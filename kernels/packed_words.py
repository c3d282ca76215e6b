"""Packed words to fields, in torch: for decoding a delta where no kernel runs (specification, section 11.2).

The functions are vectorised and run on the CPU and on GPUs. A field has at most 16 bits, so int32 holds all results.
"""

from __future__ import annotations

import torch

from deltafmt.terms.tiles import TILE_ROWS, plane_words, planes


def rows_of_tiles(tiled: torch.Tensor, start: int, stop: int, share: int = 1) -> torch.Tensor:
    """Return the items of rows ``start`` to ``stop``.

    Args:
        tiled: words or scales, shape (tiles, items, 32).
        start, stop: the rows.
        share: v, the rows that share a mask row, which lie in different tiles; 1 for an index.

    Returns:
        Shape (stop - start, items).
    """
    block = TILE_ROWS * share
    first, last = start // block, -(-stop // block)
    items = tiled.shape[1]
    # "Lane l of the v tiles of a super-tile holds the v rows of its mask row l."
    lanes = tiled[first * share : last * share].view(last - first, share, items, TILE_ROWS)
    by_row = lanes.permute(0, 3, 1, 2).reshape(-1, items)
    return by_row[start - first * block : stop - first * block]


def chosen_rows(tiled: torch.Tensor, rows: torch.Tensor, share: int = 1) -> torch.Tensor:
    """Return the items of some rows (int64), shape (len(rows), items); arguments as for :func:`rows_of_tiles`."""
    block = TILE_ROWS * share
    return tiled[rows // block * share + rows % share, :, rows % block // share]


def fields(by_row: torch.Tensor, count: int, width: int, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Return fields ``start`` to ``stop`` of rows of packed words.

    Args:
        by_row: int32, shape (rows, words).
        count: fields of a row.
        width: bits of a field, 1 to 8, or 16.
        start, stop: the fields; all by default.

    Returns:
        int32, shape (rows, stop - start).
    """
    stop = count if stop is None else stop
    found: torch.Tensor | None = None
    first = low = 0
    for plane in planes(width):
        per_word = 32 // plane
        begin, end = start // per_word, -(-stop // per_word)
        words = by_row[:, first + begin : first + end].contiguous()
        shifts = torch.arange(0, 32, plane, dtype=torch.int32, device=by_row.device)
        part = (words[:, :, None] >> shifts).bitwise_and_((1 << plane) - 1).flatten(1)
        part = part[:, start - begin * per_word : stop - begin * per_word]
        found = part if found is None else found | part << low
        first, low = first + plane_words(count, plane), low + plane
    assert found is not None
    return found


def chosen_fields(by_row: torch.Tensor, count: int, width: int, at: torch.Tensor) -> torch.Tensor:
    """Return some fields of rows of packed words, the same of every row; no other field is unpacked.

    Args:
        by_row, count, width: as for :func:`fields`.
        at: int64, the fields.

    Returns:
        int32, shape (rows, len(at)).
    """
    found = torch.zeros(len(by_row), len(at), dtype=torch.int32, device=by_row.device)
    first = low = 0
    for plane in planes(width):
        per_word = 32 // plane
        shifts = (at % per_word * plane).int()
        found |= (by_row[:, first + at // per_word] >> shifts).bitwise_and_((1 << plane) - 1) << low
        first, low = first + plane_words(count, plane), low + plane
    return found


def each_of_group(of_groups: torch.Tensor, group: int, count: int, at: torch.Tensor | None = None) -> torch.Tensor:
    """Return for each element of every row what belongs to its group.

    Args:
        of_groups: shape (rows, groups).
        group: elements of a group; 0: one group for the whole row.
        count: elements of a row.
        at: int64, the elements that are wanted; all by default.

    Returns:
        Shape (rows, count) or (rows, len(at)); (rows, 1) where the row is one group.
    """
    if group == 0 or of_groups.shape[1] == 1:
        return of_groups[:, :1]
    elements = torch.arange(count, device=of_groups.device) if at is None else at
    return of_groups[:, elements // group]


def coded_values(
    top: int, codes: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the float32 values of codes (section 12.3).

    Args:
        top: of the grid: the largest field.
        codes: fields u, int32.
        scales, zero_points: broadcast to the shape of the codes.
    """
    if zero_points is None:
        # "value = float32(2u - top) * float32(scale * 0.5)", one rounding in float32.
        return (codes * 2 - top).float() * (scales.float() * 0.5)
    return (codes - zero_points.int()).float() * scales.float()
