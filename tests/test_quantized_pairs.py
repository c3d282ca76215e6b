"""Pairs with FP8 on either side: deltas of what the numbers mean, or the stored bytes, through every command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import deltafmt
from conftest import Cli, Raw, Tensors, normal, raw, read_folder, refused, round_bf16, write_folder
from deltafmt.errors import InvalidFileError, UnsupportedError, UsageError, WrongBaseError
from deltafmt.methods import RTN
from fp8_files import FORMS, fp8, with_settings
from lora_files import write_adapter
from situations import NEAR, config, llama, near, situation, tuned

DEEPSEEK = FORMS["DeepSeek-V3"]
WIDTH = 160  # no multiple of a block


class Side(NamedTuple):
    """A checkpoint of FP8, the same as BF16, and what its tensors mean."""

    folder: Path
    plain: Path
    values: Tensors


def side(folder: Path, tensors: Tensors, form: str = "DeepSeek-V3") -> Side:
    stored, meant = fp8(tensors, FORMS[form])
    settings = {"config.json": with_settings(config(), FORMS[form]), "hf_quant_config.json": b"{}\n"}
    folder.mkdir(exist_ok=True)
    return Side(
        write_folder(folder / "fp8", stored, files=settings),
        write_folder(folder / "bf16", meant, files={"config.json": config()}),
        meant,
    )


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> tuple[Side, Side]:
    """A base and a fine-tune."""
    folder = tmp_path_factory.mktemp("fp8")
    a = llama(width=WIDTH)
    return side(folder / "base", a), side(folder / "ft", tuned(a))


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {name: tensor.data for name, tensor in read_folder(folder).items()}


def check_restored(base: Path, delta: Path, out: Path, finetuned: Side, before: Side) -> None:
    """Check that a delta file gives a plain checkpoint near the fine-tune's values."""
    deltafmt.verify(delta, base)
    deltafmt.unpack(base, delta, out)
    found = read_folder(out)
    assert found.keys() == finetuned.values.keys()
    for name, tensor in found.items():
        assert near(tensor, finetuned.values[name], before.values[name]), name
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert not (out / "hf_quant_config.json").exists()


@pytest.mark.parametrize("form", FORMS)
@situation("an FP8 fine-tune of an FP8 base: one scale, a scale for each row or for each block, any block")
def test_a_pair_of_fp8(tmp_path: Path, form: str) -> None:
    a = llama(1, WIDTH)
    before, after = side(tmp_path / "base", a, form), side(tmp_path / "ft", tuned(a), form)
    result = deltafmt.pack(before.folder, after.folder, tmp_path / "d.deltafmt", method=NEAR)
    assert result.dequantized.to_obj() == {"base": 3, "finetuned": 3}
    assert result.left_out.keys() == {"hf_quant_config.json"}
    assert not result.removed
    check_restored(before.folder, tmp_path / "d.deltafmt", tmp_path / "out", after, before)
    # The deltas are those of the same pair in BF16, byte for byte.
    deltafmt.pack(before.plain, after.plain, tmp_path / "plain.deltafmt", method=NEAR)
    deltafmt.unpack(before.plain, tmp_path / "plain.deltafmt", tmp_path / "plain")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "plain")


@situation("a BF16 fine-tune of an FP8 base")
def test_a_plain_finetune_of_fp8(tmp_path: Path, sides: tuple[Side, Side]) -> None:
    before, after = sides
    result = deltafmt.pack(before.folder, after.plain, tmp_path / "d.deltafmt", method=NEAR)
    assert result.dequantized.to_obj() == {"base": 6, "finetuned": 0}
    assert result.actions["add"] == 8
    check_restored(before.folder, tmp_path / "d.deltafmt", tmp_path / "out", after, before)
    with deltafmt.open(tmp_path / "d.deltafmt") as delta:
        assert delta.container.features == 4
        described = delta.container.scaled()["model.layers.0.mlp.up_proj.weight"]
        assert described.block == (128, 128)
        assert described.scales_name == "model.layers.0.mlp.up_proj.weight_scale_inv"


