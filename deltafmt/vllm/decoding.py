"""The tensors of a delta file, decoded: for devices and layers where no kernel multiplies with the packed words.

Decoding makes the checks of section 15 of the specification. Each tensor is decoded once, whatever needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch

from deltafmt.delta import DeltaFile, RunDecoder
from deltafmt.errors import UsageError
from deltafmt.index.entries import TensorEntry
from deltafmt.runtime.dtypes import TORCH_DTYPES
from deltafmt.runtime.values import added
from deltafmt.terms.floats import RAW_DTYPES
from deltafmt.vllm.base import EngineBase
from deltafmt.vllm.tensor_places import Piece

# What the loops that add call the dtypes of weights.
RAW_NAMES: Final = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


class Decoded:
    """The tensors of an open file, and what they make of the base's.

    Args:
        opened: the file.
        base: the base's checkpoint; None if the engine's weights are random.
    """

    def __init__(self, opened: DeltaFile, base: EngineBase | None) -> None:
        self._opened, self._base = opened, base
        self._held: dict[str, torch.Tensor] = {}
        self._deltas: dict[tuple[str, str, range, range], torch.Tensor] = {}
        self._sums: dict[object, torch.Tensor] = {}

    def delta(self, entry: TensorEntry, base_name: str, piece: Piece) -> torch.Tensor:
        """Return the delta of a piece of a matrix in float32. An embedding and a head that are tied share one.

        Args:
            entry: of the tensor.
            base_name: its name in the base.
            piece: the piece.
        """
        key = entry.name, base_name, piece.rows, piece.columns
        if key not in self._deltas:
            part = self._part(entry, piece)
            if not entry.terms:
                found = part.float() - old_values(base_name, piece, self._base)
            else:
                # A view would keep all of it.
                found = part if part.shape == tuple(entry.shape) else part.clone()
            self._deltas[key] = found
        return self._deltas[key]

    def sum(self, weight: torch.Tensor, pieces: Sequence[tuple[TensorEntry, Piece]]) -> torch.Tensor:
        """Return a layer's weight with all that a delta changes of it, in float32.

        Layers with the same weight and the same changes share one.

        Args:
            weight: what the layer computes with for the base.
            pieces: the pieces of tensors that are a part of it.
        """
        key = weight.data_ptr(), tuple((entry.name, piece.start, piece.rows, piece.columns) for entry, piece in pieces)
        if key not in self._sums:
            runs = [range(piece.start, piece.start + len(piece.rows)) for _, piece in pieces]
            made = [self._new_rows(weight[_slice(run)], *one) for run, one in zip(runs, pieces, strict=True)]
            if runs == [range(len(weight))]:
                (found,) = made
            else:
                found = torch.empty(weight.shape, dtype=torch.float32, device="cpu")
                if sum(map(len, runs)) < len(weight):
                    found.copy_(weight)
                for run, rows in zip(runs, made, strict=True):
                    found[_slice(run)] = rows
            self._sums[key] = found
        return self._sums[key]

    def _new_rows(self, old: torch.Tensor, entry: TensorEntry, piece: Piece) -> torch.Tensor:
        """Return rows of a layer's weight with a piece of a delta, in float32."""
        if not entry.terms:
            return self._part(entry, piece).float()
        name = RAW_NAMES.get(old.dtype)
        if name is None or piece.rows != range(entry.rows) or piece.columns != range(entry.columns):
            return old.float() + self._part(entry, piece)
        self._opened.check_work([entry], 0)
        decoder = RunDecoder(self._opened, entry)
        bits = old.contiguous().view(torch.int16 if old.dtype.itemsize == 2 else torch.int32)
        raw = bits.numpy().view(RAW_DTYPES[name])
        runs = [decoder.add(start, stop, raw[start:stop], name, "F32") for start, stop in decoder.ranges()]
        return torch.from_numpy((runs[0] if len(runs) == 1 else np.concatenate(runs)).view(np.float32))

    def new_values(self, entry: TensorEntry, base: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Return fine-tuned values of a vector or a table, in the base's dtype.

        Args:
            entry: of the tensor.
            base: values of the base, all or a run of them.
            first: the place of the first.
        """
        if len(base) == entry.shape[0]:
            part = self._whole(entry)
        else:
            part = self._whole(entry)[first : first + len(base)]
        return (added(base, part, TORCH_DTYPES[entry.dtype]) if entry.terms else part).to(base.dtype)

    def _part(self, entry: TensorEntry, piece: Piece) -> torch.Tensor:
        return self._whole(entry)[_slice(piece.rows), _slice(piece.columns)]

    def _whole(self, entry: TensorEntry) -> torch.Tensor:
        """Return the delta of a tensor in float32, or the values that replace it."""
        name = entry.name
        if name not in self._held:
            with torch.inference_mode(mode=False):
                if entry.terms:
                    found = torch.from_numpy(self._opened.delta(name))
                else:
                    raw = torch.frombuffer(bytearray(self._opened.buffers(name)["data"]), dtype=torch.uint8)
                    found = raw.view(TORCH_DTYPES[entry.dtype]).view(tuple(entry.shape))
            self._held[name] = found
        return self._held[name]


def old_values(name: str, piece: Piece, base: EngineBase | None) -> torch.Tensor:
    """Return a piece of a tensor of the base in float32.

    Raises:
        UsageError: the engine's weights are random.
    """
    if base is None:
        raise UsageError(f'tensor "{name}" is needed, and the engine\'s weights are random')
    return base.values(name)[_slice(piece.rows), _slice(piece.columns)].float()


def _slice(run: range) -> slice:
    return slice(run.start, run.stop)
