"""``--method exact``: the fine-tune's files come back byte for byte, and from no other base (spec, 7.10 and 17)."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

import deltafmt
from conftest import (
    Cli,
    Raw,
    Tensors,
    normal,
    nudge,
    plain,
    raw,
    refused,
    safetensors_bytes,
    small_tensors,
    with_header,
    write_folder,
    write_pair,
)
from deltafmt.checkpoint.folder_writer import TensorSpec
from deltafmt.checkpoint.restored import FolderRestorer
from deltafmt.errors import InvalidFileError, UsageError, WrongBaseError
from deltafmt.exact.prediction import converted
from deltafmt.format.constants import DTYPE_BITS, FEATURE_EXACT
from deltafmt.methods import RTN, Exact
from implementations import running

ANCHOR = "anchor.weight"


def random_raw(seed: int, dtype: str, shape: tuple[int, ...]) -> Raw:
    """Return any bits: NaNs with payloads, infinities, subnormal numbers, zeros of both signs."""
    count = -(-int(np.prod(shape, dtype=np.int64)) * DTYPE_BITS[dtype] // 8)
    return Raw(dtype, shape, np.random.default_rng(seed).integers(0, 256, count, np.uint8).tobytes())


def stepped(tensor: Raw, seed: int) -> Raw:
    """Return a tensor with some bytes changed."""
    data = np.frombuffer(tensor.data, np.uint8).copy()
    rng = np.random.default_rng(seed)
    data[rng.random(data.size) < 0.1] += 1
    return Raw(tensor.dtype, tensor.shape, data.tobytes())


def everything() -> tuple[Tensors, Tensors]:
    """Return a pair with a tensor of every dtype and every situation."""
    anchor = normal(1, (128, 96))
    a: Tensors = {ANCHOR: anchor, "embed.weight": normal(2, (50, 96)), "gone": normal(3, (7,))}
    b: Tensors = {ANCHOR: nudge(anchor, 4, scale=0.001), "embed.weight": nudge(a["embed.weight"], 5)}
    b["embed.weight"] = Raw("BF16", (53, 96), b["embed.weight"].data + normal(6, (3, 96)).data)
    for number, dtype in enumerate(sorted(DTYPE_BITS)):
        shape = (6, 8, 4) if number % 2 else (192,)
        a[f"every.{dtype}"] = random_raw(number, dtype, shape)
        b[f"every.{dtype}"] = stepped(a[f"every.{dtype}"], number)
    a |= {"scalar": plain(np.array(1.5, np.float32)), "void": Raw("F16", (0, 4), b""), "same": normal(7, (33, 5))}
    b |= {"scalar": plain(np.array(-0.0, np.float32)), "void": Raw("F16", (0, 4), b""), "same": a["same"]}
    a |= {"wide": normal(8, (20, 30), "F32"), "narrow": normal(9, (20, 30)), "shape": normal(10, (4, 5))}
    b |= {"wide": nudge(a["wide"], 11, "BF16"), "narrow": nudge(a["narrow"], 12, "F16"), "shape": normal(13, (5, 4))}
    b |= {"new.weight": normal(14, (10, 96)), "tied.weight": b["embed.weight"]}
    return a, b


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("exact")
    a, b = everything()
    names = list(b)
    files = {"config.json": b'{"model_type": "tiny"}\n', "tokenizer.json": b"{}"}
    write_folder(folder / "base", a)
    write_folder(folder / "ft", b, [names[::2], names[1::2]], files)
    return folder / "base", folder / "ft"


@pytest.fixture(scope="module")
def archive(pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("archive") / "ft.deltafmt"
    deltafmt.pack(*pair, out, method=Exact(), threads=2)
    return out


def test_every_file_comes_back_byte_for_byte(pair: tuple[Path, Path], archive: Path, tmp_path: Path) -> None:
    result = deltafmt.unpack(pair[0], archive, tmp_path / "out", threads=3)
    assert folder_bytes(tmp_path / "out") == folder_bytes(pair[1])
    weights = {name for name in folder_bytes(pair[1]) if name.startswith("model")}
    assert set(result.restored) == weights
    assert set(deltafmt.verify(archive, pair[0]).restored) == weights
    assert deltafmt.verify(archive).restored == ()


def test_actions_are_those_that_keep_every_bit(archive: Path) -> None:
    with deltafmt.open(archive) as opened:
        assert opened.container.features == FEATURE_EXACT
        actions = {entry.name: entry.action for entry in opened.container.entries()}
        assert {actions.pop(name) for name in ("same", "every.BOOL")} <= {"same", "exact"}
        assert actions.pop("tied.weight") == "alias"
        assert set(actions.values()) == {"exact"}
        without = {name for name in actions if opened[name].base is None}
        assert without == {"shape", "new.weight", "void"}
        assert "gone" in opened.container.removed
        with pytest.raises(UsageError, match=f'tensor "{ANCHOR}" is exact and has no delta; unpack restores it'):
            opened.delta(ANCHOR)
        assert list(opened.buffers(ANCHOR)) == ["exact"]


def test_bytes_do_not_depend_on_threads_or_loops(pair: tuple[Path, Path], archive: Path, tmp_path: Path) -> None:
    deltafmt.pack(*pair, tmp_path / "one.deltafmt", method=Exact(), threads=1)
    with running("numpy"):
        deltafmt.pack(*pair, tmp_path / "numpy.deltafmt", method=Exact(), threads=2)
        deltafmt.unpack(pair[0], archive, tmp_path / "out")
    assert (tmp_path / "one.deltafmt").read_bytes() == archive.read_bytes()
    assert (tmp_path / "numpy.deltafmt").read_bytes() == archive.read_bytes()
    assert folder_bytes(tmp_path / "out") == folder_bytes(pair[1])


def test_a_level_changes_the_bytes_and_not_what_they_say(
    pair: tuple[Path, Path], archive: Path, tmp_path: Path
) -> None:
    fast = deltafmt.pack(*pair, tmp_path / "fast.deltafmt", method=Exact("fast"))
    assert fast.size > archive.stat().st_size
    with deltafmt.open(archive) as one, deltafmt.open(tmp_path / "fast.deltafmt") as other:
        assert {name: one[name].exact and one[name].exact.digest for name in one} == {
            name: other[name].exact and other[name].exact.digest for name in other
        }
    deltafmt.unpack(pair[0], tmp_path / "fast.deltafmt", tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == folder_bytes(pair[1])


def test_a_repacked_archive_restores_the_same(pair: tuple[Path, Path], archive: Path, tmp_path: Path) -> None:
    cold, hot = tmp_path / "cold.deltafmt", tmp_path / "hot.deltafmt"
    assert deltafmt.repack(archive, cold, profile="cold").content_id == deltafmt.verify(archive).content_id
    deltafmt.repack(cold, hot, profile="hot")
    deltafmt.verify(cold, pair[0])
    assert hot.read_bytes() == archive.read_bytes()
    assert deltafmt.diff(archive, cold).changes == []


def test_any_header_comes_back(tmp_path: Path) -> None:
    """Order, spaces, metadata and names as no writer of ours makes them, in the folder of a component."""
    a, b = small_tensors()
    write_folder(tmp_path / "base", a)
    ft = tmp_path / "ft"
    ft.mkdir()
    parts, position = {}, 0
    for name in reversed(list(b)):
        parts[name] = (position, position + len(b[name].data))
        position = parts[name][1]
    header = {
        name: {"shape": list(b[name].shape), "data_offsets": list(parts[name]), "dtype": b[name].dtype} for name in b
    }
    text = json.dumps({**header, "__metadata__": {"deltafmt.content_id": "odd", "Größe": "1"}}, indent=3)
    (ft / "model.safetensors").write_bytes(
        with_header(text.encode(), b"".join(b[name].data for name in reversed(list(b))))
    )
    deltafmt.pack(tmp_path / "base", ft, tmp_path / "d.deltafmt", method=Exact())
    deltafmt.unpack(tmp_path / "base", tmp_path / "d.deltafmt", tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == folder_bytes(ft)


def test_a_single_file_comes_back_under_its_name(tmp_path: Path) -> None:
    a, b = small_tensors()
    for name, tensors in (("base", a), ("tuned", b)):
        (tmp_path / f"{name}.safetensors").write_bytes(safetensors_bytes(tensors))
    deltafmt.pack(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "d", method=Exact())
    deltafmt.unpack(tmp_path / "base.safetensors", tmp_path / "d", tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == {"tuned.safetensors": (tmp_path / "tuned.safetensors").read_bytes()}
    deltafmt.unpack(tmp_path / "base.safetensors", tmp_path / "d", tmp_path / "cut", max_shard_bytes=20000)
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 1


def test_a_model_without_any_bytes(tmp_path: Path, cli: Cli) -> None:
    pair = write_pair(
        tmp_path, {"w": Raw("F32", (0, 3), b"")}, {"w": Raw("F32", (0, 3), b""), "x": Raw("BF16", (0,), b"")}
    )
    packed = cli("pack", pair.base, pair.finetuned, "-o", tmp_path / "d", "--method", "exact")
    assert packed.code == 0, packed.err
    assert "bytes, hot, larger than 0 bytes of tensors" in cli("inspect", tmp_path / "d").out
    cli("unpack", pair.base, tmp_path / "d", "-o", tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == folder_bytes(pair.finetuned)


def test_another_base_is_refused_even_by_force(pair: tuple[Path, Path], archive: Path, tmp_path: Path) -> None:
    a, _ = everything()
    a[ANCHOR] = stepped(a[ANCHOR], 99)
    other = write_folder(tmp_path / "other", a)
    for force in (False, True):
        with pytest.raises(WrongBaseError, match=f'tensor "{ANCHOR}" differs'):
            deltafmt.unpack(other, archive, tmp_path / "out", force_base=force)
    with pytest.raises(WrongBaseError, match=f'tensor "{ANCHOR}" differs'):
        deltafmt.verify(archive, other)
    assert not (tmp_path / "out").exists()


def test_a_rule_makes_some_tensors_exact(tmp_path: Path, cli: Cli) -> None:
    pair = write_pair(tmp_path, *small_tensors())
    out = tmp_path / "mixed.deltafmt"
    result = deltafmt.pack(pair.base, pair.finetuned, out, method=RTN(4), rules=[("*.up.weight", Exact())])
    assert result.restored == []
    deltafmt.unpack(pair.base, out, tmp_path / "out")
    with deltafmt.open(out) as opened:
        kinds = [section.kind for section in opened.container.sections]
        assert kinds == sorted(kinds, key=(1, 3, 2).index)
        exact = [name for name in opened if opened[name].action == "exact"]
        assert exact == ["model.layers.0.up.weight", "model.layers.10.up.weight"]
        assert not opened.container.files
    from conftest import read_folder

    found = read_folder(tmp_path / "out")
    assert all(found[name].data == pair.b[name].data for name in exact)
    assert deltafmt.verify(out, pair.base).restored == ()
    line = cli("pack", pair.base, pair.finetuned, "-o", tmp_path / "m", "--method", "rtn", "--rule", "*.up.*", "exact")
    assert "2 exact" in line.out


def test_a_lossy_rule_beside_the_method_exact_restores_no_files(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, *small_tensors())
    out = tmp_path / "mixed.deltafmt"
    assert not deltafmt.pack(pair.base, pair.finetuned, out, method=Exact(), rules=[("*.embed.*", RTN(8))]).restored
    assert deltafmt.pack(
        pair.base, pair.finetuned, tmp_path / "whole.deltafmt", method=Exact(), exclude=["*embed*"]
    ).restored
    deltafmt.unpack(pair.base, tmp_path / "whole.deltafmt", tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == folder_bytes(pair.finetuned)


def test_what_cannot_be_restored_is_refused(tmp_path: Path, cli: Cli) -> None:
    a, b = small_tensors()
    base = write_folder(tmp_path / "base", a)
    content = safetensors_bytes(b)
    gap = write_folder(tmp_path / "gap", b)
    (gap / "model.safetensors").write_bytes(content + b"more")
    refused(
        cli("pack", base, gap, "-o", tmp_path / "d", "--method", "exact"),
        3,
        f"bytes {len(content)} to {len(content) + 4} belong to no tensor, so the file cannot be restored byte for byte",
    )
    lacks = write_folder(tmp_path / "lacks", {name: b[name] for name in list(b)[1:]})
    refused(
        cli("pack", base, lacks, "-o", tmp_path / "d", "--method", "exact", "--missing", "same"),
        2,
        "would be in no file of",
    )
    refused(
        cli("pack", base, lacks, "-o", tmp_path / "d", "--method", "exact", "--quantized", "values"),
        2,
        "values are not the bytes that are stored",
    )
    assert deltafmt.pack(base, lacks, tmp_path / "d", method=Exact()).removed == ["model.embed.weight"]
    deltafmt.unpack(base, tmp_path / "d", tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == folder_bytes(lacks)


def test_an_archive_is_never_written_onto_an_input(tmp_path: Path, cli: Cli) -> None:
    pair = write_pair(tmp_path, *small_tensors())
    before = folder_bytes(tmp_path)
    (tmp_path / "link").symlink_to(pair.finetuned / "config.json")
    os.link(pair.base / "model.safetensors", tmp_path / "hard")
    exact = ("pack", pair.base, pair.finetuned, "--method", "exact", "--force", "-o")
    for out in (
        pair.finetuned / "model.safetensors",
        pair.base / "model.safetensors",
        pair.finetuned / "config.json",
        pair.finetuned,
        tmp_path / "link",
        tmp_path / "hard",
    ):
        refused(cli(*exact, out), 2, f"the output {out} is itself an input")
    (tmp_path / "hard").unlink()
    (tmp_path / "link").unlink()
    assert folder_bytes(tmp_path) == before
    # A delta file beside the weights is not a part of the checkpoint.
    assert cli(*exact, pair.finetuned / "own.deltafmt").code == 0
    assert cli(*exact, pair.finetuned / "own.deltafmt").code == 0
    (pair.finetuned / "own.deltafmt").unlink()
    assert folder_bytes(tmp_path) == before


def test_commands_say_what_is_exact(pair: tuple[Path, Path], archive: Path, tmp_path: Path, cli: Cli) -> None:
    said = cli("verify", archive, "--base", pair[0]).out
    assert "restored byte for byte with this base: model-00001-of-00002.safetensors" in said
    assert "restored byte for byte: model-0" in cli("unpack", pair[0], archive, "-o", tmp_path / "out").out
    packed = cli("pack", *pair, "-o", tmp_path / "d", "--method", "exact").out
    assert "restored byte for byte by unpack: model-0" in packed
    assert " exact" in packed
    tree = cli("inspect", archive).out
    assert "exact tensors" in tree
    assert "heads of weight files" in tree
    tensors = cli("inspect", archive, "--tensors").out
    assert "exact, without the base" in tensors
    described = cli("inspect", archive, "--json").json()
    assert set(described["restored_files"]) == {name for name in folder_bytes(pair[1]) if name.startswith("model")}
    assert described["tensors"][ANCHOR]["chunk"] == 1 << 20


def test_an_adapter_cannot_be_made_of_exact_tensors(pair: tuple[Path, Path], archive: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is exact, so there is no delta to work with; unpack the file"):
        deltafmt.export_lora(archive, tmp_path / "adapter", base=pair[0])


def test_a_device_takes_no_exact_tensors(archive: Path) -> None:
    pytest.importorskip("torch")
    import deltafmt.torch
    from deltafmt.runtime.delta_store import read_attached
    from deltafmt.runtime.warmup import entries_of

    path = str(archive)
    for take in (
        lambda: deltafmt.torch.load(path, "cpu"),
        lambda: deltafmt.torch.load(path, "cpu", tensors=[ANCHOR]),
        lambda: read_attached(path),
        lambda: entries_of([path]),
    ):
        with pytest.raises(UsageError, match="is exact, so there is no delta to work with"):
            take()


@pytest.mark.parametrize("dtypes", [("F32", "BF16"), ("F32", "F16"), ("BF16", "F32"), ("F16", "BF16"), ("BF16", "F16")])
def test_a_converted_prediction_is_the_same_everywhere(dtypes: tuple[str, str]) -> None:
    base_dtype, dtype = dtypes
    bits = np.random.default_rng(3).integers(0, 256, 8192, np.uint8)
    units = bits.view(np.uint32 if base_dtype == "F32" else np.uint16)
    values = Raw(base_dtype, (units.size,), units.tobytes()).floats().reshape(-1)
    with np.errstate(over="ignore"):
        expected = raw(np.where(np.isnan(values), np.float32(0), values), dtype).data
    found = converted(units, base_dtype, dtype)
    nan = {"BF16": 0x7FC0, "F16": 0x7E00, "F32": 0x7FC00000}[dtype]
    assert (found[np.isnan(values)] == nan).all()
    assert np.array_equal(found[~np.isnan(values)], np.frombuffer(expected, found.dtype)[~np.isnan(values)])


HEAD = safetensors_bytes({"x": plain(np.arange(4, dtype=np.int16))})[:-8]
SPECS = [TensorSpec("x", "I16", (4,))]
TWO = with_header(json.dumps({"x": {"dtype": "I16", "shape": [4], "data_offsets": [8, 16]}}).encode())


@pytest.mark.parametrize(
    ("specs", "head", "words"),
    [
        (SPECS, HEAD + b" ", "not valid"),
        (SPECS, b"", "not valid"),
        (SPECS, with_header(b"[1]"), "not valid"),
        ([], HEAD, 'the delta lacks tensor "x"'),
        ([*SPECS, TensorSpec("y", "U8", (1,))], HEAD, 'tensor "y" lies in no weight file'),
        ([TensorSpec("x", "I16", (2, 2))], HEAD, "another dtype or shape"),
        (SPECS, TWO, "lies at 8 to 16, where 0 is next"),
    ],
)
def test_heads_that_do_not_fit_the_tensors_are_refused(
    tmp_path: Path, specs: list[TensorSpec], head: bytes, words: str
) -> None:
    with pytest.raises(InvalidFileError, match=words):
        FolderRestorer(tmp_path / "out", specs, {"model.safetensors": head})
    assert list(tmp_path.iterdir()) == []


def test_real_archives_are_small(models: Path, tmp_path: Path) -> None:
    for base, finetuned, most in (
        ("wordmath/base", "wordmath/math", 0.45),
        ("rxnfp/bert_pretrained.safetensors", "rxnfp/bert_ft_10k_25s.safetensors", 0.716),
    ):
        out = tmp_path / "d.deltafmt"
        result = deltafmt.pack(models / base, models / finetuned, out, method=Exact(), force=True)
        assert result.size < most * result.finetuned_bytes
        assert deltafmt.verify(out, models / base).restored


def test_an_interrupted_archive_goes_on(
    pair: tuple[Path, Path], archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltafmt.container.writer.SECTION_TARGET", 1)
    whole, resumed = tmp_path / "whole.deltafmt", tmp_path / "resumed.deltafmt"
    deltafmt.pack(*pair, whole, method=Exact())
    done: list[str] = []

    def stop(name: str, _: int) -> None:
        done.append(name)
        if len(done) == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="goes on where it stopped"):
        deltafmt.pack(*pair, resumed, method=Exact(), progress=stop)
    assert deltafmt.pack(*pair, resumed, method=Exact()).resumed > 0
    assert resumed.read_bytes() == whole.read_bytes()
    deltafmt.unpack(pair[0], resumed, tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == folder_bytes(pair[1])
