"""Fine-tunes that are not whole are refused, or completed as the caller says; the tensors are named either way."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import deltafmt
from conftest import Cli, Raw, normal, read_folder, write_folder
from deltafmt.errors import InvalidFileError, Remedy, StorageError, UsageError
from deltafmt.methods import Exact
from situations import NEAR, config, llama, model_pair, near, round_trip, situation, tuned

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
EMPTY = Raw("BF16", (0,), b"")


@situation("every matrix is empty (`[0]`), as ZeRO-3 saves it without gathering")
@pytest.mark.parametrize("emptied", [(HEAD, EMBEDDING), tuple(llama())], ids=["some", "all"])
def test_empty_matrices_are_refused(tmp_path: Path, emptied: tuple[str, ...]) -> None:
    b = tuned(llama()) | dict.fromkeys(emptied, EMPTY)
    pair = model_pair(tmp_path, b)
    with pytest.raises(InvalidFileError, match=r"no elements \(shape \[0\]\).*ZeRO-3.*lm_head\.weight") as caught:
        deltafmt.pack(pair.base, pair.finetuned, tmp_path / "d.deltafmt")
    assert caught.value.remedy == Remedy("missing", None)
    assert not (tmp_path / "d.deltafmt").exists()


def test_an_empty_matrix_is_taken_from_the_base_or_left_out_or_stored_as_it_is(tmp_path: Path) -> None:
    pair = model_pair(tmp_path, tuned(llama()) | {HEAD: EMPTY, "extra.weight": EMPTY})
    result, out = round_trip(pair.base, pair.finetuned, tmp_path / "same", missing="same")
    assert (result.taken, result.removed) == ([HEAD], [])
    assert read_folder(out)[HEAD] == pair.a[HEAD]
    result, out = round_trip(pair.base, pair.finetuned, tmp_path / "removed", missing="removed")
    assert (result.taken, result.removed) == ([], [HEAD])
    assert read_folder(out).keys() == pair.b.keys() - {HEAD, "extra.weight"}
    _, out = round_trip(pair.base, pair.finetuned, tmp_path / "whole", exclude=[HEAD, "extra.*"])
    assert read_folder(out)[HEAD] == EMPTY == read_folder(out)["extra.weight"]


def test_nothing_but_empty_matrices_is_no_fine_tune(tmp_path: Path) -> None:
    pair = model_pair(tmp_path, dict.fromkeys(llama(), EMPTY))
    with pytest.raises(InvalidFileError, match="no tensor is left once those without elements are left out"):
        deltafmt.pack(pair.base, pair.finetuned, tmp_path / "d.deltafmt", missing="removed")
    result = deltafmt.pack(pair.base, pair.finetuned, tmp_path / "d.deltafmt", missing="same")
    assert result.actions == {"same": len(pair.a)}


@situation("a matrix is flat, as a shard of FSDP or DeepSpeed is")
def test_a_flat_matrix_is_refused(tmp_path: Path) -> None:
    flat = normal(1, (128 * 64,))
    pair = model_pair(tmp_path, tuned(llama()) | {HEAD: flat})
    with pytest.raises(InvalidFileError, match=r'"lm_head\.weight" is flat, \[8192\], and \[128, 64\] in the base'):
        deltafmt.pack(pair.base, pair.finetuned, tmp_path / "d.deltafmt")
    _, out = round_trip(pair.base, pair.finetuned, tmp_path / "whole", exclude=[HEAD])
    assert read_folder(out)[HEAD] == flat


@situation("a matrix of a layer is smaller than config.json says, as in the save of one process of several")
def test_a_part_of_a_matrix_is_refused(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    a, b = llama(), tuned(llama())
    b[name] = normal(1, (64, 64))
    base = write_folder(tmp_path / "base", a, files={"config.json": config(hidden_size=64)})
    finetuned = write_folder(tmp_path / "ft", b, files={"config.json": config(hidden_size=64, vocab_size=7)})
    with pytest.raises(InvalidFileError, match=rf'"{name}" has shape \[64, 64\], and \[128, 64\] in the base'):
        deltafmt.pack(base, finetuned, tmp_path / "d.deltafmt")
    _, out = round_trip(base, finetuned, tmp_path / "whole", exclude=[name])
    assert read_folder(out)[name] == b[name]
    # Other sizes of the model explain other shapes.
    (finetuned / "config.json").write_bytes(config(hidden_size=64, num_attention_heads=1))
    (base / "config.json").write_bytes(config(hidden_size=64, num_attention_heads=2))
    _, out = round_trip(base, finetuned, tmp_path / "pruned")
    assert read_folder(out)[name].shape == (64, 64)


@situation("the fine-tune holds only what was trained")
def test_a_fine_tune_of_trainable_weights_alone(tmp_path: Path) -> None:
    b = {name: tensor for name, tensor in tuned(llama()).items() if ".1." in name}
    pair = model_pair(tmp_path, b)
    lacking = sorted(pair.a.keys() - b.keys())
    with pytest.raises(InvalidFileError, match="it lacks 7 tensors of the base's 11: ") as caught:
        deltafmt.pack(pair.base, pair.finetuned, tmp_path / "d.deltafmt")
    assert all(name in str(caught.value) for name in lacking)
    result, out = round_trip(pair.base, pair.finetuned, tmp_path / "same", missing="same")
    assert sorted(result.taken) == lacking
    found = read_folder(out)
    assert found.keys() == pair.a.keys()
    assert all(found[name] == pair.a[name] for name in lacking)
    assert all(near(found[name], b[name], pair.a[name]) for name in b)
    result, out = round_trip(pair.base, pair.finetuned, tmp_path / "removed", missing="removed")
    assert result.removed == lacking
    assert read_folder(out).keys() == b.keys()


def test_what_is_left_out_or_taken_is_said_by_every_command(tmp_path: Path, cli: Cli) -> None:
    b = {name: tensor for name, tensor in tuned(llama()).items() if name != HEAD}
    pair = model_pair(tmp_path, b)
    delta = tmp_path / "d.deltafmt"
    refusal = cli("pack", pair.base, pair.finetuned, "-o", delta)
    assert refusal.code == 3
    assert "--missing same takes from the base what is lacking, --missing removed leaves it out" in refusal.err
    line = f"left out: 1 tensor that only the base has: {HEAD}"
    made = cli("pack", pair.base, pair.finetuned, "-o", delta, "--missing", "removed", "--json").json()
    assert (made["removed"], made["in_base_only"], made["taken_from_base"]) == ([HEAD], 1, [])
    commands = (
        ("pack", pair.base, pair.finetuned, "-o", tmp_path / "e.deltafmt", "--missing", "removed"),
        ("inspect", delta),
        ("verify", delta),
        ("unpack", pair.base, delta, "-o", tmp_path / "out"),
    )
    for command in commands:
        assert line in cli(*command).out.splitlines(), command
    for command in (*commands[1:3], ("unpack", pair.base, delta, "-o", tmp_path / "again")):
        assert cli(*command, "--json").json()["removed"] == [HEAD]
    same = cli("pack", pair.base, pair.finetuned, "-o", tmp_path / "f.deltafmt", "--missing", "same")
    assert f"taken from the base: 1 tensor: {HEAD}" in same.out.splitlines()
    assert "taken_from_base: 1" in cli("inspect", tmp_path / "f.deltafmt").out.splitlines()


def test_many_names_are_bounded(tmp_path: Path) -> None:
    a = {f"w{number:03d}.weight": normal(number, (8, 8)) for number in range(50)}
    base = write_folder(tmp_path / "base", a)
    finetuned = write_folder(tmp_path / "ft", {"w000.weight": normal(1, (8, 8))})
    with pytest.raises(InvalidFileError, match=r"w001\.weight, .*w010\.weight and 39 more") as caught:
        deltafmt.pack(base, finetuned, tmp_path / "d.deltafmt")
    assert len(str(caught.value)) < 600


def test_another_value_of_missing_is_refused(tmp_path: Path) -> None:
    pair = model_pair(tmp_path)
    with pytest.raises(UsageError, match="missing 'zero' is not one of same, removed"):
        deltafmt.pack(pair.base, pair.finetuned, tmp_path / "d.deltafmt", missing="zero")


@situation("a tied head that the fine-tune does not store again")
def test_a_tied_copy_is_not_missed(tmp_path: Path) -> None:
    a = llama()
    a[HEAD] = a[EMBEDDING]
    b = {name: tensor for name, tensor in tuned(a).items() if name != HEAD}
    base = write_folder(tmp_path / "base", a, files={"config.json": config()})
    finetuned = write_folder(tmp_path / "ft", b, files={"config.json": config()})
    assert deltafmt.pack(base, finetuned, tmp_path / "d.deltafmt").removed == [HEAD]
    untied = write_folder(tmp_path / "untied", b, files={"config.json": config(tie_word_embeddings=False)})
    with pytest.raises(InvalidFileError, match=r"it lacks 1 tensor .*lm_head\.weight"):
        deltafmt.pack(base, untied, tmp_path / "e.deltafmt")


def test_equal_matrices_that_no_model_ties_are_missed(tmp_path: Path) -> None:
    a = llama()
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1)]
    a |= dict.fromkeys(names, normal(1, (128, 64)))
    a |= dict.fromkeys((f"model.layers.{layer}.input_layernorm.weight" for layer in (0, 1)), normal(2, (64,)))
    lacking = [names[1], "model.layers.1.input_layernorm.weight"]
    b = {name: tensor for name, tensor in tuned(a).items() if name not in lacking}
    base, finetuned = write_folder(tmp_path / "base", a), write_folder(tmp_path / "ft", b)
    with pytest.raises(InvalidFileError, match="it lacks 2 tensors"):
        deltafmt.pack(base, finetuned, tmp_path / "d.deltafmt")


def test_a_tied_bias_is_not_missed(tmp_path: Path) -> None:
    bias = normal(1, (96,))
    a = llama() | {"cls.predictions.bias": bias, "cls.predictions.decoder.bias": bias}
    b = {name: tensor for name, tensor in tuned(a).items() if name != "cls.predictions.decoder.bias"}
    base, finetuned = write_folder(tmp_path / "base", a), write_folder(tmp_path / "ft", b)
    result = deltafmt.pack(base, finetuned, tmp_path / "d.deltafmt")
    assert result.removed == ["cls.predictions.decoder.bias"]


@situation("buffers that models compute by themselves are not stored again")
def test_computed_buffers_are_not_missed(tmp_path: Path) -> None:
    a = llama()
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": normal(1, (32,), "F32"),
        "h.0.attn.bias": normal(2, (1, 1, 8, 8), "F32"),
        "h.0.attn.masked_bias": normal(3, (), "F32"),
        "embeddings.position_ids": Raw("I64", (1, 4), bytes(32)),
        "transformer.rotary_pos_emb.inv_freq": normal(4, (8,), "F32"),
        "layers.0.attention.self.relative_position_index": Raw("I64", (2, 2), bytes(32)),
    }
    base = write_folder(tmp_path / "base", {**a, **buffers})
    finetuned = write_folder(tmp_path / "ft", tuned(a))
    assert deltafmt.pack(base, finetuned, tmp_path / "d.deltafmt").removed == sorted(buffers)


@situation("another head than the base's (`architectures` in config.json)")
def test_another_head(tmp_path: Path) -> None:
    a = llama()
    b = {name: tensor for name, tensor in tuned(a).items() if name != HEAD} | {"score.weight": normal(1, (2, 64))}
    base = write_folder(tmp_path / "base", a, files={"config.json": config()})
    kind = ["LlamaForSequenceClassification"]
    finetuned = write_folder(tmp_path / "ft", b, files={"config.json": config(architectures=kind)})
    assert deltafmt.pack(base, finetuned, tmp_path / "d.deltafmt").removed == [HEAD]
    # Other tensors are missed all the same.
    del b["model.norm.weight"]
    cut = write_folder(tmp_path / "cut", b, files={"config.json": config(architectures=kind)})
    with pytest.raises(InvalidFileError, match=r"it lacks 1 tensor of the base's 11: model\.norm\.weight"):
        deltafmt.pack(base, cut, tmp_path / "e.deltafmt")


@situation("layers were cut off, and config.json says so")
def test_cut_layers(tmp_path: Path) -> None:
    b = {name: tensor for name, tensor in tuned(llama()).items() if ".layers.1." not in name}
    pair = model_pair(tmp_path, b, num_hidden_layers=1)
    result = deltafmt.pack(pair.base, pair.finetuned, tmp_path / "d.deltafmt")
    assert result.removed == sorted(name for name in pair.a if ".layers.1." in name)


@situation("config.json says more layers than there are")
def test_more_layers_are_said_than_there_are(tmp_path: Path) -> None:
    pair = model_pair(tmp_path, num_hidden_layers=3)
    with pytest.raises(InvalidFileError, match=r"config\.json says 3 layers, and the weights have 2"):
        deltafmt.pack(pair.base, pair.finetuned, tmp_path / "d.deltafmt")


def test_a_model_that_shares_its_layers_is_not_refused(tmp_path: Path) -> None:
    a = llama()
    base = write_folder(tmp_path / "base", a, files={"config.json": config(num_hidden_layers=12)})
    finetuned = write_folder(tmp_path / "ft", tuned(a), files={"config.json": config(num_hidden_layers=12)})
    assert deltafmt.pack(base, finetuned, tmp_path / "d.deltafmt").removed == []


@situation("an adapter that is not merged lies in the fine-tune's weights")
def test_an_adapter_that_is_not_merged_is_named(tmp_path: Path) -> None:
    lora = {f"model.layers.0.mlp.up_proj.lora_{side}.default.weight": normal(1, (4, 64)) for side in "AB"}
    b = {name: tensor for name, tensor in tuned(llama()).items() if "up_proj" not in name}
    pair = model_pair(tmp_path, b | lora)
    with pytest.raises(InvalidFileError, match="LoRA adapter is not merged"):
        deltafmt.pack(pair.base, pair.finetuned, tmp_path / "d.deltafmt")


def test_an_adapter_beside_weights_that_are_whole(tmp_path: Path) -> None:
    """Older savers kept the names of the weights beside it, and pack stored the adapter whole without a word."""
    lora = {f"model.layers.0.mlp.up_proj.lora_{side}.default.weight": normal(1, (4, 64)) for side in "AB"}
    pair = model_pair(tmp_path, tuned(llama()) | lora)
    out = tmp_path / "d.deltafmt"
    with pytest.raises(InvalidFileError, match=r"2 tensors of its weights are a LoRA adapter that is not merged"):
        deltafmt.pack(pair.base, pair.finetuned, out)
    kept = deltafmt.pack(pair.base, pair.finetuned, out, exclude=["*lora[_.]*"]).kept
    assert "excluded" in {kept.get(name) for name in lora}
    assert deltafmt.pack(pair.base, pair.finetuned, out, force=True, method=Exact()).left_out == {}
    # Some models have such tensors of their own.
    own = write_folder(tmp_path / "own", llama() | lora, files={"config.json": config()})
    deltafmt.pack(own, pair.finetuned, out, force=True)


def test_a_configuration_that_is_no_json_is_said(tmp_path: Path) -> None:
    """What it says is compared with the weights, and nothing said that it was not."""
    pair = model_pair(tmp_path, tuned(llama()))
    for broken in (config()[:-3], b"\xef\xbb\xbf" + config()):
        (pair.finetuned / "config.json").write_bytes(broken)
        result = deltafmt.pack(pair.base, pair.finetuned, tmp_path / "d.deltafmt", force=True)
        assert any("config.json could not be read" in remark for remark in result.remarks)


def _sharded(folder: Path, parts: int = 3) -> tuple[dict[str, Raw], Path]:
    b = tuned(llama())
    names = list(b)
    size = -(-len(names) // parts)
    shards = [names[start : start + size] for start in range(0, len(names), size)]
    return b, write_folder(folder, b, shards, files={"config.json": config()})


@situation("a shard of the index is not there")
def test_a_shard_that_the_index_names_is_missing(tmp_path: Path) -> None:
    pair = model_pair(tmp_path)
    _, folder = _sharded(tmp_path / "sharded")
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(StorageError, match=r"names 3 files, and model-00002-of-00003\.safetensors is missing"):
        deltafmt.pack(pair.base, folder, tmp_path / "d.deltafmt")
    (folder / "model-00002-of-00003.safetensors").symlink_to("../../blobs/0123")
    with pytest.raises(StorageError, match=r"model-00002-of-00003\.safetensors is a link to nothing"):
        deltafmt.pack(pair.base, folder, tmp_path / "d.deltafmt")


@situation("a gap in the numbers of the shards, without an index")
@pytest.mark.parametrize("gone", [1, 2, 3])
def test_a_gap_in_the_numbers_of_shards(tmp_path: Path, gone: int) -> None:
    pair = model_pair(tmp_path)
    _, folder = _sharded(tmp_path / "sharded")
    (folder / "model.safetensors.index.json").unlink()
    (folder / f"model-0000{gone}-of-00003.safetensors").unlink()
    wanted = rf"1 of 3 shards is missing: model-0000{gone}-of-00003\.safetensors"
    for side in ((pair.base, folder), (folder, pair.finetuned)):
        with pytest.raises(StorageError, match=wanted):
            deltafmt.pack(*side, tmp_path / "d.deltafmt")


def test_shards_that_count_from_zero_are_whole(tmp_path: Path) -> None:
    pair = model_pair(tmp_path)
    b, folder = _sharded(tmp_path / "sharded")
    (folder / "model.safetensors.index.json").unlink()
    for number in (1, 2, 3):
        name = "model-0000{}-of-00003.safetensors"
        (folder / name.format(number)).rename(folder / name.format(number - 1))
    _, out = round_trip(pair.base, folder, tmp_path / "o")
    assert read_folder(out).keys() == b.keys()


@situation("a tensor in a shard that the index does not name")
def test_a_tensor_that_the_index_does_not_name_is_packed_and_said(tmp_path: Path, cli: Cli) -> None:
    pair = model_pair(tmp_path)
    b, folder = _sharded(tmp_path / "sharded", 2)
    index = folder / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    shard = found["weight_map"].pop("model.norm.weight")
    index.write_text(json.dumps(found))
    result, out = round_trip(pair.base, folder, tmp_path / "o")
    assert result.unlisted == {"model.norm.weight": shard}
    assert read_folder(out)["model.norm.weight"] == b["model.norm.weight"]
    said = cli("pack", pair.base, folder, "-o", tmp_path / "e.deltafmt")
    assert re.search(rf"1 tensor of {shard} that the index does not name, .*model\.norm\.weight", said.err)
    found = cli("pack", pair.base, folder, "-o", tmp_path / "f.deltafmt", "--json").json()
    assert found["not_in_index"] == {"model.norm.weight": shard}


@situation("an index names a tensor that its shard lacks")
def test_an_index_that_names_a_tensor_too_many(tmp_path: Path) -> None:
    pair = model_pair(tmp_path)
    _, folder = _sharded(tmp_path / "sharded", 2)
    index = folder / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    found["weight_map"]["mtp.fc.weight"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(found))
    with pytest.raises(InvalidFileError, match=r'tensor "mtp\.fc\.weight" is not in model-00002-of-00002'):
        deltafmt.pack(pair.base, folder, tmp_path / "d.deltafmt")


def test_a_stale_index_that_knows_fewer_shards(tmp_path: Path) -> None:
    """The third shard is there, and the index does not name it: its tensors are missed, and the file is named."""
    pair = model_pair(tmp_path)
    _, folder = _sharded(tmp_path / "sharded", 3)
    index = folder / "model.safetensors.index.json"
    last = "model-00003-of-00003.safetensors"
    weight_map = {name: file for name, file in json.loads(index.read_text())["weight_map"].items() if file != last}
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InvalidFileError, match=rf"it lacks 3 tensors .*not read: {last}"):
        deltafmt.pack(pair.base, folder, tmp_path / "d.deltafmt")


def test_the_plan_of_a_target_asks_the_same(tmp_path: Path) -> None:
    pair = model_pair(tmp_path, {name: tensor for name, tensor in tuned(llama()).items() if name != HEAD})
    with pytest.raises(InvalidFileError, match="it lacks 1 tensor"):
        deltafmt.plan_for_target(pair.base, pair.finetuned, target_ratio=1.2)
    choice = deltafmt.plan_for_target(pair.base, pair.finetuned, target_ratio=1.2, missing="same")
    packed = deltafmt.pack(pair.base, pair.finetuned, tmp_path / "d.deltafmt", target_ratio=1.2, missing="same")
    assert choice.size == packed.size
    assert len(choice.tensors) == len(pair.a)


def test_what_is_taken_from_the_base_is_packed_once_and_deterministically(tmp_path: Path) -> None:
    pair = model_pair(tmp_path, {name: tensor for name, tensor in tuned(llama()).items() if name != HEAD})
    whole = tmp_path / "whole.deltafmt"
    deltafmt.pack(pair.base, pair.finetuned, whole, method=NEAR, missing="same")
    seen: list[str] = []
    again = tmp_path / "again.deltafmt"
    options = {"method": NEAR, "missing": "same", "threads": 3}
    deltafmt.pack(pair.base, pair.finetuned, again, **options, progress=lambda name, _: seen.append(name))
    assert seen.count(HEAD) == 1
    assert again.read_bytes() == whole.read_bytes()


def test_bytes_behind_the_last_tensor_are_said(tmp_path: Path) -> None:
    """Safetensors refuses such a file, as a shorter save over a longer one leaves it; pack read it without a word."""
    pair = model_pair(tmp_path, tuned(llama()))
    with (pair.finetuned / "model.safetensors").open("ab") as file:
        file.write(b"left over")
    result = deltafmt.pack(pair.base, pair.finetuned, tmp_path / "d.deltafmt")
    assert any("9 bytes of model.safetensors belong to no tensor" in remark for remark in result.remarks)
