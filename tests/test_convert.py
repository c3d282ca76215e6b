"""``deltafmt convert``: patches of other programs to delta files and back, bit for bit, against a plain writer."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import deltafmt
from conftest import Cli, Raw, Tensors, normal, read_folder, write_folder
from deltafmt.format.constants import DTYPE_BITS
from foreign_files import (
    INDEX,
    apply_sparse_file,
    apply_version_folder,
    state_sha256,
    write_sparse_file,
    write_version_folder,
)
from strategies import same_examples

FILES = {"config.json": b'{"model_type": "llama"}', "generation_config.json": b"{}"}
EMBED = "model.embed_tokens.weight"
FORMATS = list(itertools.product(("xor", "overwrite"), ("xxh3-128", "blake3", "adler32")))


def random_tensor(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> Raw:
    """Return any bits of a dtype."""
    return Raw(dtype, shape, rng.bytes(int(np.prod(shape, dtype=int)) * DTYPE_BITS[dtype] // 8))


def stepped(rng: np.random.Generator, tensor: Raw, share: float) -> Raw:
    """Return a tensor with other bits in a share of its bytes."""
    data = np.frombuffer(tensor.data, np.uint8).copy()
    data[rng.random(data.size) < share] ^= np.uint8(rng.integers(1, 256))
    return Raw(tensor.dtype, tensor.shape, data.tobytes())


MIXED = ("BF16", "BF16", "F32", "F8_E4M3", "I64")


def states(seed: int = 0, dtypes: tuple[str, ...] = MIXED) -> tuple[Tensors, Tensors]:
    """Return two versions of a model. The second tensor stays, and there is one without elements."""
    rng = np.random.default_rng(seed)
    a = {f"layers.{number}.weight": random_tensor(rng, dtype, (9, 16)) for number, dtype in enumerate(dtypes)}
    a["scale"] = random_tensor(rng, dtypes[0], ())
    a["nothing"] = Raw(dtypes[0], (0, 4), b"")
    b = {name: stepped(rng, tensor, 0.1) for name, tensor in a.items()}
    b["layers.1.weight"] = a["layers.1.weight"]
    return a, b


def folders(where: Path, a: Tensors, b: Tensors, shards: int = 2) -> tuple[Path, Path]:
    """Write two versions of a model alike."""
    names = list(a)
    parts = [names[number::shards] for number in range(shards)]
    return write_folder(where / "a", a, parts, FILES), write_folder(where / "b", b, parts, FILES)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("encoding", "algorithm"), FORMATS)
def test_a_version_folder_becomes_the_checkpoint_that_it_gives(
    tmp_path: Path, cli: Cli, encoding: str, algorithm: str
) -> None:
    a, b = states()
    base, after = folders(tmp_path, a, b)
    patch = write_version_folder(tmp_path / "weight_v000001", a, b, encoding=encoding, algorithm=algorithm, shards=2)
    out = tmp_path / "d.deltafmt"
    result = cli("convert", patch, "-o", out, "--base", base)
    assert result.code == 0, result.err
    assert "version 000001 on 000000" in result.out
    assert cli("unpack", base, out, "-o", tmp_path / "u").code == 0
    assert content(tmp_path / "u") == content(after)
    assert cli("verify", out, "--base", base).code == 0
    metadata = json.loads(cli("inspect", out, "--json").out)["metadata"]
    assert {key: value for key, value in metadata.items() if key.startswith("convert.")} == {
        "convert.format": "version-folder",
        "convert.version": "000001",
        "convert.base_version": "000000",
    }


@pytest.mark.parametrize(("encoding", "algorithm"), FORMATS)
def test_a_delta_file_becomes_a_version_folder(tmp_path: Path, cli: Cli, encoding: str, algorithm: str) -> None:
    a, b = states(1)
    base, after = folders(tmp_path, a, b)
    deltafmt.pack(base, after, tmp_path / "d.deltafmt", method=deltafmt.methods.Exact())
    out = tmp_path / "weight_v000012"
    options = ("--to", "version-folder", "--encoding", encoding, "--checksum", algorithm)
    result = cli("convert", tmp_path / "d.deltafmt", "-o", out, "--base", base, *options, "--json").json()
    assert (result["model_version"], result["base_version"]) == ("000012", "000011")
    assert result["bytes"] == sum(len(data) for data in content(out).values())
    assert result["tensors_changed"] == sum(a[name] != b[name] for name in a)
    assert apply_version_folder(out, a) == b
    index = json.loads((out / INDEX).read_text())
    assert index["metadata"]["checksum_format"] == algorithm
    assert set(index["weight_map"].values()) == {"model-00000-of-00001.safetensors"}
    deltafmt.convert(out, tmp_path / "back.deltafmt", base)
    deltafmt.unpack(base, tmp_path / "back.deltafmt", tmp_path / "u")
    assert content(tmp_path / "u") == content(after)


def test_shards_are_numbered_and_together_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deltafmt.foreign import version_folder_writer

    a, b = states(2)
    base, after = folders(tmp_path, a, b)
    deltafmt.pack(base, after, tmp_path / "d.deltafmt", method=deltafmt.methods.Exact())
    writer = version_folder_writer.VersionFolderWriter
    monkeypatch.setattr(
        "deltafmt.pipeline.convert.VersionFolderWriter", lambda *args, **named: writer(*args, **named, shard_bytes=100)
    )
    out = tmp_path / "v"
    deltafmt.convert(tmp_path / "d.deltafmt", out, base, "version-folder", version="7")
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(shards) > 1
    assert shards == [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    assert sorted(path.name for path in out.iterdir()) == sorted([*shards, INDEX])
    assert apply_version_folder(out, a) == b
    deltafmt.convert(out, tmp_path / "back.deltafmt", base)
    deltafmt.unpack(base, tmp_path / "back.deltafmt", tmp_path / "u")
    assert read_folder(tmp_path / "u") == b


def test_a_sparse_file_there_and_back(tmp_path: Path, cli: Cli) -> None:
    a, b = states(3, ("BF16", "BF16", "BF16"))
    base, after = folders(tmp_path, a, b, shards=1)
    deltafmt.pack(base, after, tmp_path / "d.deltafmt", method=deltafmt.methods.Exact())
    out = tmp_path / "step_000011.safetensors"
    arguments = ("convert", tmp_path / "d.deltafmt", "-o", out, "--base", base, "--to", "trl", "--model-version", "11")
    assert "version 11 on 10" in cli(*arguments).out
    assert apply_sparse_file(out, a) == b
    assert cli("convert", out, "-o", tmp_path / "back.deltafmt", "--base", base).code == 0
    deltafmt.unpack(base, tmp_path / "back.deltafmt", tmp_path / "u")
    assert content(tmp_path / "u") == content(after)


@pytest.mark.parametrize("told", [False, True])
def test_a_sparse_file_of_any_dtype_is_read(tmp_path: Path, told: bool) -> None:
    a, b = states(4)
    base, after = folders(tmp_path, a, b)
    patch = write_sparse_file(
        tmp_path / "p.safetensors", a, b, **({"checksum_sha256": state_sha256(b)} if told else {})
    )
    deltafmt.convert(patch, tmp_path / "d.deltafmt", base)
    deltafmt.unpack(base, tmp_path / "d.deltafmt", tmp_path / "u")
    assert content(tmp_path / "u") == content(after)


def test_a_patch_without_a_checksum_is_told(tmp_path: Path, cli: Cli) -> None:
    """A base of the same shapes with other values passed without a word."""
    a, b = states(4)
    base, _ = folders(tmp_path, a, b)
    other, _ = folders(tmp_path / "other", states(6)[0], b)
    plain = write_sparse_file(tmp_path / "p.safetensors", a, b)
    summed = write_sparse_file(tmp_path / "s.safetensors", a, b, checksum_sha256=state_sha256(b))
    folder = write_version_folder(tmp_path / "v", a, b)
    for number, (patch, to) in enumerate(itertools.product((plain, summed, folder), ("deltafmt", "version-folder"))):
        out = tmp_path / f"{number}"
        versions = ("--model-version", "1", "--base-version", "0") if to != "deltafmt" and patch is not folder else ()
        command = ("convert", patch, "--to", to, *versions, "--json", "--base")
        if patch is plain:
            assert cli(*command, other, "-o", f"{out}x").code == 0  # nobody can tell
        result = cli(*command, base, "-o", out)
        assert result.json()["base_checked"] is (patch is not plain)
        assert ("has no checksum, and a base of the same shapes" in result.err) is (patch is plain)


WHOLE_DTYPES = sorted(dtype for dtype, bits in DTYPE_BITS.items() if bits % 8 == 0)


@st.composite
def versions(draw: st.DrawFn) -> tuple[Tensors, Tensors]:
    """Give two versions of a model, of any dtypes and any bits."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    a, b = {}, {}
    for number in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
        tensor = random_tensor(rng, draw(st.sampled_from(WHOLE_DTYPES)), shape)
        a[f"t{number}"] = tensor
        b[f"t{number}"] = stepped(rng, tensor, draw(st.sampled_from((0, 0.05, 1))))
    return a, b


