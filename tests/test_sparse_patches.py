"""Patches as vLLM's weight transfer takes them, made from delta files and turned into them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

import deltafmt
from conftest import Raw, Tensors, normal, nudge, read_folder, write_folder
from deltafmt.errors import UsageError, WrongBaseError
from foreign_files import write_sparse_file, write_version_folder
from strategies import same_examples

DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class Foreign:
    """A patch as vLLM's own class has it."""

    name: str
    indices: Any
    values: Any
    full_shape: Any


def tensor_of(raw: Raw) -> Any:
    return torch.frombuffer(bytearray(raw.data), dtype=torch.uint8).view(DTYPES[raw.dtype]).reshape(raw.shape)


def raw_of(like: Raw, tensor: Any) -> Raw:
    return replace(like, data=tensor.contiguous().view(torch.uint8).numpy().tobytes())


def applied(a: Tensors, patches: Any) -> Tensors:
    """Return what patches give, by torch's own means."""
    found = dict(a)
    for patch in patches:
        assert patch.indices.dtype == torch.int32
        assert tuple(patch.full_shape) == a[patch.name].shape
        flat = tensor_of(found[patch.name]).reshape(-1).clone()
        assert flat.dtype == patch.values.dtype
        bits = flat.view(torch.uint8).reshape(flat.numel(), -1)
        bits[patch.indices.long()] = patch.values.view(torch.uint8).reshape(patch.values.numel(), -1)
        found[patch.name] = raw_of(a[patch.name], flat)
    return found


def foreign(a: Tensors, b: Tensors, rng: np.random.Generator) -> list[Foreign]:
    """Return patches in no order, and their indices neither."""
    found = []
    for name in rng.permutation(list(b)):
        before, after = (np.frombuffer(t[name].data, np.uint8).reshape(-1, width(a[name])) for t in (a, b))
        places = rng.permutation(np.flatnonzero((before != after).any(axis=1)))
        values = torch.from_numpy(after[places].reshape(-1)).view(DTYPES[a[name].dtype])
        found.append(Foreign(str(name), torch.from_numpy(places.astype("<i4")), values, list(a[name].shape)))
    return found


def width(tensor: Raw) -> int:
    return int(DTYPES[tensor.dtype].itemsize)


@st.composite
def versions(draw: st.DrawFn) -> tuple[Tensors, Tensors, np.random.Generator]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    a, b = {}, {}
    for number in range(draw(st.integers(1, 3))):
        dtype = draw(st.sampled_from(sorted(DTYPES)))
        shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
        count = int(np.prod(shape))
        old = rng.integers(0, 256, (count, DTYPES[dtype].itemsize), np.uint8)
        values = torch.from_numpy(rng.normal(0, 1, count)).to(DTYPES[dtype])
        new = old.copy()
        chosen = rng.random(count) < draw(st.sampled_from((0, 0.2, 1)))
        new[chosen] = values.view(torch.uint8).numpy().reshape(count, -1)[chosen]
        a[f"t{number}"], b[f"t{number}"] = Raw(dtype, shape, old.tobytes()), Raw(dtype, shape, new.tobytes())
    return a, b, rng


@same_examples(20)
@given(made=versions())
def test_there_and_back(tmp_path_factory: pytest.TempPathFactory, made: tuple[Tensors, Tensors, Any]) -> None:
    a, b, rng = made
    folder = tmp_path_factory.mktemp("trip")
    base, after = write_folder(folder / "a", a), write_folder(folder / "b", b)
    result = deltafmt.sync.convert_patches(foreign(a, b, rng), folder / "d.deltafmt", base)
    assert result.tensors == sum(a[name] != b[name] for name in a)
    deltafmt.unpack(base, folder / "d.deltafmt", folder / "u")
    assert (folder / "u/model.safetensors").read_bytes() == (after / "model.safetensors").read_bytes()
    patches = deltafmt.sync.sparse_patches(folder / "d.deltafmt", base)
    assert applied(a, patches) == b
    assert all((patch.indices[1:] > patch.indices[:-1]).all() for patch in patches)


A: Tensors = {"w": normal(1, (6, 8)), "n": normal(2, (8,), "F32")}
B: Tensors = {name: nudge(tensor, 3) for name, tensor in A.items()}


