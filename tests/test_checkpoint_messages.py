"""Messages about checkpoints name a cause: an adapter, a pointer, a quantized base, a file that grew."""

from __future__ import annotations

from pathlib import Path

import pytest

import deltafmt
from conftest import Cli, Raw, normal, safetensors_bytes, write_folder
from deltafmt.errors import InvalidFileError, UnsupportedError
from situations import config, llama, model_pair, put, situation, tuned

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab12" * 16 + b"\nsize 2200119864\n"
LORA = {
    f"base_model.model.model.layers.0.mlp.up_proj.lora_{side}.weight": normal(1, shape)
    for side, shape in (("A", (4, 64)), ("B", (128, 4)))
}


@situation("an adapter in the place of a fine-tune")
@pytest.mark.parametrize("how", ["safetensors", "bin", "file", "renamed", "diffusers"])
def test_an_adapter_is_named(tmp_path: Path, how: str, cli: Cli) -> None:
    pair = model_pair(tmp_path)
    folder = tmp_path / "adapter"
    path = folder
    if how == "bin":
        folder.mkdir()
        (folder / "adapter_model.bin").write_bytes(b"PK")
    elif how == "diffusers":
        path = put(folder, "pytorch_lora_weights.safetensors", {"unet.to_q.lora.up.weight": normal(1, (8, 4))})
    else:
        name = "model.safetensors" if how == "renamed" else "adapter_model.safetensors"
        put(folder, name, LORA)
        path = folder / name if how == "file" else folder
    if how in ("bin", "safetensors"):
        (folder / "adapter_config.json").write_text("{}")
    for command in (
        ("pack", pair.base, path, "-o", tmp_path / "d"),
        ("analyze", pair.base, path),
        ("diff", path, path),
    ):
        found = cli(*command)
        assert found.code == 3
        assert f"{path}: this is an adapter, not a model; import-lora makes a delta file of it" in found.err


@situation("an adapter beside weights that are the base's")
def test_an_adapter_that_is_not_merged_is_not_lost(tmp_path: Path) -> None:
    pair = model_pair(tmp_path, llama())
    deltafmt.pack(pair.base, pair.finetuned, tmp_path / "d.deltafmt")
    put(pair.finetuned, "adapter_model.safetensors", LORA, adapter_config=b"{}")
    with pytest.raises(InvalidFileError, match=r"its weights are the base's, and the adapter .* is not merged"):
        deltafmt.pack(pair.base, pair.finetuned, tmp_path / "e.deltafmt")
    assert not list(tmp_path.glob("*e.deltafmt*"))


@situation("a Git LFS pointer, an HTML page, an empty or a cut file in the place of weights")
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (LFS, r"a Git LFS pointer, not the file of 2,200,119,864 bytes; git lfs pull brings the file"),
        (b"<!doctype html><html><body>401</body></html>", "an HTML page, not weights; the download was refused"),
        (b"", "the file is empty; the download has not begun"),
        (b"GGUF" + bytes(100), "a GGUF file, not a safetensors file; convert it"),
        (b"\x80\x04\x95" + bytes(100), "a pickle, not a safetensors file; convert it"),
        (safetensors_bytes(llama())[:60], "longer than the file: the download is incomplete"),
        (safetensors_bytes(llama())[:-10], "it may be truncated"),
    ],
    ids=["pointer", "html", "empty", "gguf", "pickle", "header", "cut"],
)
def test_what_stands_in_the_place_of_weights(tmp_path: Path, data: bytes, words: str) -> None:
    pair = model_pair(tmp_path)
    (pair.finetuned / "model.safetensors").write_bytes(data)
    for side in ((pair.base, pair.finetuned), (pair.finetuned, pair.base)):
        with pytest.raises(InvalidFileError, match=rf"model\.safetensors: .*{words}"):
            deltafmt.pack(*side, tmp_path / "d.deltafmt")


def test_a_pointer_in_the_place_of_an_index(tmp_path: Path) -> None:
    pair = model_pair(tmp_path)
    (pair.finetuned / "model.safetensors").unlink()
    (pair.finetuned / "model.safetensors.index.json").write_bytes(LFS)
    with pytest.raises(InvalidFileError, match=r"index\.json: this is a Git LFS pointer"):
        deltafmt.pack(pair.base, pair.finetuned, tmp_path / "d.deltafmt")


