"""Where the fields of an ``nm`` operand's record stand, as constants of the kernels."""

from __future__ import annotations

import triton.language as tl

from deltafmt.kernels.nm.kind import RECORD

FIELDS = tl.constexpr(len(RECORD))
CODES = tl.constexpr(RECORD.offset("codes"))
INDEX_WORDS = tl.constexpr(RECORD.offset("index"))
SCALES = tl.constexpr(RECORD.offset("scales"))
SEED = tl.constexpr(RECORD.offset("seed"))
ROWS = tl.constexpr(RECORD.offset("rows"))
