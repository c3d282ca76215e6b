"""Chains that ask for more than their files pay for (docs/security.md)."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

import deltafmt
from conftest import Raw, write_folder
from deltafmt.checkpoint.fingerprint import hasher
from deltafmt.container.writer import ContainerWriter
from deltafmt.errors import InvalidFileError
from deltafmt.format import constants as c
from deltafmt.index.entries import BasePart, BaseRef, TensorEntry


def crossing(folder: Path, links: int) -> tuple[Path, list[Path]]:
    """Write a chain of small links whose two tensors are each made of halves of the two before them."""
    data = bytes(range(256)) * 2
    base = write_folder(folder / "base", {name: Raw("U8", (512,), data) for name in "ab"})
    digest = hasher("U8", (512,))
    digest.update(data)
    parts = BasePart("a", 0, 256), BasePart("b", 256, 256)
    reference = BaseRef(digest.digest(), "U8", (512,), parts)
    entries = [TensorEntry(name, "same", "U8", (512,), reference) for name in "ab"]
    files, parent = list[Path](), None
    for number in range(links):
        sink = io.BytesIO()
        writer = ContainerWriter(sink, features=c.FEATURE_PARTS | (c.FEATURE_PARENT if number else 0))
        parent = writer.finish(entries, metadata={"number": str(number)}, parent=parent)
        files.append(folder / f"{number}.deltafmt")
        files[-1].write_bytes(sink.getvalue())
    return base, files


def test_a_chain_whose_parts_multiply_is_refused(tmp_path: Path) -> None:
    """Of 30 links of 5 KB, each tensor of the first would be computed 2^29 times."""
    base, files = crossing(tmp_path, 30)
    assert deltafmt.apply(base, files[:5], tmp_path / "five").tensors == 2
    with pytest.raises(InvalidFileError, match=r"\.deltafmt: with the links behind it.*max_elements"):
        deltafmt.apply(base, files, tmp_path / "out")
    with pytest.raises(InvalidFileError, match="max_elements"):
        deltafmt.verify(files[-1], base, before=files[:-1])
    assert not (tmp_path / "out").exists()