@same_examples(20)
@given(pair=versions(), way=st.sampled_from(FORMATS), threads=st.integers(1, 3))
def test_round_trips_of_every_dtype(
    tmp_path_factory: pytest.TempPathFactory, pair: tuple[Tensors, Tensors], way: tuple[str, str], threads: int
) -> None:
    where = tmp_path_factory.mktemp("trip")
    a, b = pair
    base, after = folders(where, a, b, shards=1)
    deltafmt.pack(base, after, where / "d.deltafmt", method=deltafmt.methods.Exact())
    options: dict[str, Any] = {"encoding": way[0], "checksum": way[1], "threads": threads}
    deltafmt.convert(where / "d.deltafmt", where / "weight_v000001", base, "version-folder", **options)
    assert apply_version_folder(where / "weight_v000001", a) == b
    deltafmt.convert(where / "weight_v000001", where / "back.deltafmt", base, threads=threads)
    deltafmt.unpack(base, where / "back.deltafmt", where / "u")
    assert content(where / "u") == content(after)
    write_sparse_file(where / "p.safetensors", a, b, checksum_sha256=state_sha256(b))
    deltafmt.convert(where / "p.safetensors", where / "sparse.deltafmt", base)
    deltafmt.unpack(base, where / "sparse.deltafmt", where / "s")
    assert content(where / "s") == content(after)


