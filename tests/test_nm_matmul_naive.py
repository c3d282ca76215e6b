"""The naive torch product, written from the specification alone, agrees with the numpy decoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import deltafmt
from deltafmt.checkpoint.folder_writer import CheckpointWriter, TensorSpec
from deltafmt.errors import UsageError
from deltafmt.methods import DeltaDQ
from deltafmt.terms.nm.layout import NMLayout

torch = pytest.importorskip("torch")

CASES = [
    DeltaDQ(4, 16, 4),
    DeltaDQ(2, 16, 2, share=1),
    DeltaDQ(1, 32, 4, share=8),
    DeltaDQ(1, 8, 1),
    DeltaDQ(2, 128, 8, share=2),
    DeltaDQ(3, 7, 3, index="fixed", scale_group=5),
    DeltaDQ(5, 12, 6, index="fixed", share=1, scale_dtype="F32"),
    DeltaDQ(6, 100, 5, index="fixed", share=8, scale_group=4),
    DeltaDQ(2, 16, 3, share=4),
]


def write(path: Path, weight: np.ndarray) -> Path:
    rows, columns = weight.shape
    writer = CheckpointWriter(path, [TensorSpec("w", "F32", (rows, columns))])
    writer.write("w", 0, memoryview(np.ascontiguousarray(weight)).cast("B"))
    writer.commit()
    return path


def as_torch(name: str, array: np.ndarray) -> torch.Tensor:
    if name != "scales":
        return torch.from_numpy(array.view(np.int32).copy())
    if array.dtype == np.float32:
        return torch.from_numpy(array.copy())
    return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)


@pytest.mark.parametrize("method", CASES, ids=lambda method: method.describe())
@pytest.mark.parametrize(("rows", "columns"), [(64, 256), (75, 203), (259, 203)])
def test_product_from_packed_words(method: DeltaDQ, rows: int, columns: int, tmp_path: Path) -> None:
    from deltafmt.kernels.nm.naive import nm_delta, nm_matmul

    rng = np.random.default_rng(rows)
    base = rng.standard_normal((rows, columns), np.float32)
    change = rng.standard_normal((rows, columns), np.float32) / 100
    deltafmt.pack(
        write(tmp_path / "a", base), write(tmp_path / "b", base + change), tmp_path / "d.deltafmt", method=method
    )
    with deltafmt.open(tmp_path / "d.deltafmt") as delta:
        term = delta["w"].terms[0]
        buffers = {name: as_torch(name, array) for name, array in delta.buffers("w").items()}
        expected = torch.from_numpy(delta.delta("w"))
    assert torch.equal(nm_delta(term.layout, buffers, term.seed, rows, columns), expected)
    x = torch.randn(5, columns)
    y = torch.randn(5, rows)
    found = nm_matmul(x, term.layout, buffers, term.seed, rows, y)
    exact = y.double() + x.double() @ expected.double().T
    assert torch.linalg.norm(found - exact) / torch.linalg.norm(exact) < 1e-5


def test_rank_is_refused() -> None:
    from deltafmt.kernels.nm.naive import nm_delta

    with pytest.raises(UsageError, match="rank"):
        nm_delta(NMLayout(2, 8, 4, "rank"), {}, 0, 1, 8)
