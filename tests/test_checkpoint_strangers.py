"""Hostile names of weight files and attachments in delta files from strangers: unpack writes in its folder only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import deltafmt
from conftest import normal, write_folder
from deltafmt.checkpoint.safetensors_file import SafetensorsFile
from deltafmt.container.writer import ContainerWriter
from deltafmt.errors import DeltafmtError, InvalidFileError
from deltafmt.pipeline.entry_writer import EntryWriter


def hostile(folder: Path, metadata: dict[str, str], files: dict[str, bytes], names: tuple[str, ...] = ("w",)) -> Path:
    """Write a delta file of tensors that are stored whole, with any metadata and attachments."""
    weights = write_folder(folder / "weights", {name: normal(1, (4, 4)) for name in names})
    path = folder / "hostile.deltafmt"
    with open(path, "wb") as file:
        container = ContainerWriter(file)
        tensors = SafetensorsFile(weights / "model.safetensors").tensors.values()
        entries = [EntryWriter(container).replace(tensor, tensor.pieces()) for tensor in tensors]
        attached = {name: container.attach(data) for name, data in sorted(files.items())}
        container.finish(entries, attachments=attached, metadata=metadata)
    return path


@pytest.mark.parametrize(
    ("metadata", "files", "names"),
    [
        ({"weights": "../evil.safetensors"}, {}, ("w",)),
        ({"weights": "/tmp/evil.safetensors"}, {}, ("w",)),
        ({"weights/../evil": "model.safetensors"}, {}, ("../evil/w",)),
        ({"weights//evil": "model.safetensors"}, {}, ("/evil/w",)),
        ({"weights/a": "model.safetensors"}, {"a": b"a file where a folder is"}, ("a/w",)),
        ({"weights/a": "model.safetensors", "weights/a/b": "model.safetensors"}, {"a/b": b""}, ("a/w", "a/b/w")),
    ],
    ids=["up", "absolute", "component up", "component absolute", "file for folder", "nested"],
)
def test_nothing_is_written_outside(
    tmp_path: Path, metadata: dict[str, str], files: dict[str, bytes], names: tuple[str, ...]
) -> None:
    delta = hostile(tmp_path, metadata, files, names)
    base = write_folder(tmp_path / "base", {"w": normal(2, (4, 4))})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DeltafmtError):
        deltafmt.unpack(base, delta, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/tmp/evil.safetensors").exists()
    assert not Path("/evil").exists()


def test_a_tensor_whose_name_looks_like_a_path_stays_in_its_file(tmp_path: Path) -> None:
    delta = hostile(tmp_path, {}, {}, ("../../evil", "/etc/evil"))
    base = write_folder(tmp_path / "base", {"w": normal(2, (4, 4))})
    deltafmt.unpack(base, delta, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_verify_refuses_hostile_names_too(tmp_path: Path) -> None:
    with pytest.raises(InvalidFileError, match="is not the name of a weight file"):
        deltafmt.verify(hostile(tmp_path, {"weights": "model.bin"}, {}))


def test_a_variant_of_the_base_is_no_path(tmp_path: Path) -> None:
    delta = hostile(tmp_path, {"base_variant": "../../x"}, {})
    base = write_folder(tmp_path / "base", {"w": normal(2, (4, 4))})
    (tmp_path / "x.safetensors").write_bytes(b"not read")
    deltafmt.unpack(base, delta, tmp_path / "out")
    assert deltafmt.verify(delta, base).base_tensors == 0


def test_an_output_with_other_folders_is_not_replaced(tmp_path: Path) -> None:
    """Folders that an index in the output names are those of an earlier run; others are somebody's."""
    delta = hostile(tmp_path, {}, {"modules.json": json.dumps([{"path": ""}, {"path": "1_Pooling"}]).encode()})
    base = write_folder(tmp_path / "base", {"w": normal(2, (4, 4))})
    out = tmp_path / "out"
    deltafmt.unpack(base, delta, out)
    (out / "1_Pooling").mkdir()
    deltafmt.unpack(base, delta, out, force=True)
    (out / "precious").mkdir()
    with pytest.raises(DeltafmtError, match="holds the folder precious and is not replaced"):
        deltafmt.unpack(base, delta, out, force=True)
