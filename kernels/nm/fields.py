"""Reading packed words of ``nm`` terms in kernels: one field at a time, or the words of a chunk of a row.

The fields of a row are unsigned numbers of k bits. Each is cut into planes whose widths are powers of two, such as 3 =
2 + 1: first the words with the low 2 bits of all fields, then those with the bit above. Word w of 32 rows lies side by
side, so a row's next word is 32 words further on (specification, section 11.2).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_field(p_words, element, mask, WIDTH: tl.constexpr, count):
    """Section 11.2: return field ``element`` of word streams, uint32.

    ``p_words`` points to each row's word 0; its word w is 32 words further on for each w. Planes follow each other.
    """
    W0: tl.constexpr = 8 if WIDTH >= 8 else 4 if WIDTH >= 4 else 2 if WIDTH >= 2 else 1
    word = tl.load(p_words + (element * W0 // 32) * 32, mask=mask, other=0).to(tl.uint32, bitcast=True)
    value = (word >> (element * W0 % 32).to(tl.uint32)) & ((1 << W0) - 1)
    LEFT: tl.constexpr = WIDTH - W0
    if LEFT > 0:
        W1: tl.constexpr = 2 if LEFT >= 2 else 1
        start = (count * W0 + 31) // 32
        word = tl.load(p_words + (start + element * W1 // 32) * 32, mask=mask, other=0).to(tl.uint32, bitcast=True)
        value |= ((word >> (element * W1 % 32).to(tl.uint32)) & ((1 << W1) - 1)) << W0
        LAST: tl.constexpr = LEFT - W1
        if LAST > 0:
            start += (count * W1 + 31) // 32
            word = tl.load(p_words + (start + element // 32) * 32, mask=mask, other=0).to(tl.uint32, bitcast=True)
            value |= ((word >> (element % 32).to(tl.uint32)) & 1) << (W0 + W1)
    return value


@triton.jit
def load_planes(p_words, words, start, step, m_rows, ELEMENTS: tl.constexpr, WIDTH: tl.constexpr):
    """Return one plane's words of a chunk: a tuple over the words of a step, each uint32, shape (steps, mask rows).

    Args:
        p_words: the address of word 0 of each row.
        words, start: how many words a row has in this plane, and the first of them.
        step: the numbers of the steps.
        m_rows: which rows exist.
        ELEMENTS: fields of a step.
        WIDTH: bits of a field in this plane.
    """
    WORDS: tl.constexpr = ELEMENTS * WIDTH // 32
    loaded = ()
    for n in tl.static_range(WORDS):
        m = (step * WORDS + n < words)[:, None] & m_rows[None, :]
        word = tl.load(p_words[None, :] + ((start + step * WORDS + n) * 32)[:, None], mask=m, other=0)
        loaded = loaded + (word.to(tl.uint32, bitcast=True),)
    return loaded


@triton.jit
def spread_fields(loaded, ELEMENTS: tl.constexpr, WIDTH: tl.constexpr):
    """Return the fields of one plane's words, uint32, shape (ELEMENTS, steps, mask rows)."""
    FIELDS: tl.constexpr = 32 // WIDTH
    e = tl.arange(0, ELEMENTS)
    fields = tl.zeros([ELEMENTS, loaded[0].shape[0], loaded[0].shape[1]], tl.uint32)
    for n in tl.static_range(ELEMENTS // FIELDS):
        shifted = loaded[n][None, :, :] >> ((e % FIELDS) * WIDTH).to(tl.uint32)[:, None, None]
        fields |= tl.where((e // FIELDS == n)[:, None, None], shifted & ((1 << WIDTH) - 1), 0)
    return fields
