"""Which files of a folder are the model, and the names under which they come back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import deltafmt
from conftest import Cli, Tensors, normal, read_file, read_folder, safetensors_bytes, write_folder
from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.checkpoint.weight_names import WeightNames, index_name, shard_name, split_name
from deltafmt.errors import InvalidFileError, StorageError, UsageError, WrongBaseError
from situations import NEAR, config, files_of, llama, model_pair, near, put, round_trip, situation, tuned

DIFFUSERS = "diffusion_pytorch_model"


def component(seed: int, dtype: str = "BF16") -> Tensors:
    """Return the tensors of a component of a pipeline."""
    return {f"blocks.{number}.to_q.weight": normal(seed + number, (128, 64), dtype) for number in range(2)}


def half(tensors: Tensors) -> Tensors:
    """Return tensors rounded to F16."""
    from conftest import raw

    return {name: raw(tensor.floats().reshape(tensor.shape), "F16") for name, tensor in tensors.items()}


@situation("`model.safetensors` beside the index and shards of an earlier save")
def test_model_safetensors_is_read_before_an_index(tmp_path: Path, cli: Cli) -> None:
    pair = model_pair(tmp_path)
    stale = tuned(llama(), 900)
    names = list(stale)
    folder = write_folder(tmp_path / "both", stale, [names[:5], names[5:]])
    (folder / "model.safetensors").write_bytes(safetensors_bytes(pair.b))
    _, out = round_trip(pair.base, folder, tmp_path / "o")
    found = read_folder(out)
    assert all(near(found[name], pair.b[name], pair.a[name]) for name in pair.b)
    said = cli("pack", pair.base, folder, "-o", tmp_path / "e.deltafmt").err
    assert "model.safetensors is the model; not read: model-00001-of-00002.safetensors" in said


@situation("an index beside other weight files")
def test_an_index_is_read_before_other_files(tmp_path: Path) -> None:
    pair = model_pair(tmp_path)
    names = list(pair.b)
    folder = write_folder(tmp_path / "indexed", pair.b, [names[:5], names[5:]])
    (folder / "consolidated.safetensors").write_bytes(safetensors_bytes({"layers.0.w": normal(1, (4, 4))}))
    result, out = round_trip(pair.base, folder, tmp_path / "o")
    assert read_folder(out).keys() == pair.b.keys()
    assert any("consolidated.safetensors" in remark for remark in result.remarks)


@situation("an index without `total_size`, or with a wrong one")
@pytest.mark.parametrize("metadata", [None, {}, {"total_size": 21}, {"total_size": "many"}, {"total_size": 1.5}, []])
def test_the_total_size_of_an_index_does_not_matter(tmp_path: Path, metadata: Any) -> None:
    pair = model_pair(tmp_path)
    names = list(pair.b)
    folder = write_folder(tmp_path / "indexed", pair.b, [names[:5], names[5:]])
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": weight_map} | ({} if metadata is None else {"metadata": metadata})))
    deltafmt.pack(pair.base, folder, tmp_path / "d.deltafmt", method=NEAR)
    deltafmt.unpack(pair.base, tmp_path / "d.deltafmt", tmp_path / "out", max_shard_bytes=20_000)
    written = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert written["metadata"]["total_size"] == sum(len(tensor.data) for tensor in pair.b.values())
    assert set(written["weight_map"].values()) == {path.name for path in (tmp_path / "out").glob("*.safetensors")}


def test_config_json_may_name_the_weights(tmp_path: Path) -> None:
    pair = model_pair(tmp_path)
    other = {"transformers_weights": "other.safetensors"}
    folder = write_folder(tmp_path / "named", llama(), files={"config.json": config(**other)})
    put(folder, "other.safetensors", pair.b)
    with Checkpoint(folder) as found:
        assert found.names.of_component("") == "other.safetensors"
        assert b"".join(map(bytes, found.tensors["lm_head.weight"].pieces())) == pair.b["lm_head.weight"].data
    for wrong in ("../model.safetensors", "gone.safetensors", 7):
        (folder / "config.json").write_bytes(config(transformers_weights=wrong))
        with Checkpoint(folder) as found:
            assert found.names.of_component("") == "model.safetensors"


@situation("`model.fp16.safetensors` beside `model.safetensors`: the plain name, or `--variant fp16`")
@pytest.mark.parametrize("stem", ["model", DIFFUSERS])
def test_a_variant_is_read_on_request(tmp_path: Path, stem: str, cli: Cli) -> None:
    a, b = component(1, "F32"), tuned(component(1, "F32"))
    for name, tensors in (("base", a), ("ft", b)):
        put(tmp_path / name, f"{stem}.safetensors", tensors, config=b"{}")
        put(tmp_path / name, f"{stem}.fp16.safetensors", half(tensors))
    base, finetuned = tmp_path / "base", tmp_path / "ft"
    result, out = round_trip(base, finetuned, tmp_path / "plain")
    assert files_of(out) == {f"{stem}.safetensors", "config.json"}
    assert all(near(tensor, b[name], a[name]) for name, tensor in read_folder(out).items())
    assert f"{stem}.fp16.safetensors" in result.left_out
    delta = tmp_path / "d.deltafmt"
    assert cli("pack", base, finetuned, "-o", delta, "--variant", "fp16", "--nm", "2:2", "--bits", "8").code == 0
    assert cli("verify", delta, "--base", base).code == 0
    assert cli("unpack", base, delta, "-o", tmp_path / "out", "--max-shard-size", "20KB").code == 0
    assert files_of(tmp_path / "out") == {
        *(f"{stem}.fp16-0000{number}-of-00002.safetensors" for number in (1, 2)),
        f"{stem}.safetensors.index.fp16.json",
        "config.json",
    }
    found = read_folder(tmp_path / "out")
    assert all(near(found[name], half(b)[name], half(a)[name]) for name in b)
    with Checkpoint(tmp_path / "out", variant="fp16") as again:
        assert again.tensors.keys() == b.keys()


def test_a_variant_that_is_not_there(tmp_path: Path) -> None:
    pair = model_pair(tmp_path)
    with pytest.raises(InvalidFileError, match=r"no weights of the variant 'fp16'; there are model\.safetensors"):
        deltafmt.pack(pair.base, pair.finetuned, tmp_path / "d.deltafmt", variant="fp16")
    only = put(tmp_path / "only", "model.fp16.safetensors", pair.b)
    with pytest.raises(InvalidFileError, match=r"variant 'fp16' alone, model\.fp16\.safetensors"):
        deltafmt.pack(pair.base, only, tmp_path / "d.deltafmt")
    result = deltafmt.pack(pair.base, only, tmp_path / "d.deltafmt", variant="fp16")  # the base has no such variant
    assert result.actions["add"]


@situation("weights of other names, one file or a numbered series")
@pytest.mark.parametrize(
    "names",
    [
        ["weights.00.safetensors", "weights.01.safetensors"],
        ["model-00001.safetensors", "model-00002.safetensors"],
        ["pytorch_model-00001-of-00002.safetensors", "pytorch_model-00002-of-00002.safetensors"],
    ],
    ids=lambda names: names[0],
)
def test_a_numbered_series_without_an_index(tmp_path: Path, names: list[str]) -> None:
    pair = model_pair(tmp_path)
    listed = list(pair.b)
    for name, members in zip(names, (listed[:5], listed[5:]), strict=True):
        put(tmp_path / "series", name, {member: pair.b[member] for member in members})
    _, out = round_trip(pair.base, tmp_path / "series", tmp_path / "o")
    assert read_folder(out).keys() == pair.b.keys()
    (tmp_path / "series" / names[0]).unlink()
    if "00.safe" not in names[0]:
        with pytest.raises(StorageError, match=r"missing|do not begin"):
            Checkpoint(tmp_path / "series")


@situation("several weight files of which no name or index says which are the model")
def test_several_sets_of_weights_are_refused(tmp_path: Path) -> None:
    pair = model_pair(tmp_path)
    put(tmp_path / "two", "one.safetensors", pair.b)
    put(tmp_path / "two", "two.safetensors", {"z": normal(1, (4, 4))})
    with pytest.raises(InvalidFileError, match=r"one\.safetensors, two\.safetensors may be one model or several"):
        deltafmt.pack(pair.base, tmp_path / "two", tmp_path / "d.deltafmt")
    (tmp_path / "two" / "two.safetensors").rename(tmp_path / "two" / "optimizer.safetensors")
    assert deltafmt.pack(pair.base, tmp_path / "two", tmp_path / "d.deltafmt").actions["add"]


@situation("diffusers' file and its index both there: its versions differ in which they read")
def test_both_a_file_and_an_index_of_diffusers(tmp_path: Path) -> None:
    folder = put(tmp_path / "ft", f"{DIFFUSERS}.safetensors", component(1), config=b'{"_class_name": "X"}')
    index = {"weight_map": dict.fromkeys(component(1), f"{DIFFUSERS}-00001-of-00001.safetensors")}
    (folder / f"{DIFFUSERS}.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InvalidFileError, match=rf"both {DIFFUSERS}\.safetensors and .*index\.json are there"):
        Checkpoint(folder)
    assert Checkpoint(folder / f"{DIFFUSERS}.safetensors").tensors.keys() == component(1).keys()


def test_shards_of_two_saves_are_refused(tmp_path: Path) -> None:
    for name in ("model-00001-of-00001", "model-00001-of-00002", "model-00002-of-00002"):
        put(tmp_path / "ft", f"{name}.safetensors", {name: normal(1, (4, 4))})
    with pytest.raises(InvalidFileError, match=r"several saves \(of 1, of 2\)"):
        Checkpoint(tmp_path / "ft")


@situation("one file that is given by its own name")
def test_a_file_comes_back_under_its_name(tmp_path: Path) -> None:
    a, b = component(1), tuned(component(1))
    files = [tmp_path / side / f"{DIFFUSERS}.fp16.safetensors" for side in ("base", "ft")]
    for path, tensors in zip(files, (a, b), strict=True):
        put(path.parent, path.name, tensors)
        put(path.parent, f"{DIFFUSERS}.safetensors", component(50))
    _, out = round_trip(*files, tmp_path / "o")
    assert files_of(out) == {f"{DIFFUSERS}.fp16.safetensors"}
    deltafmt.unpack(tmp_path / "base", tmp_path / "o" / "d.deltafmt", tmp_path / "again")  # the base's own variant
    assert files_of(tmp_path / "again") == files_of(out)


def pipeline(folder: Path, seed: int, change: bool, **more: Any) -> dict[str, Tensors]:
    """Write a pipeline as diffusers does; return the tensors of its components."""
    components = {"unet": component(seed), "text_encoder": component(seed + 10), "vae": component(seed + 20)}
    if change:
        components = {name: tuned(tensors) for name, tensors in components.items()}
    put(folder / "unet", f"{DIFFUSERS}.safetensors", components["unet"], config=b'{"_class_name": "UNet"}')
    put(folder / "text_encoder", "model.safetensors", components["text_encoder"], config=b"{}")
    put(folder / "vae", f"{DIFFUSERS}.safetensors", components["vae"], config=b'{"_class_name": "VAE"}')
    for name, file in (("scheduler", "scheduler_config.json"), ("tokenizer", "vocab.json")):
        (folder / name).mkdir()
        (folder / name / file).write_text("{}")
    listed = {name: ["diffusers", "X"] for name in (*components, "scheduler", "tokenizer")}
    index = {"_class_name": "SomePipeline", **listed, "safety_checker": [None, None], **more}
    (folder / "model_index.json").write_text(json.dumps(index))
    return components


@situation("a pipeline of diffusers (`model_index.json`)")
def test_a_pipeline_is_packed_part_by_part(tmp_path: Path, cli: Cli) -> None:
    a, b = pipeline(tmp_path / "base", 1, change=False), pipeline(tmp_path / "ft", 1, change=True)
    (tmp_path / "ft" / "some_single_file.safetensors").write_bytes(safetensors_bytes(component(99)))
    result, out = round_trip(tmp_path / "base", tmp_path / "ft", tmp_path / "o")
    assert result.removed == []
    expected = files_of(tmp_path / "ft") - {"some_single_file.safetensors"}
    assert files_of(out) == expected
    assert "some_single_file.safetensors" in result.left_out
    for name, tensors in b.items():
        found = read_folder(out / name)
        assert all(near(found[key], tensors[key], a[name][key]) for key in tensors)
    again = tmp_path / "o" / "d.deltafmt"
    assert cli("unpack", tmp_path / "base", again, "-o", out, "--force", "--max-shard-size", "20KB").code == 0
    assert (out / "unet" / f"{DIFFUSERS}.safetensors.index.json").exists()
    index = json.loads((out / "vae" / f"{DIFFUSERS}.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == b["vae"].keys()
    assert cli("diff", tmp_path / "ft", out, "--json").json()["same"] == 0
    assert "vae/blocks.0.to_q.weight" in cli("inspect", again, "--tensors").out


@situation("a pipeline of which a component is not there")
def test_a_pipeline_that_lacks_a_part(tmp_path: Path) -> None:
    pipeline(tmp_path / "base", 1, change=False)
    pipeline(tmp_path / "ft", 1, change=True)
    (tmp_path / "ft" / "vae" / f"{DIFFUSERS}.safetensors").unlink()
    with pytest.raises(InvalidFileError, match=r"it lacks 2 tensors of the base's 6: vae/blocks\.0\.to_q\.weight"):
        deltafmt.pack(tmp_path / "base", tmp_path / "ft", tmp_path / "d.deltafmt")
    _, out = round_trip(tmp_path / "base", tmp_path / "ft", tmp_path / "o", missing="same")
    assert f"vae/{DIFFUSERS}.safetensors" in files_of(out)
    assert read_folder(out / "vae") == component(21)
    (tmp_path / "ft" / "vae" / f"{DIFFUSERS}.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(InvalidFileError, match=rf"vae: .*{DIFFUSERS}\.bin cannot be read") as caught:
        deltafmt.pack(tmp_path / "base", tmp_path / "ft", tmp_path / "e.deltafmt")
    assert caught.value.remedy == deltafmt.errors.Remedy("no_attach", "vae/*")
    result, out = round_trip(tmp_path / "base", tmp_path / "ft", tmp_path / "p", no_attach=["vae/*"])
    assert [name.split("/")[0] for name in result.removed] == ["vae", "vae"]
    assert not (out / "vae").exists()
    with deltafmt.open(tmp_path / "p" / "d.deltafmt") as opened:
        assert opened.metadata["folders_left_out"] == "vae"


def test_the_variant_of_a_pipeline_is_read_where_there_is_one(tmp_path: Path) -> None:
    pipeline(tmp_path / "base", 1, change=False)
    b = pipeline(tmp_path / "ft", 1, change=True)
    for side in ("base", "ft"):
        put(
            tmp_path / side / "unet",
            f"{DIFFUSERS}.fp16.safetensors",
            half(component(1) if side == "base" else b["unet"]),
        )
    _, out = round_trip(tmp_path / "base", tmp_path / "ft", tmp_path / "o", variant="fp16")
    assert f"unet/{DIFFUSERS}.fp16.safetensors" in files_of(out)
    assert f"vae/{DIFFUSERS}.safetensors" in files_of(out)
    with pytest.raises(InvalidFileError, match="no component has weights of the variant 'bf16'"):
        deltafmt.pack(tmp_path / "base", tmp_path / "ft", tmp_path / "e.deltafmt", variant="bf16")


def test_a_part_against_a_pipeline_names_the_folder(tmp_path: Path) -> None:
    pipeline(tmp_path / "base", 1, change=False)
    pipeline(tmp_path / "ft", 1, change=True)
    with pytest.raises(WrongBaseError, match="the base holds it in its folder unet; give that folder as the base"):
        deltafmt.pack(tmp_path / "base", tmp_path / "ft" / "unet", tmp_path / "d.deltafmt")


@situation("folders with weights that no index names")
def test_folders_that_no_index_names_are_pointed_out(tmp_path: Path) -> None:
    put(tmp_path / "ft" / "transformer", f"{DIFFUSERS}.safetensors", component(1))
    with pytest.raises(InvalidFileError, match="transformer holds weights: pack each folder by itself"):
        Checkpoint(tmp_path / "ft")
    (tmp_path / "ft" / "model_index.json").write_text("{}")
    with pytest.raises(InvalidFileError, match=r"model_index\.json names none of its folders, and transformer holds"):
        Checkpoint(tmp_path / "ft")


@pytest.mark.parametrize("name", ["../evil", "/etc", "a/../..", "C:", "con", ".hidden", "a//b"])
def test_an_index_cannot_name_a_folder_outside(tmp_path: Path, name: str) -> None:
    pair = model_pair(tmp_path)
    (pair.finetuned / "modules.json").write_text(json.dumps([{"path": ""}, {"path": name}]))
    (pair.finetuned / "model_index.json").unlink(missing_ok=True)
    with Checkpoint(pair.finetuned) as found:
        assert found.loader.present == ()


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("weights", "../evil.safetensors"),
        ("weights", "model.bin"),
        ("weights", ".safetensors"),
        ("weights", "a/b.safetensors"),
        ("weights", "con.safetensors"),
        ("weights/..", "model.safetensors"),
        ("weights//etc", "model.safetensors"),
        ("weights/a/../b", "model.safetensors"),
        ("weights/", "model.safetensors"),
    ],
)
def test_a_delta_file_cannot_name_weights_outside_the_folder(tmp_path: Path, key: str, name: str) -> None:
    with pytest.raises(InvalidFileError, match="is not the name of a weight file"):
        WeightNames.from_metadata({key: name}, "d.deltafmt")


def test_a_tensor_with_the_name_of_a_part_is_refused(tmp_path: Path) -> None:
    pair = model_pair(tmp_path, tuned(llama()) | {"2_Dense/linear.weight": normal(1, (4, 4))})
    (pair.finetuned / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "2_Dense"}]))
    put(pair.finetuned / "2_Dense", "model.safetensors", {"linear.weight": normal(2, (4, 4))})
    with pytest.raises(InvalidFileError, match="has a name that the folder 2_Dense gives its own"):
        Checkpoint(pair.finetuned)


def test_names_with_slashes_stay_in_one_file(tmp_path: Path) -> None:
    a = {"/odd": normal(1, (32, 32)), "scope/dense/kernel": normal(2, (32, 32))}
    base, finetuned = write_folder(tmp_path / "base", a), write_folder(tmp_path / "ft", tuned(a))
    _, out = round_trip(base, finetuned, tmp_path / "o")
    assert read_file(out / "model.safetensors")[0].keys() == a.keys()


def test_the_names_of_weight_files() -> None:
    assert split_name("model.fp16.safetensors") == ("model", "fp16")
    assert split_name("sd_xl_base_1.0.safetensors") == ("sd_xl_base_1.0", None)
    assert index_name("model.safetensors") == "model.safetensors.index.json"
    assert index_name(f"{DIFFUSERS}.fp16.safetensors") == f"{DIFFUSERS}.safetensors.index.fp16.json"
    assert shard_name("model.fp16.safetensors", 1, 2) == "model.fp16-00001-of-00002.safetensors"
    names = WeightNames({"": "model.safetensors", "a": "x.safetensors", "a/b": "y.safetensors"})
    assert names.split("a/b/w/c") == ("a/b", "w/c")
    assert names.split("b/w") == ("", "b/w")
    assert WeightNames.from_metadata(names.metadata(), "d") == names


def test_a_delta_with_parts_is_no_adapter(tmp_path: Path) -> None:
    pipeline(tmp_path / "base", 1, change=False)
    pipeline(tmp_path / "ft", 1, change=True)
    deltafmt.pack(tmp_path / "base", tmp_path / "ft", tmp_path / "d.deltafmt", method=deltafmt.methods.SVD(rank=2))
    with pytest.raises(UsageError, match="weights in text_encoder, unet, vae, and an adapter is of one model"):
        deltafmt.export_lora(tmp_path / "d.deltafmt", tmp_path / "adapter")


def test_a_calibration_does_not_read_a_variant(tmp_path: Path) -> None:
    pair = model_pair(tmp_path)
    (tmp_path / "text.txt").write_text("some text")
    calibration = deltafmt.Calibration(tmp_path / "text.txt")
    with pytest.raises(UsageError, match="variant 'fp16' and a calibration"):
        deltafmt.pack(pair.base, pair.finetuned, tmp_path / "d.deltafmt", variant="fp16", calibration=calibration)


def test_a_wrong_part_is_a_wrong_base(tmp_path: Path) -> None:
    pipeline(tmp_path / "base", 1, change=False)
    pipeline(tmp_path / "ft", 1, change=True)
    deltafmt.pack(tmp_path / "base", tmp_path / "ft", tmp_path / "d.deltafmt", method=NEAR)
    put(tmp_path / "base" / "vae", f"{DIFFUSERS}.safetensors", component(70))
    with pytest.raises(WrongBaseError, match=r'"vae/blocks\.0\.to_q\.weight" differs'):
        deltafmt.verify(tmp_path / "d.deltafmt", tmp_path / "base")
