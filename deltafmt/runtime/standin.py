"""Stand-in for the streaming upload."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch

import deltafmt
from deltafmt.kernels.nm_matmul.operand import NMOperand
from deltafmt.runtime.device_delta import DeviceDelta, DeviceTensor
from deltafmt.runtime.values import TORCH_DTYPES


def load(
    path: str, *, device: torch.device, tensors: Sequence[str] | None = None, cancel: threading.Event | None = None
) -> DeviceDelta:
    """Load."""

    def up(array: np.ndarray, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        raw = torch.from_numpy(np.frombuffer(array.tobytes(), np.uint8).copy()).to(device)
        return raw.view(dtype).view(shape)

    out = {}
    nbytes = 0
    with deltafmt.open(path) as delta:
        for name in delta.keys() if tensors is None else tensors:
            entry = delta.resolve(name)
            terms = []
            for term in entry.terms:
                views = delta.term_views(entry, term)
                p = term.params
                sd = torch.bfloat16 if p.scale_dtype == "BF16" else torch.float32
                index = None
                if p.index == "fixed":
                    index = up(views["index"], torch.int32, views["index"].shape)
                codes = up(views["codes"], torch.int32, views["codes"].shape)
                scales = up(views["scales"], sd, views["scales"].shape)
                terms.append(NMOperand(p, term.seed, entry.delta_rows, entry.columns, codes, index, scales))
                nbytes += terms[-1].nbytes
            data = None
            if entry.data is not None:
                key = "data" if entry.action == "replace" else "new_rows"
                shape = entry.shape if entry.action == "replace" else (-1, entry.columns)
                data = up(delta.buffers(name)[key], TORCH_DTYPES[entry.dtype], shape)
                nbytes += data.nbytes
            out[name] = DeviceTensor(entry, tuple(terms), data)
        return DeviceDelta(torch.device(device), delta.content_id, dict(delta.metadata), nbytes, out)