def test_patches_of_the_other_formats(tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base", A)
    for source in (write_version_folder(tmp_path / "v", A, B), write_sparse_file(tmp_path / "p.safetensors", A, B)):
        assert applied(A, deltafmt.sync.sparse_patches(source, base)) == B


def test_patches_of_one_tensor_are_applied_in_their_order(tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base", A)
    numbers = [torch.tensor([5, 2], dtype=torch.int32), torch.tensor([2], dtype=torch.int64)]
    values = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])]
    patches = [Foreign("n", places, new, (8,)) for places, new in zip(numbers, values, strict=True)]
    result = deltafmt.sync.convert_patches(patches, tmp_path / "d.deltafmt", base)
    assert (result.source, result.tensors, result.version) == ("vllm", 1, None)
    deltafmt.unpack(base, tmp_path / "d.deltafmt", tmp_path / "u")
    found = tensor_of(read_folder(tmp_path / "u")["n"])
    assert (found[5], found[2]) == (1, 3)
    link = deltafmt.sync.convert_patches([], tmp_path / "e.deltafmt", tmp_path / "u", parent=tmp_path / "d.deltafmt")
    assert link.parent == result.content_id


def patch(**changes: Any) -> Foreign:
    made = Foreign("w", torch.tensor([1, 2], dtype=torch.int32), torch.ones(2, dtype=torch.bfloat16), (6, 8))
    return replace(made, **changes)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"name": "x"}, WrongBaseError, 'changes a tensor "x"'),
        ({"full_shape": (8, 6)}, WrongBaseError, r"BF16 \[6, 8\], and a patch of it is for BF16 \[8, 6\]"),
        ({"values": torch.ones(2)}, WrongBaseError, r"is for F32 \[6, 8\]"),
        ({"values": torch.ones(2, dtype=torch.int16)}, UsageError, "no floats"),
        ({"values": torch.tensor([1, torch.nan], dtype=torch.bfloat16)}, UsageError, "NaN, which means unchanged"),
        ({"values": torch.ones(3, dtype=torch.bfloat16)}, UsageError, "not two rows alike"),
        ({"indices": torch.tensor([1.0, 2.0])}, UsageError, "not a row of int32"),
        ({"indices": [1, 2]}, UsageError, "indices are a list, not a tensor"),
        ({"values": np.ones(2)}, UsageError, "values are a ndarray, not a tensor"),
        ({"indices": torch.tensor([[1, 2]], dtype=torch.int32)}, UsageError, "not a row of int32"),
        ({"indices": torch.tensor([2, 2], dtype=torch.int32)}, UsageError, 'patch of "w": index 2 stands twice'),
        ({"indices": torch.tensor([2, 48], dtype=torch.int32)}, UsageError, "index 48 lies outside"),
        ({"indices": torch.tensor([-1, 4], dtype=torch.int32)}, UsageError, "index -1 lies outside"),
        ({"indices": torch.tensor([1, 2], dtype=torch.int32, device="meta")}, UsageError, "indices have no bytes"),
        ({"values": torch.ones(2, dtype=torch.bfloat16).to_sparse()}, UsageError, "values have no bytes"),
        ({"values": torch._neg_view(torch.ones(2, dtype=torch.bfloat16))}, UsageError, "a view of other values"),
        ({"full_shape": None}, UsageError, "full_shape None is not a row of sizes"),
        ({"full_shape": (6, 8.0)}, UsageError, "is not a row of sizes"),
    ],
)
def test_patches_that_are_refused(tmp_path: Path, changes: dict[str, Any], error: type[Exception], words: str) -> None:
    base = write_folder(tmp_path / "base", A)
    with pytest.raises(error, match=words):
        deltafmt.sync.convert_patches([patch(**changes)], tmp_path / "d.deltafmt", base)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_what_is_no_list_of_patches(tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base", A)
    given: Any
    for given, words in ((5, "the patches are a int"), ([("w", 1, 2, 3)], "a tuple is no patch: it has no name")):
        with pytest.raises(UsageError, match=words):
            deltafmt.sync.convert_patches(given, tmp_path / "d.deltafmt", base)


def test_what_vllm_cannot_take(tmp_path: Path) -> None:
    def refusing(words: str, b: Tensors) -> None:
        folder = tmp_path / words.split(maxsplit=1)[0]
        base, after = write_folder(folder / "a", a), write_folder(folder / "b", b)
        deltafmt.pack(base, after, folder / "d.deltafmt", method=deltafmt.methods.Exact())
        with pytest.raises(UsageError, match=words):
            deltafmt.sync.sparse_patches(folder / "d.deltafmt", base)

    a = A | {"ids": Raw("I64", (2,), bytes(16))}
    refusing("NaN, which means unchanged", a | {"n": replace(A["n"], data=A["n"].data[:-4] + b"\xff\xff\xff\x7f")})
    refusing("floats alone", a | {"ids": Raw("I64", (2,), bytes(15) + b"\x01")})
    refusing("new, or has another name in the base, and a patch of vLLM changes", a | {"more": A["n"]})