@situation("an FP8 fine-tune of a BF16 base")
def test_an_fp8_finetune_of_a_plain_base(tmp_path: Path, sides: tuple[Side, Side]) -> None:
    before, after = sides
    result = deltafmt.pack(before.plain, after.folder, tmp_path / "d.deltafmt", method=NEAR)
    assert result.dequantized.to_obj() == {"base": 0, "finetuned": 6}
    assert len(result.remarks) == 1
    assert "the delta holds the rounding to 8 bits as well" in result.remarks[0]
    check_restored(before.plain, tmp_path / "d.deltafmt", tmp_path / "out", after, before)
    with deltafmt.open(tmp_path / "d.deltafmt") as delta:
        assert delta.container.features == 0  # readers of before read it


@situation("the FP8 base saved as BF16, for `verify` and `unpack`; another base")
def test_which_bases_are_the_same(tmp_path: Path, sides: tuple[Side, Side]) -> None:
    before, after = sides
    delta = tmp_path / "d.deltafmt"
    deltafmt.pack(before.folder, after.folder, delta, method=RTN(4))
    deltafmt.unpack(before.folder, delta, tmp_path / "a")
    check = deltafmt.verify(delta, before.plain)
    assert check.base_tensors == 8
    deltafmt.unpack(before.plain, delta, tmp_path / "b")
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")
    # The scales alone are others.
    stored = dict(read_folder(before.folder))
    name = "model.layers.1.mlp.up_proj.weight_scale_inv"
    stored[name] = raw(stored[name].floats() * np.float32(1.01), "F32")
    other = write_folder(tmp_path / "other", stored, files={"config.json": with_settings(config(), DEEPSEEK)})
    with pytest.raises(WrongBaseError, match=r'"model.layers.1.mlp.up_proj.weight" differs'):
        deltafmt.verify(delta, other)
    with pytest.raises(WrongBaseError, match=r'"model.layers.1.mlp.up_proj.weight" differs'):
        deltafmt.unpack(other, delta, tmp_path / "c")
    # A delta of a plain base does not take codes for weights.
    deltafmt.pack(before.plain, after.plain, tmp_path / "plain.deltafmt", method=RTN(4))
    with pytest.raises(WrongBaseError, match="is F8_E4M3"):
        deltafmt.verify(tmp_path / "plain.deltafmt", before.folder)


@situation("an FP8 base under other names, with a prefix or with experts in one tensor")
def test_names_and_layouts(tmp_path: Path, sides: tuple[Side, Side]) -> None:
    before, after = sides
    stored = {f"language_model.{name}": tensor for name, tensor in read_folder(before.folder).items()}
    base = write_folder(tmp_path / "base", stored, files={"config.json": with_settings(config(), DEEPSEEK)})
    delta = tmp_path / "d.deltafmt"
    result = deltafmt.pack(base, after.plain, delta, method=NEAR)
    assert result.actions["add"] == 8
    assert result.names
    check_restored(base, delta, tmp_path / "out", after, before)
    deltafmt.unpack(before.folder, delta, tmp_path / "again")  # the same base without the prefix
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "again")
    experts = {f"model.layers.0.mlp.experts.{i}.down_proj.weight": normal(i, (128, WIDTH)) for i in range(3)}
    stored, meant = fp8(experts, DEEPSEEK)
    rest = {"model.embed_tokens.weight": normal(9, (64, WIDTH))}
    one = b"".join(meant[name].data for name in experts)
    held = tuned({**rest, "model.layers.0.mlp.experts.down_proj": Raw("BF16", (3, 128, WIDTH), one)})
    base = write_folder(tmp_path / "apart", {**stored, **rest})
    stacked = write_folder(tmp_path / "stacked", held)
    result = deltafmt.pack(base, stacked, tmp_path / "e.deltafmt", method=NEAR)
    assert result.actions["add"] == 1
    assert result.kept.keys() == {"model.embed_tokens.weight"}  # too small
    deltafmt.unpack(base, tmp_path / "e.deltafmt", tmp_path / "whole")
    found = read_folder(tmp_path / "whole")["model.layers.0.mlp.experts.down_proj"]
    assert near(found, held["model.layers.0.mlp.experts.down_proj"], Raw("BF16", (3, 128, WIDTH), one))