def test_one_foreign_format_becomes_another(tmp_path: Path) -> None:
    a, b = states(5, ("BF16", "BF16", "BF16"))
    base, _ = folders(tmp_path, a, b)
    patch = write_version_folder(tmp_path / "v", a, b, version="v2", base="v1", algorithm="adler32")
    result = deltafmt.convert(patch, tmp_path / "other", base, "version-folder", encoding="overwrite")
    assert (result.version, result.base_version, result.source) == ("v2", "v1", "version-folder")
    assert apply_version_folder(tmp_path / "other", a) == b
    result = deltafmt.convert(patch, tmp_path / "t.safetensors", base, "trl", version="2", base_version="1")
    assert apply_sparse_file(tmp_path / "t.safetensors", a) == b
    assert result.base_version == "1"


def test_links_of_a_chain(tmp_path: Path, cli: Cli) -> None:
    a, b = states(6)
    rng = np.random.default_rng(7)
    c = {name: stepped(rng, tensor, 0.2) for name, tensor in b.items()}
    base, after = folders(tmp_path, a, b)
    first = write_version_folder(tmp_path / "weight_v000001", a, b)
    second = write_version_folder(tmp_path / "weight_v000002", b, c, version="000002", base="000001")
    one, two = tmp_path / "1.deltafmt", tmp_path / "2.deltafmt"
    deltafmt.convert(first, one, base)
    result = deltafmt.convert(second, two, after, parent=one)
    assert result.parent == deltafmt.open(one).content_id
    assert cli("apply", base, one, two, "-o", tmp_path / "c").code == 0
    assert read_folder(tmp_path / "c") == c
    # A link is converted on the checkpoint that it was made on.
    deltafmt.convert(two, tmp_path / "again", after, "version-folder")
    assert apply_version_folder(tmp_path / "again", b) == c
    assert json.loads((tmp_path / "again" / INDEX).read_text())["metadata"]["version"] == "000002"
    assert cli("squash", one, two, "-o", tmp_path / "both.deltafmt", "--base", base).code == 0
    with pytest.raises(deltafmt.errors.WrongBaseError, match=r"made on version 000001, and what .*2.deltafmt gives is"):
        deltafmt.convert(second, tmp_path / "x.deltafmt", after, parent=two)
    with pytest.raises(deltafmt.errors.WrongBaseError, match="is not what"):
        deltafmt.convert(second, tmp_path / "x.deltafmt", base, parent=one)


