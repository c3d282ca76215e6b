"""``deltafmt convert`` refuses in one line what a format cannot carry, options that do nothing, and outputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import deltafmt
from conftest import Cli, Tensors, normal, nudge, raw, read_folder, refused, safetensors_bytes, write_folder
from deltafmt.errors import UsageError
from foreign_files import INDEX, apply_version_folder, sparse_tensors, write_sparse_file, write_version_folder
from test_convert_strangers import FILES, SHARD, A, B


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("pair") / "base", A, files=FILES)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    folder = tmp_path_factory.mktemp("exact")
    deltafmt.pack(base, write_folder(folder / "b", B, files=FILES), folder / "d", method=deltafmt.methods.Exact())
    return folder / "d"


def test_inputs_of_other_kinds(tmp_path: Path, cli: Cli, base: Path) -> None:
    def said(source: Path, code: int, *parts: str) -> None:
        refused(cli("convert", source, "-o", tmp_path / "d.deltafmt", "--base", base), code, *parts)

    said(base, 3, "it is a whole checkpoint; pack it against the base with the method exact")
    said(base / "model.safetensors", 3, "it is a whole checkpoint")
    said(base / "config.json", 3, "config.json")
    (tmp_path / "empty").mkdir()
    said(tmp_path / "empty", 3, f"no version folder: it has no {INDEX} of changes")
    later = {name.replace(".indices", ".idx").replace(".values", ".val"): t for name, t in sparse_tensors(A, B).items()}
    (tmp_path / "later.safetensors").write_bytes(safetensors_bytes(later))
    said(tmp_path / "later.safetensors", 3, "a patch of the later form of TRL", "which is not read")
    said(tmp_path / "nowhere", 5, "no such file or folder")


def test_options_that_do_not_go_together(tmp_path: Path, cli: Cli, base: Path, exact: Path) -> None:
    patch = write_version_folder(tmp_path / "v", A, B)
    out = tmp_path / "out"

    def said(source: Path, *words: str | Path, code: int = 2) -> str:
        return refused(cli("convert", source, "-o", out, "--base", base, *words), code)

    assert "no format to convert it to is given; --to version-folder or --to trl names one" in said(exact)
    assert "repack or squash" in said(exact, "--to", "deltafmt")
    assert "is not one of deltafmt, version-folder, trl" in said(exact, "--to", "zip")
    assert "a parent is named in a delta file" in said(exact, "--to", "version-folder", "--parent", exact)
    assert "encoding 'xor': a version-folder has one" in said(patch, "--encoding", "xor")
    for limit in ("memory", "elements", "output"):
        assert "limits are for delta files, and" in said(patch, f"--max-{limit}", "1")
    with pytest.raises(UsageError, match="limits are for delta files"):
        deltafmt.sync.sparse_patches(patch, base, limits=deltafmt.Limits(max_output=1))
    said(patch, "--parent", exact, "--max-memory", "1", code=3)
    assert "--parent is empty" in said(patch, "--parent", "")
    assert "there is nothing to leave out" in said(patch, "--tensors-only")
    assert "a delta file has none" in said(patch, "--model-version", "3")
    folder = ("--to", "version-folder")
    assert "--model-version V says which" in said(exact, *folder)
    assert "--base-version V says which" in said(exact, *folder, "--model-version", "v1")
    assert "version 3 cannot be made on version 3" in said(
        exact, *folder, "--model-version", "3", "--base-version", "3"
    )
    assert "version 3 cannot be made on version 4" in said(
        exact, *folder, "--model-version", "3", "--base-version", "4"
    )
    assert "is not one word" in said(exact, *folder, "--model-version", "a b")
    assert "is not named like one" in said(exact, "--to", "trl")
    out = tmp_path / "weight_v000003"
    assert "holds version 3, and this is version 4" in said(exact, *folder, "--model-version", "4")
    assert "holds version 3, and this is version v4" in said(
        exact, *folder, "--model-version", "v4", "--base-version", "v3"
    )
    out = tmp_path / "t.safetensors"
    assert "TRL's versions are numbers" in said(exact, "--to", "trl", "--model-version", "v4")
    assert not any(path.name.startswith((".", "out", "weight", "t.")) for path in tmp_path.iterdir())


def test_outputs_that_exist_or_are_inputs(tmp_path: Path, cli: Cli, base: Path, exact: Path) -> None:
    patch = write_version_folder(tmp_path / "v", A, B)
    sparse = write_sparse_file(tmp_path / "p.safetensors", A, B)
    before = {path: path.read_bytes() for path in patch.iterdir()}
    for words in (
        ("convert", patch, "-o", patch, "--base", base, "--to", "version-folder", "--force"),
        ("convert", patch, "-o", base, "--base", base, "--to", "version-folder", "--force"),
        ("convert", sparse, "-o", sparse, "--base", base, "--to", "trl", "--force"),
        ("convert", exact, "-o", tmp_path, "--base", tmp_path / "v", "--to", "version-folder", "--force"),
    ):
        assert "input" in refused(cli(*words), 2)
    (tmp_path / "link").symlink_to(patch)
    for out, to in (
        (patch / SHARD, "deltafmt"),
        (patch / INDEX, "deltafmt"),
        (patch / SHARD, "trl"),
        (tmp_path / "link" / SHARD, "deltafmt"),
        (patch / "new.deltafmt", "deltafmt"),
        (patch / "new", "version-folder"),
    ):
        assert "lies in the input" in refused(
            cli("convert", patch, "-o", out, "--base", base, "--to", to, "--force"), 2
        )
    inside = base / "model.safetensors"
    assert refused(cli("convert", sparse, "-o", inside, "--base", base, "--to", "trl", "--force"), 2)
    arguments = ("convert", exact, "-o", patch, "--base", base, "--to", "version-folder", "--model-version", "1")
    assert "exists; --force replaces it" in refused(cli(*arguments), 2)
    assert {path: path.read_bytes() for path in patch.iterdir()} == before
    assert cli(*arguments, "--force").code == 0
    assert {path: path.read_bytes() for path in patch.iterdir()} != before


def packed(folder: Path, base: Path, b: Tensors, files: dict[str, bytes] | None = None, **options: Any) -> Path:
    after = write_folder(folder / "after", b, files=FILES if files is None else files)
    deltafmt.pack(base, after, folder / "d.deltafmt", **{"method": deltafmt.methods.Exact(), **options})
    return folder / "d.deltafmt"


def packed_in_shards(folder: Path, base: Path) -> Path:
    after = write_folder(folder / "after", B, [["a.weight"], ["b.weight", "c.weight"]], FILES)
    deltafmt.pack(base, after, folder / "d.deltafmt", method=deltafmt.methods.Exact())
    return folder / "d.deltafmt"


BEYOND: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "new": (lambda f, base: packed(f, base, B | {"d.weight": normal(4, (2,))}), '"d.weight" is new'),
    "gone": (
        lambda f, base: packed(f, base, {"a.weight": B["a.weight"], "b.weight": B["b.weight"]}),
        '"c.weight" vanishes',
    ),
    "longer": (
        lambda f, base: packed(f, base, B | {"a.weight": normal(4, (7, 8))}),
        "becomes BF16 [7, 8] from BF16 [6, 8]",
    ),
    "wider": (
        lambda f, base: packed(f, base, B | {"c.weight": raw(A["c.weight"].floats()[0], "F32")}),
        "becomes F32 [5] from BF16 [5]",
    ),
    "files": (
        lambda f, base: packed(f, base, B, {"config.json": b'{"model_type": "llama", "x": 1}'}),
        "the attached file config.json is not the base's, and a version-folder carries tensors alone; --tensors-only",
    ),
    "heads": (
        packed_in_shards,
        "has another header than in the base, and a version-folder carries tensors alone; --tensors-only",
    ),
}


@pytest.mark.parametrize("case", BEYOND)
def test_what_a_version_folder_cannot_carry(tmp_path: Path, cli: Cli, base: Path, case: str) -> None:
    make, part = BEYOND[case]
    delta = make(tmp_path, base)
    out = tmp_path / "out" / "weight_v000001"
    out.parent.mkdir()
    words = ("convert", delta, "-o", out, "--base", base, "--to", "version-folder")
    refused(cli(*words), 2, part)
    assert list(out.parent.iterdir()) == []
    assert (cli(*words, "--tensors-only").code == 0) == (case in ("files", "heads"))


def test_lossy_terms(tmp_path: Path, cli: Cli) -> None:
    base = write_folder(tmp_path / "base", {"w": normal(1, (64, 256))})
    after = write_folder(tmp_path / "after", {"w": nudge(normal(1, (64, 256)), 2)})
    out = tmp_path / "weight_v000001"
    for exact in (False, True):
        delta = tmp_path / f"{exact}.deltafmt"
        deltafmt.pack(base, after, delta, method=deltafmt.methods.RTN(bits=4), exact=exact)
        words = ("convert", delta, "-o", out, "--base", base, "--to", "version-folder")
        if not exact:
            refused(cli(*words), 2, 'tensor "w" has lossy terms', "pack what it gives with the method exact")
            continue
        # A progressive file restores every bit.
        assert cli(*words).code == 0
        assert apply_version_folder(out, read_folder(base)) == read_folder(after)


def test_what_trl_cannot_carry(tmp_path: Path, cli: Cli, base: Path, exact: Path) -> None:
    words = ("convert", exact, "-o", tmp_path / "t.safetensors", "--base", base, "--to", "trl")
    refused(cli(*words), 2, 'tensor "b.weight" is F32, and TRL\'s patches change BF16 alone')
    assert list(tmp_path.iterdir()) == []


def test_a_delta_file_on_another_base(tmp_path: Path, cli: Cli, exact: Path) -> None:
    for number, name in enumerate(A):
        other = write_folder(tmp_path / str(number), A | {name: nudge(A[name], 5)}, files=FILES)
        out = tmp_path / "weight_v000001"
        words = ("convert", exact, "-o", out, "--base", other, "--to", "version-folder")
        refused(cli(*words), 4, f'tensor "{name}" differs from the one that was packed against')
        assert not out.exists()


def test_damaged_delta_files(tmp_path: Path, cli: Cli, base: Path, exact: Path) -> None:
    data = bytearray(exact.read_bytes())
    data[len(data) // 3] ^= 1
    (tmp_path / "d.deltafmt").write_bytes(data)
    words = ("convert", tmp_path / "d.deltafmt", "-o", tmp_path / "out", "--base", base, "--to", "version-folder")
    refused(cli(*words, "--model-version", "1"), 3)
    assert not (tmp_path / "out").exists()


def test_a_pipeline_of_several_folders(tmp_path: Path, cli: Cli) -> None:
    for name, scale in (("base", 0.0), ("after", 0.1)):
        folder = tmp_path / name
        write_folder(folder / "unet", {"w": nudge(A["a.weight"], 1, scale=scale)})
        (folder / "model_index.json").write_text('{"_class_name": "P", "unet": ["diffusers", "UNet2DConditionModel"]}')
    deltafmt.pack(tmp_path / "base", tmp_path / "after", tmp_path / "d.deltafmt", method=deltafmt.methods.Exact())
    words = ("convert", tmp_path / "d.deltafmt", "-o", tmp_path / "v", "--base", tmp_path / "base")
    refused(cli(*words, "--to", "version-folder", "--model-version", "1"), 2, "is made of several folders")


@pytest.mark.parametrize("name", [SHARD, INDEX])
def test_a_source_that_changes_meanwhile(tmp_path: Path, base: Path, name: str) -> None:
    patch = write_version_folder(tmp_path / "v", A, B)

    def touch(*_: object) -> None:
        data = (patch / name).read_bytes()
        (patch / name).write_bytes(data.replace(b'"000001"', b'"000002"'))

    with pytest.raises(deltafmt.errors.StorageError, match="changed while it was being read"):
        deltafmt.convert(patch, tmp_path / "d.deltafmt", base, progress=touch)
    assert [path.name for path in tmp_path.iterdir()] == ["v"]