def test_the_file_says_how_its_base_is_scaled(tmp_path: Path) -> None:
    """The base's configuration alone names its blocks; whoever has the file needs no configuration."""
    a = llama(1, WIDTH)
    before, after = side(tmp_path / "base", a, "small blocks"), side(tmp_path / "ft", tuned(a), "small blocks")
    deltafmt.pack(before.folder, after.folder, tmp_path / "d.deltafmt", method=NEAR)
    alone = next(before.folder.glob("*.safetensors"))
    with pytest.raises(UnsupportedError, match="does not say how"):
        deltafmt.pack(alone, after.folder, tmp_path / "e.deltafmt")
    check_restored(alone, tmp_path / "d.deltafmt", tmp_path / "out", after, before)


@situation("`pack`, `verify`, `inspect` and `unpack` say what is read as values")
def test_every_command_says_so(tmp_path: Path, sides: tuple[Side, Side], cli: Cli) -> None:
    before, after = sides
    delta = tmp_path / "d.deltafmt"
    said = (
        "values: 6 FP8 tensors of the base and 6 FP8 tensors of the fine-tune read as the values they mean in BF16, "
        "and what unpack writes is BF16"
    )
    commands = (
        ("pack", before.folder, after.folder, "-o", delta, "--force"),
        ("verify", delta, "--base", before.folder),
        ("inspect", delta),
        ("unpack", before.folder, delta, "-o", tmp_path / "out", "--force"),
    )
    for command in commands:
        lines = cli(*command).out.splitlines()
        ending = "; --quantized exact packs the stored bytes" if command[0] == "pack" else ""
        assert said + ending in lines, command
        assert cli(*command, "--json").json()["dequantized"] == {"base": 6, "finetuned": 6}


@situation("`--quantized exact`: an FP8 fine-tune of an FP8 base")
def test_exactly_the_stored_bytes(tmp_path: Path, sides: tuple[Side, Side]) -> None:
    before, after = sides
    stored = dict(read_folder(after.folder))
    same = "model.layers.0.mlp.up_proj.weight"
    stored[same] = read_folder(before.folder)[same]
    finetuned = write_folder(tmp_path / "ft", stored, files={"config.json": with_settings(config(), DEEPSEEK)})
    result = deltafmt.pack(before.folder, finetuned, tmp_path / "d.deltafmt", quantized="exact", method=NEAR)
    assert result.dequantized.to_obj() == {"base": 0, "finetuned": 0}
    assert result.actions["same"] == 1
    deltafmt.verify(tmp_path / "d.deltafmt", before.folder)
    deltafmt.unpack(before.folder, tmp_path / "d.deltafmt", tmp_path / "out")
    found, wanted = bytes_of(tmp_path / "out"), bytes_of(finetuned)
    assert found.keys() == wanted.keys()
    lossy = {"model.embed_tokens.weight", "lm_head.weight"}
    assert {name for name in found if found[name] != wanted[name]} == lossy
    assert (tmp_path / "out" / "config.json").read_bytes() == (finetuned / "config.json").read_bytes()
    with pytest.raises(UsageError, match="quantized 'codes' is not one of values, exact"):
        deltafmt.pack(before.folder, finetuned, tmp_path / "e.deltafmt", quantized="codes")


def test_a_progressive_file(tmp_path: Path, sides: tuple[Side, Side], cli: Cli) -> None:
    before, after = sides
    for number, (finetuned, quantized) in enumerate(((after.plain, None), (after.folder, "exact"))):
        out = tmp_path / f"{number}.deltafmt"
        deltafmt.pack(before.folder, finetuned, out, exact=True, quantized=quantized)
        restored = deltafmt.unpack(before.folder, out, tmp_path / f"{number}").restored
        assert restored == ["model.safetensors"]
        assert bytes_of(tmp_path / f"{number}") == bytes_of(finetuned)
        assert deltafmt.verify(out, before.folder).restored
    found = cli("pack", before.folder, after.folder, "-o", tmp_path / "d", "--exact")
    refused(found, 2, "is read as values, from which its files cannot be restored", "--quantized exact")