def test_messages_of_a_publisher_become_version_folders(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    state = {"w": torch.randn(256, 256, dtype=torch.bfloat16), "n": torch.ones(16)}
    base = write_folder(tmp_path / "base", raws(state))
    publisher = deltafmt.sync.Publisher(base=state)
    state["w"] = state["w"].clone()
    state["w"][3] += 1
    (tmp_path / "m.deltafmt").write_bytes(publisher.publish(state).data)
    result = deltafmt.convert(tmp_path / "m.deltafmt", tmp_path / "v", base, "version-folder")
    assert (result.version, result.base_version, result.tensors) == ("000001", "000000", 1)
    assert apply_version_folder(tmp_path / "v", read_folder(base)) == raws(state)


@pytest.mark.parametrize("name", [EMBED, "embed.weight"])
def test_a_tied_head_that_no_file_has(tmp_path: Path, name: str) -> None:
    """Of the two names in a message, the first in the alphabet holds the tensor, and the other is its copy."""
    torch = pytest.importorskip("torch")
    embedding = torch.randn(256, 256, dtype=torch.bfloat16)
    state = {name: embedding, "lm_head.weight": embedding}
    publisher = deltafmt.sync.Publisher(base=state)
    new = embedding.clone()
    new[3] += 1
    changed = dict.fromkeys(state, new)
    message = publisher.publish(changed)
    assert message.kind == "patch"
    (tmp_path / "m.deltafmt").write_bytes(message.data)
    held = raws({name: embedding})
    tied = write_folder(tmp_path / "tied", held, files={"config.json": b'{"tie_word_embeddings": true}'})
    deltafmt.convert(tmp_path / "m.deltafmt", tmp_path / "v", tied, "version-folder")
    assert apply_version_folder(tmp_path / "v", held) == raws({name: changed[name]})
    free = write_folder(tmp_path / "free", held, files={"config.json": b"{}"})
    with pytest.raises(deltafmt.errors.DeltafmtError, match=r"lm_head.weight"):
        deltafmt.convert(tmp_path / "m.deltafmt", tmp_path / "w", free, "version-folder")


@pytest.mark.parametrize(("name", "of"), [("model.layers.0.new.weight", "w.weight"), ("mtp.lm_head.weight", EMBED)])
def test_a_new_copy_of_another_tensor_is_no_tied_head(tmp_path: Path, name: str, of: str) -> None:
    a = {EMBED: normal(1, (8, 16)), "w.weight": normal(2, (8, 16))}
    files = {"config.json": b'{"tie_word_embeddings": true}'}
    base, after = (
        write_folder(tmp_path / "a", a, files=files),
        write_folder(tmp_path / "b", a | {name: a[of]}, files=files),
    )
    deltafmt.pack(base, after, tmp_path / "d.deltafmt", method=deltafmt.methods.Exact())
    assert deltafmt.open(tmp_path / "d.deltafmt").resolve(name).name == of
    for out, to in (("v", "version-folder"), ("t.safetensors", "trl")):
        with pytest.raises(deltafmt.errors.UsageError, match=f'"{name}" is new'):
            deltafmt.convert(tmp_path / "d.deltafmt", tmp_path / out, base, to, version="1", tensors_only=True)
        assert not (tmp_path / out).exists()


def raws(state: dict[str, Any]) -> Tensors:
    import torch

    names = {torch.bfloat16: "BF16", torch.float32: "F32"}
    return {
        name: Raw(names[tensor.dtype], tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes())
        for name, tensor in state.items()
    }


def test_nothing_changed(tmp_path: Path) -> None:
    a, _ = states(8)
    base, after = folders(tmp_path, a, a)
    deltafmt.pack(base, after, tmp_path / "d.deltafmt", method=deltafmt.methods.Exact())
    assert deltafmt.convert(tmp_path / "d.deltafmt", tmp_path / "v", base, "version-folder", version="3").tensors == 0
    assert [path.name for path in (tmp_path / "v").iterdir()] == [INDEX]
    # Such a folder has no weights, and is replaced as others are.
    deltafmt.convert(tmp_path / "d.deltafmt", tmp_path / "v", base, "version-folder", version="4", force=True)
    assert json.loads((tmp_path / "v" / INDEX).read_text())["metadata"]["version"] == "000004"
    (tmp_path / "v" / INDEX).write_text('{"metadata": {}}')
    with pytest.raises(deltafmt.errors.UsageError, match="is not a checkpoint and is not replaced"):
        deltafmt.convert(tmp_path / "d.deltafmt", tmp_path / "v", base, "version-folder", version="5", force=True)
    (tmp_path / "v" / INDEX).unlink()
    deltafmt.convert(tmp_path / "d.deltafmt", tmp_path / "v", base, "version-folder", version="3", force=True)
    deltafmt.convert(tmp_path / "v", tmp_path / "back.deltafmt", base)
    deltafmt.unpack(base, tmp_path / "back.deltafmt", tmp_path / "u")
    assert content(tmp_path / "u") == content(after)
    deltafmt.convert(tmp_path / "d.deltafmt", tmp_path / "t.safetensors", base, "trl")
    assert deltafmt.convert(tmp_path / "t.safetensors", tmp_path / "t.deltafmt", base).tensors == 0


def test_a_tensor_of_several_pieces(tmp_path: Path) -> None:
    """Tensors are read 8 MiB at a time; chunks of exact tensors end elsewhere."""
    rng = np.random.default_rng(9)
    a = {"w": random_tensor(rng, "BF16", (4300, 1024))}
    b = {"w": stepped(rng, a["w"], 0.001)}
    base, after = folders(tmp_path, a, b, shards=1)
    deltafmt.pack(base, after, tmp_path / "d.deltafmt", method=deltafmt.methods.Exact())
    for encoding in ("xor", "overwrite"):
        deltafmt.convert(
            tmp_path / "d.deltafmt", tmp_path / encoding, base, "version-folder", version="1", encoding=encoding
        )
        assert apply_version_folder(tmp_path / encoding, a) == b
    deltafmt.convert(tmp_path / "d.deltafmt", tmp_path / "t.safetensors", base, "trl")
    assert apply_sparse_file(tmp_path / "t.safetensors", a) == b
    for number, patch in enumerate(("xor", "overwrite", "t.safetensors")):
        out = tmp_path / f"{number}.deltafmt"
        deltafmt.convert(tmp_path / patch, out, base)
        deltafmt.unpack(base, out, tmp_path / f"u{number}")
        assert content(tmp_path / f"u{number}") == content(after)
