"""Device functions that the product kernels share: what a program works on, and how its results are added.

A program of a product kernel takes one token tile (program id 1) and one block of rows of one part (program id 0).

How kernels multiply with a code without converting it to a float: a field u at bit b of a word, masked in place and
taken as the bits of a float32, is the denormal number ``u * 2**(b - 149)``, as long as it ends below bit 23 (kernels
shift fields into the low 16 bits). With x scaled by ``2**64`` (TWO_64), the product ``u * x * 2**(b - 85)`` is a normal
number. So one multiply-add serves a field, and the factor ``2**(85 - b)`` is applied to sums at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deltafmt.kernels import segments

TILE_FIELDS = tl.constexpr(segments.TILE_FIELDS)
TWO_64 = tl.constexpr(2.0**64)  # what x is scaled by; see above


@triton.jit
def load_token_tile(tiles_ptr, tile):
    """Return the slot of a token tile, its first place in the order, and its number of tokens (0: it is not needed)."""
    p_tile = tiles_ptr + tile * TILE_FIELDS
    return tl.load(p_tile), tl.load(p_tile + 1), tl.load(p_tile + 2)


@triton.jit
def select_part(block, block1, block2, y0_ptr, y1_ptr, y2_ptr, y0_stride, y1_stride, y2_stride, PARTS: tl.constexpr):
    """Return the part that a block of rows belongs to, the block's number within the part, and the part's output.

    Args:
        block: the block's number among those of all parts.
        block1, block2: the first block of part 1 and of part 2.
        y0_ptr, ..., y2_stride: for each part, the output's address and what belongs to it, such as its stride.
        PARTS: the number of parts.
    """
    part = 0
    start = 0
    y_ptr = y0_ptr
    y_stride = y0_stride
    if PARTS > 1:
        if block >= block1:
            part = 1
            start = block1
            y_ptr = y1_ptr
            y_stride = y1_stride
    if PARTS > 2:
        if block >= block2:
            part = 2
            start = block2
            y_ptr = y2_ptr
            y_stride = y2_stride
    return part, block - start, y_ptr, y_stride


@triton.jit
def record_address(records_ptr, slot, part, PARTS: tl.constexpr, FIELDS: tl.constexpr):
    """Return the address of an operand's record, in records of shape (slots, PARTS, FIELDS)."""
    return records_ptr + (slot * PARTS + part) * FIELDS


@triton.jit
def load_words(p_record, FIELD: tl.constexpr):
    """Return the address of a buffer of packed words."""
    return tl.load(p_record + FIELD).to(tl.pointer_type(tl.int32))


@triton.jit
def load_aligned_words(p_record, FIELD: tl.constexpr):
    """Return the address of a buffer of packed words that begins at a multiple of 16 bytes.

    A thread then loads the words of four rows at once; without that knowledge it loads those of one row.
    """
    return tl.multiple_of(tl.load(p_record + FIELD).to(tl.pointer_type(tl.int32)), 16)


@triton.jit
def load_address(p_record, FIELD: tl.constexpr, DTYPE: tl.constexpr):
    """Return the address of a buffer of a dtype."""
    return tl.load(p_record + FIELD).to(tl.pointer_type(DTYPE))


@triton.jit
def token_of(order_ptr, first, i, count):
    """Return the number of a token tile's i-th token, or of its last token if the tile has fewer.

    So a tile that is not full computes its last token several times, and :func:`add_token` drops the rest.
    """
    return tl.load(order_ptr + first + tl.minimum(i, count - 1)).to(tl.int64)


@triton.jit
def token_pointers(x_ptr, x_stride, order_ptr, first, count, TOKENS: tl.constexpr):
    """Return the addresses of the rows of x of a token tile's tokens, as a tuple."""
    p_x = ()
    for t in tl.static_range(TOKENS):
        p_x = p_x + (x_ptr + token_of(order_ptr, first, t, count) * x_stride,)
    return p_x


@triton.jit
def zeros_tuple(COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return a tuple of COUNT float32 accumulators of zero, each of the shape (ROWS, COLUMNS)."""
    found = ()
    for _ in tl.static_range(COUNT):
        found = found + (tl.zeros([ROWS, COLUMNS], tl.float32),)
    return found


@triton.jit
def add_to_rows(p_y, y, mask):
    """Add float32 values to an output, rounded to its dtype once."""
    old = tl.load(p_y, mask=mask, other=0).to(tl.float32)
    tl.store(p_y, (old + y).to(p_y.dtype.element_ty), mask=mask)


@triton.jit
def add_token(y_ptr, y_stride, order_ptr, first, t, count, row, mask, y):
    """Add one token's products of some rows to its output, if the token tile has a t-th token."""
    if t < count:
        token = tl.load(order_ptr + first + t).to(tl.int64)
        add_to_rows(y_ptr + token * y_stride + row, y, mask)