@situation("8-bit floats without scales anywhere: a checkpoint that was cast")
def test_floats_that_were_cast(tmp_path: Path) -> None:
    a = llama(1)
    base = write_folder(tmp_path / "base", a)
    codes = np.random.default_rng(1).integers(0, 126, (128, 64), np.uint8)
    cast = {**tuned(a), "model.layers.0.mlp.up_proj.weight": Raw("F8_E4M3", (128, 64), codes.tobytes())}
    finetuned = write_folder(tmp_path / "ft", cast)
    result = deltafmt.pack(base, finetuned, tmp_path / "d.deltafmt", exclude=["*up_proj*"])
    assert result.dequantized.finetuned == 1
    deltafmt.unpack(base, tmp_path / "d.deltafmt", tmp_path / "out")
    from deltafmt.checkpoint.float8 import values_of_codes

    found = read_folder(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"]
    assert found.data == round_bf16(values_of_codes("F8_E4M3")[codes]).tobytes()


@situation("8-bit floats beside codes of another kind, such as experts of 4 bits in bytes")
def test_codes_of_two_kinds(tmp_path: Path) -> None:
    stored, _ = fp8(llama(1, WIDTH), DEEPSEEK)
    expert = "model.layers.0.mlp.experts.0.w1"
    stored[f"{expert}.weight"] = Raw("I8", (64, 32), bytes(2048))
    stored[f"{expert}.scale"] = Raw("F8_E8M0", (64, 2), bytes(128))
    base = write_folder(tmp_path / "base", stored, files={"config.json": with_settings(config(), DEEPSEEK)})
    with pytest.raises(UnsupportedError, match=f'"{expert}.scale" F8_E8M0 beside 8-bit floats is not read as weights'):
        deltafmt.pack(base, base, tmp_path / "d.deltafmt")


@situation("8-bit floats that lack their scales, or have two, or scales of a shape that says nothing")
def test_scales_that_do_not_fit(tmp_path: Path) -> None:
    stored, _ = fp8(llama(1, WIDTH), DEEPSEEK)
    name = "model.layers.0.mlp.up_proj.weight"
    settings = {"config.json": with_settings(config(), DEEPSEEK)}

    def refuse(label: str, changes: dict[str, Raw | None], error: type[Exception], words: str) -> None:
        tensors = {key: tensor for key, tensor in {**stored, **changes}.items() if tensor is not None}
        base = write_folder(tmp_path / label, tensors, files=settings)
        with pytest.raises(error, match=words):
            deltafmt.pack(base, base, tmp_path / "d.deltafmt")

    refuse("none", {f"{name}_scale_inv": None}, InvalidFileError, f'"{name}" has 8-bit floats and no scales')
    refuse("two", {f"{name}_scale": normal(1, (1,), "F32")}, InvalidFileError, "may both be the scales of")
    refuse("odd", {f"{name}_scale_inv": normal(1, (7, 9), "F32")}, UnsupportedError, r"\[7, 9\] does not say how")
    refuse(
        "alone", {"x.weight_scale": normal(1, (1,), "F32")}, InvalidFileError, '"x.weight_scale" has the scales of no'
    )
    zero = {name.replace("weight", "weight_zero_point"): Raw("F8_E4M3", (1, 1), b"\0")}
    refuse("moved", zero, UnsupportedError, "zero points, which are not read")


@situation("`diff` and `analyze` of FP8 checkpoints; `--variant`")
def test_diff_and_analyze(tmp_path: Path, sides: tuple[Side, Side], cli: Cli) -> None:
    before, after = sides
    assert deltafmt.diff(before.folder, before.plain).changes == []
    found = deltafmt.diff(before.folder, after.folder)
    plain = deltafmt.diff(before.plain, after.plain)
    assert [(one.name, one.relative) for one in found.changes] == [(one.name, one.relative) for one in plain.changes]
    exact = cli("diff", before.folder, after.folder, "--quantized", "exact", "--json").json()
    assert any(change["name"].endswith("_scale_inv") for change in exact["changes"])
    reports = [
        deltafmt.analyze(one.folder, two.folder, methods=[RTN(4)], include=["*.0.mlp*"]).to_obj()["tensors"]
        for one, two in ((before, after), (Side(before.plain, *before[1:]), Side(after.plain, *after[1:])))
    ]
    assert json.dumps(reports[0]) == json.dumps(reports[1])
    for folder in (tmp_path / "a", tmp_path / "b"):
        write_folder(folder, llama(1))
    write_variant(tmp_path / "a", llama(1))
    write_variant(tmp_path / "b", tuned(llama(1)))
    assert cli("diff", tmp_path / "a", tmp_path / "b", "--json").json()["equal"]
    assert not cli("diff", tmp_path / "a", tmp_path / "b", "--variant", "fp16", "--json").json()["equal"]
    deltafmt.analyze(tmp_path / "a", tmp_path / "b", variant="fp16", methods=[RTN(4)], include=["*.0.mlp*"])


def write_variant(folder: Path, tensors: Tensors) -> None:
    """Write weights of a variant beside those that are there."""
    from conftest import safetensors_bytes

    (folder / "model.fp16.safetensors").write_bytes(safetensors_bytes(tensors))


@situation("`import-lora` with an FP8 base, and `export-lora` of its delta")
def test_adapters_of_fp8(tmp_path: Path, sides: tuple[Side, Side], cli: Cli) -> None:
    before = Side(
        write_folder(
            tmp_path / "fp8", read_folder(sides[0].folder), files={"config.json": with_settings(b"{}", DEEPSEEK)}
        ),
        write_folder(tmp_path / "bf16", sides[0].values, files={"config.json": b"{}"}),
        sides[0].values,
    )
    target = "model.layers.0.mlp.up_proj"
    factors: Tensors = {
        f"base_model.model.{target}.lora_A.weight": normal(5, (4, WIDTH), "F32", 0.1),
        f"base_model.model.{target}.lora_B.weight": normal(6, (128, 4), "F32", 0.1),
    }
    adapter = write_adapter(tmp_path / "adapter", factors, r=4, lora_alpha=4, target_modules=["up_proj"])
    found = cli("import-lora", before.folder, adapter, "-o", tmp_path / "d.deltafmt", "--json").json()
    assert found["dequantized"] == {"base": 6, "finetuned": 0}
    deltafmt.import_lora(before.plain, adapter, tmp_path / "plain.deltafmt")
    for name, base in (("d", before.folder), ("plain", before.plain)):
        deltafmt.verify(tmp_path / f"{name}.deltafmt", base)
        deltafmt.unpack(base, tmp_path / f"{name}.deltafmt", tmp_path / name)
    assert bytes_of(tmp_path / "d") == bytes_of(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "d" / "config.json").read_text())
    deltafmt.export_lora(tmp_path / "d.deltafmt", tmp_path / "back", base=before.folder)
    assert (tmp_path / "back" / "adapter_model.safetensors").exists()