@situation("weights that cannot be read (`pytorch_model.bin`, `.gguf`), also beside a stale index")
def test_weights_of_other_formats(tmp_path: Path) -> None:
    pair = model_pair(tmp_path)
    (pair.finetuned / "model.safetensors").rename(pair.finetuned / "pytorch_model.BIN")
    with pytest.raises(InvalidFileError, match=r"pytorch_model\.BIN cannot be read, convert it to safetensors"):
        deltafmt.pack(pair.base, pair.finetuned, tmp_path / "d.deltafmt")
    index = b'{"weight_map": {"w": "model-00001-of-00001.safetensors"}}'
    (pair.finetuned / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(deltafmt.errors.StorageError, match=r"model-00001-of-00001.* is missing.*BIN, which cannot be"):
        deltafmt.pack(pair.base, pair.finetuned, tmp_path / "d.deltafmt")


def fp8(tensors: dict[str, Raw], scales: bool = True) -> dict[str, Raw]:
    """Return tensors whose projections are codes of 8 bits, with scales beside them."""
    found = {}
    for name, tensor in tensors.items():
        found[name] = tensor
        if name.endswith("_proj.weight"):
            found[name] = Raw("F8_E4M3", tensor.shape, bytes(range(64)) * tensor.rows)
            if scales:
                found[f"{name}_scale_inv"] = normal(1, (1, 1), "F32")
    return found


@situation("`--quantized exact`: a base of FP8, and a fine-tune that is not")
def test_a_quantized_base_is_named(tmp_path: Path, cli: Cli) -> None:
    settings = {"quantization_config": {"quant_method": "fp8"}}
    base = write_folder(tmp_path / "base", fp8(llama()), files={"config.json": config(**settings)})
    finetuned = write_folder(tmp_path / "ft", tuned(llama()), files={"config.json": config()})
    result = deltafmt.pack(base, finetuned, tmp_path / "d.deltafmt", quantized="exact")
    assert result.kept["model.layers.0.mlp.up_proj.weight"] == "the base's dtype F8_E4M3"
    assert all(name.endswith("_scale_inv") for name in result.removed)
    assert result.remarks == [
        (
            "the base is quantized: there is no delta to the codes of 6 of its matrices, "
            "so the fine-tune's are stored whole"
        )
    ]
    found = cli("pack", base, finetuned, "-o", tmp_path / "e.deltafmt", "--quantized", "exact", "--json")
    assert found.json()["remarks"] == result.remarks
    assert f"deltafmt: {result.remarks[0]}" in found.err


def test_a_quantized_pair_is_named_and_comes_back(tmp_path: Path) -> None:
    a = fp8(llama())
    b = fp8(tuned(llama()))
    b["model.layers.0.mlp.up_proj.weight"] = Raw("F8_E4M3", (128, 64), bytes(64 * 128))
    base, finetuned = write_folder(tmp_path / "base", a), write_folder(tmp_path / "ft", b)
    result = deltafmt.pack(base, finetuned, tmp_path / "d.deltafmt", quantized="exact")
    assert result.remarks[0].startswith("the fine-tune is quantized: 3 tensors of codes and scales are packed as")
    assert result.kept["model.layers.0.mlp.up_proj.weight"] == "codes of a quantizer, or a part of them"


@situation("codes of another quantizer on either side: GPTQ, AWQ, bitsandbytes, ...")
def test_a_base_of_other_tensors_names_the_quantizer(tmp_path: Path) -> None:
    codes = {name.replace(".weight", ".qweight"): Raw("I32", (8, 64), bytes(2048)) for name in llama()}
    base = write_folder(
        tmp_path / "base", codes, files={"config.json": config(quantization_config={"quant_method": "gptq"})}
    )
    finetuned = write_folder(tmp_path / "ft", tuned(llama()), files={"config.json": config()})
    for sides in ((base, finetuned), (finetuned, base)):
        with pytest.raises(
            UnsupportedError, match=r"base: its weights are codes of GPTQ.*; give the checkpoint that was"
        ):
            deltafmt.pack(*sides, tmp_path / "d.deltafmt")


@situation("a delta file that is larger than the fine-tune")
def test_a_file_that_grew_is_larger(tmp_path: Path, cli: Cli) -> None:
    base = write_folder(tmp_path / "base", {"w": normal(1, (4, 4))})
    finetuned = write_folder(tmp_path / "ft", {"w": normal(2, (4, 4))})
    said = cli("pack", base, finetuned, "-o", tmp_path / "d.deltafmt").out
    assert "times larger than" in said
    assert "times smaller" not in said
    assert "times larger than" in cli("inspect", tmp_path / "d.deltafmt").out
