"""Adapters for vLLM: the ranks that it takes, and what the vectors cost that it does not.

vLLM loads factors alone. It refuses ``modules_to_save``, so norms and biases of a fine-tune are lost to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.checkpoint.parameter_names import Piece
from deltafmt.errors import UsageError
from deltafmt.format import constants as c
from deltafmt.pipeline.finetuned import finetuned_pieces, needs_base
from deltafmt.pipeline.lora_entries import EntriesInBase
from deltafmt.terms.floats import RAW_DTYPES, widen

VLLM: Final = "vllm"
# What --max-lora-rank can be.
RANKS: Final = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def max_lora_rank(rank: int) -> int | None:
    """Return the smallest ``--max-lora-rank`` that takes a rank; None if none does."""
    return next((most for most in RANKS if most >= rank), None)


def check_rank(name: str, rank: int) -> None:
    """Refuse factors of a rank that vLLM does not load.

    Raises:
        UsageError: names both ranks.
    """
    if max_lora_rank(rank) is None:
        raise UsageError(
            f"{name}: the largest rank is {rank}, and vLLM takes up to {RANKS[-1]}; serve the delta itself"
        )


def costs(
    left_out: Mapping[str, tuple[Piece, ...]], entries: EntriesInBase, base: Checkpoint | None
) -> dict[str, float | None]:
    """Return for each parameter that is left out how far it moved: the norm of its change over that of the base's.

    Args:
        left_out: the tensors of each parameter.
        entries: the delta's entries.
        base: the base; without it, nothing is known.
    """
    found: dict[str, float | None] = {}
    for parameter, pieces in left_out.items():
        change, whole = 0.0, 0.0
        known = base is not None
        for piece in pieces:
            entry = entries.resolve(piece.tensor)
            tensor = None if base is None else base.tensors.get(piece.tensor)
            if needs_base(entry) and base is not None:
                tensor = entries.base_tensor(entry)
            if tensor is None or tensor.shape != entry.shape or not {tensor.dtype, entry.dtype} <= set(c.DELTA_DTYPES):
                known = False
                break
            old = _values(b"".join(tensor.pieces()), tensor.dtype)
            new = _values(b"".join(finetuned_pieces(entries, piece.tensor)), entry.dtype)
            change += float(np.square(new - old).sum())
            whole += float(np.square(old).sum())
        found[parameter] = (change / whole) ** 0.5 if known and whole else None
    return found


def _values(data: bytes, dtype: str) -> NDArray[np.float32]:
    return widen(np.frombuffer(data, RAW_DTYPES[dtype]), dtype)