@situation("an FP8 fine-tune and `--calibration`")
def test_a_calibration_needs_weights_that_run(tmp_path: Path, sides: tuple[Side, Side], cli: Cli, nano: Path) -> None:
    before, after = sides
    text = tmp_path / "text.txt"
    text.write_text("one two three")
    found = cli(
        "pack",
        before.folder,
        after.folder,
        "-o",
        tmp_path / "d.deltafmt",
        "--method",
        "gptq",
        "--calibration",
        text,
        "--tokenizer",
        nano / "tokenizer.json",
    )
    refused(found, 2, "is FP8, and a calibration runs the fine-tune in BF16")


def test_a_target_counts_the_descriptions(tmp_path: Path, sides: tuple[Side, Side]) -> None:
    before, after = sides
    options: dict[str, Any] = {"target_ratio": 1.2, "candidates": [RTN(2), RTN(4)]}
    plan = deltafmt.plan_for_target(before.folder, after.folder, **options)
    result = deltafmt.pack(before.folder, after.folder, tmp_path / "d.deltafmt", **options)
    assert plan.size == result.size == (tmp_path / "d.deltafmt").stat().st_size


def test_a_repack_keeps_the_descriptions(tmp_path: Path, sides: tuple[Side, Side]) -> None:
    before, after = sides
    deltafmt.pack(before.folder, after.folder, tmp_path / "hot.deltafmt", method=RTN(4))
    deltafmt.repack(tmp_path / "hot.deltafmt", tmp_path / "cold.deltafmt", profile="cold")
    deltafmt.verify(tmp_path / "cold.deltafmt", before.folder)
