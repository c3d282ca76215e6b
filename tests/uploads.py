"""Helpers of the tests of uploads: a file larger than the ring, a file object that calls back, a check of a tensor."""

from __future__ import annotations

import io
import threading

import numpy as np
import torch

import deltafmt
import deltafmt.torch as dt
from delta_files import DeltaWriter, views_of

MIB = 1 << 20


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes() if tensor.numel() else b""


def check_equal(file: deltafmt.DeltaFile, name: str, tensor: dt.DeviceTensor) -> None:
    """Compare one tensor with the views that the reader gives."""
    entry = file.resolve(name)
    assert tensor.entry == entry
    buffers = file.buffers(name)
    assert len(tensor.terms) == len(entry.terms)
    for number, (operand, term) in enumerate(zip(tensor.terms, entry.terms, strict=True)):
        prefix = f"terms[{number}]." if len(entry.terms) > 1 else ""
        assert (operand.rows, operand.columns, operand.seed) == (entry.delta_rows, entry.columns, term.seed)
        for key in term.buffers:
            wanted = buffers.pop(prefix + key)
            if key == "index":
                wanted = views_of(term.layout, wanted, entry.delta_rows, entry.columns)
            found = operand.buffers[key]
            assert tuple(found.shape) == wanted.shape
            assert raw(found) == wanted.tobytes()
    if tensor.data is None:
        assert not buffers
    else:
        assert raw(tensor.data) == buffers.popitem()[1].tobytes()
        assert not buffers


def big_file(rng: int = 0, sections: int = 5, section_bytes: int = 3 * MIB) -> bytes:
    """Return a hot file whose sections are larger than a buffer of the smallest ring."""
    made = DeltaWriter(np.random.default_rng(rng), section_bytes=section_bytes)
    for number in range(sections):
        made.replace(f"t.{number}", "U8", (section_bytes + 4096 * number + 17,))
    return made.finish()


class SlowFile(io.BytesIO):
    """A file that calls back at its reads once it is told to."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.on_read = lambda: None

    def read(self, size: int | None = -1, /) -> bytes:
        """Read."""
        self.on_read()
        return super().read(size)


def upload_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("deltafmt-upload")}
