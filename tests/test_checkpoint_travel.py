"""What travels beside the weights is decided by what the files are; patterns decide otherwise."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest

import deltafmt
from conftest import Cli, Pair, normal, read_folder, safetensors_bytes, write_folder
from deltafmt.checkpoint import secret_files
from deltafmt.checkpoint.file_kinds import kind_of
from deltafmt.errors import InvalidFileError, Remedy, UsageError
from situations import config, files_of, llama, model_pair, near, put, round_trip, situation, tuned

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab12" * 16 + b"\nsize 17210019\n"
PICKLE = pickle.dumps({"state": [1, 2, 3]})


def torch_file() -> bytes:
    """Return what torch.save writes: a zip archive with a pickle in it."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", PICKLE)
    return out.getvalue()


def packed(pair: Pair, folder: Path, **options: object) -> tuple[set[str], dict[str, str]]:
    """Pack; return the names of the files that travel, and why others do not."""
    result = deltafmt.pack(pair.base, pair.finetuned, folder / "d.deltafmt", force=True, **options)  # type: ignore[arg-type]
    with deltafmt.open(folder / "d.deltafmt") as opened:
        assert list(opened.container.attachments) == sorted(result.attached)
    return set(result.attached), result.left_out


def with_files(folder: Path, files: dict[str, bytes]) -> Pair:
    """Write a pair whose fine-tune has further files."""
    pair = model_pair(folder)
    for name, data in files.items():
        (pair.finetuned / name).parent.mkdir(parents=True, exist_ok=True)
        (pair.finetuned / name).write_bytes(data)
    return pair


TRAVELS = {
    "chat_template.jinja": b"{{ messages }}\n",
    "tokenizer_config.json": b"{}",
    "tokenizer.json": b"[" + b"1," * 1_000_000 + b"1]",  # tokenizers are large, and loaders need them
    "tokenizer.model": b"\x00\x01sp",
    "sentencepiece.bpe.model": b"\x0a\x00\xff",
    "added_tokens.json": b"{}",
    "special_tokens_map.json": b"{}",
    "generation_config.json": b"{}",
    "preprocessor_config.json": b"{}",
    "README.md": b"---\nlicense: mit\n---\n",
    "LICENSE": b"text",
    "vocab.json": b"{}",
    "merges.txt": b"",
    "notes ü.txt": b"x",
    "说明.md": b"text",
    "trainer_state.json": b"{}",
    "figure.png": b"\x89PNG\r\n\x1a\n\x00\x00",
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
}


@situation("tokenizer, chat template, processor, generation config, model card, names beyond ASCII")
def test_what_a_loader_reads_travels(tmp_path: Path) -> None:
    pair = with_files(tmp_path, TRAVELS)
    result, out = round_trip(pair.base, pair.finetuned, tmp_path / "o")
    assert set(result.attached) == {*TRAVELS, "config.json"}
    assert result.left_out == {}
    for name, data in TRAVELS.items():
        assert (out / name).read_bytes() == data


STAYS = {
    "optimizer.pt": (PICKLE, "weights or of a trainer's state"),
    "optimizer.pt.tmp": (PICKLE, "weights or of a trainer's state"),
    "rng_state.PTH": (PICKLE, "weights or of a trainer's state"),
    "training_args.BIN": (PICKLE, "weights or of a trainer's state"),
    "__0_0.distcp": (torch_file(), "weights or of a trainer's state"),
    "model.dill": (PICKLE, "weights or of a trainer's state"),
    "vocab.joblib": (PICKLE, "weights or of a trainer's state"),
    "tokenizer.pkl": (PICKLE, "weights or of a trainer's state"),
    "dataloader_state": (PICKLE, "a pickle"),
    "vocab.txt": (pickle.dumps({"a": 1}, protocol=0), "a pickle"),
    "optimizer_state": (torch_file(), "a PyTorch file"),
    "tokenizer.model": (torch_file(), "a PyTorch file"),
    "spare": (safetensors_bytes({"w": normal(1, (4, 4))}), "a safetensors file"),
    "array.dat": (b"\x93NUMPY\x01\x00", "a numpy array"),
    "cache": (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    "some.zip": (b"PK\x03\x04" + bytes(40), "a zip archive"),
    "events.out.tfevents.1700000000.host": (os.urandom(64), "a log"),
    "train.log": (b"x", "a log"),
    "scheduler.state": (b"text", "a trainer's state"),
    "latest": (b"global_step500", "a trainer's state"),
    "zero_to_fp32.py": (b"# script\n", "code"),
    "run.SH": (b"echo\n", "code"),
    "data.bin.index.json": (b"{}", "weights or of a trainer's state"),
    "data.txt": (b"x" * (1024 * 1024 + 1), "files above a megabyte travel only when asked for"),
    "blob": (b"\x00\x01\x02\xff" * 10, "a binary file of unknown purpose"),
    "secrets.txt": (b"x", "looks like a secret"),
    "hf_token": (b"x", "looks like a secret"),
    "server.key": (b"x", "looks like a secret"),
    "notes.md": (b"use hf_" + b"a" * 34, "what looks like a key or an access token"),
    "special_tokens_map.json": (LFS, "a Git LFS pointer"),
    "README.md": (b"<!DOCTYPE html><html>", "an HTML page"),
    "COM1.txt": (b"x", "not allowed on every system"),
    "a:b.txt": (b"x", "not allowed on every system"),
    "model.fp16.safetensors": (safetensors_bytes(llama()), "weights that the model's loader does not read"),
}


@situation("pickles and weights under any name, a trainer's states, logs, code, secrets, large and binary files")
def test_what_is_no_part_of_the_model_stays(tmp_path: Path, cli: Cli) -> None:
    pair = with_files(tmp_path, {name: data for name, (data, _) in STAYS.items()})
    files, left_out = packed(pair, tmp_path)
    assert files == {"config.json"}
    assert left_out.keys() == STAYS.keys()
    for name, (_, why) in STAYS.items():
        assert why in left_out[name], name
    said = cli("pack", pair.base, pair.finetuned, "-o", tmp_path / "e.deltafmt")
    assert "attached: config.json" in said.out.splitlines()
    for name in STAYS:
        assert f"{name} does not travel with the delta: " in said.err
    made = cli("pack", pair.base, pair.finetuned, "-o", tmp_path / "f.deltafmt", "--json").json()
    assert (made["attached"], made["left_out"].keys()) == (["config.json"], STAYS.keys())


def test_no_pickle_is_ever_loaded(tmp_path: Path) -> None:
    marker = tmp_path / "loaded"

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(marker),)

    pair = with_files(tmp_path, {"state": pickle.dumps(Trap()), "old": pickle.dumps(Trap(), protocol=0)})
    assert packed(pair, tmp_path)[0] == {"config.json"}
    assert not marker.exists()


@situation("hidden files, such as `.gitattributes`")
def test_hidden_files_never_travel(tmp_path: Path) -> None:
    pair = with_files(tmp_path, {".gitattributes": b"x", ".env": b"TOKEN=abc", ".cache/huggingface/x": b"x"})
    files, left_out = packed(pair, tmp_path)
    assert files == {"config.json"}
    hidden = "hidden files never travel"
    assert left_out == {".env": f"it looks like a secret; {hidden}", ".gitattributes": hidden}
    (pair.finetuned / ".more").mkdir()
    assert packed(pair, tmp_path)[1] == {**left_out, ".more/": hidden}
    with pytest.raises(UsageError, match=r"attach pattern '\.env' takes no file"):
        packed(pair, tmp_path, attach=[".env"])


@situation("a model's own code that config.json names (`auto_map`)")
def test_declared_code_travels(tmp_path: Path) -> None:
    files = {"configuration_x.py": b"class C: ...\n", "modeling_x.py": b"import math\n", "train.py": b"x = 1\n"}
    pair = with_files(tmp_path, files)
    assert packed(pair, tmp_path)[0] == {"config.json"}
    (pair.finetuned / "config.json").write_bytes(config(auto_map={"AutoConfig": "configuration_x.XConfig"}))
    found, left_out = packed(pair, tmp_path)
    assert found == {"config.json", "configuration_x.py", "modeling_x.py"}
    assert left_out == {"train.py": "code"}
    elsewhere = {"AutoConfig": "somebody/model--configuration_x.XConfig"}
    (pair.finetuned / "config.json").write_bytes(config(auto_map=elsewhere))
    assert packed(pair, tmp_path)[0] == {"config.json"}


def test_code_is_written_unless_it_could_be_taken_for_a_module(tmp_path: Path, cli: Cli) -> None:
    code = {"configuration_x.py": b"class C: ...\n", "json.py": b"import os\n", "numpy/random.py": b"x = 1\n"}
    pair = with_files(tmp_path, code)
    own = tmp_path / "own.deltafmt"
    deltafmt.pack(pair.base, pair.finetuned, own, attach=["configuration_x.py"])
    done = cli("unpack", pair.base, own, "-o", tmp_path / "a")
    assert done.code == 0 and "code, written: configuration_x.py" in done.out  # noqa: PT018
    assert (tmp_path / "a" / "configuration_x.py").read_bytes() == code["configuration_x.py"]
    delta = tmp_path / "d.deltafmt"
    deltafmt.pack(pair.base, pair.finetuned, delta, attach=list(code))
    refusal = cli("unpack", pair.base, delta, "-o", tmp_path / "b")
    assert refusal.code == 2
    assert "modules that this Python has: json.py, numpy/random.py; --code write writes it all the same" in refusal.err
    assert not (tmp_path / "b").exists()
    assert deltafmt.unpack(pair.base, delta, tmp_path / "b", code="write").code == sorted(code)
    assert all((tmp_path / "b" / name).read_bytes() == data for name, data in code.items())
    assert deltafmt.unpack(pair.base, delta, tmp_path / "c", code="leave").files == ["config.json"]
    with pytest.raises(UsageError, match="code 'all' is not one of write, leave"):
        deltafmt.unpack(pair.base, delta, tmp_path / "e", code="all")


@situation("`--attach` and `--no-attach`")
def test_patterns_decide(tmp_path: Path, cli: Cli) -> None:
    files = {"train.py": b"x = 1\n", "big.txt": b"x" * 2_000_000, "assets/a.txt": b"a", "assets/b/c.txt": b"c"}
    pair = with_files(tmp_path, files | {"README.md": b"x", "optimizer.pt": PICKLE})
    assert packed(pair, tmp_path)[0] == {"config.json", "README.md"}
    found, left_out = packed(pair, tmp_path, attach=["*.py", "big.txt", "assets/*"], no_attach=["README*"])
    assert found == {"config.json", *files}
    assert left_out.keys() == {"optimizer.pt"}
    assert packed(pair, tmp_path, attach=["assets/*"], no_attach=["assets/b*"])[0] == {
        *("config.json", "README.md", "assets/a.txt"),
    }
    assert packed(pair, tmp_path, no_attach=["*"])[0] == set()
    for options, words in (
        ({"attach": ["nothing*"]}, r"attach pattern 'nothing\*' matches no file"),
        ({"attach": ["optimizer.pt"]}, r"takes no file of .*: optimizer\.pt is a file of weights"),
        ({"no_attach": ["nothing"]}, "no-attach pattern 'nothing' matches no file"),
    ):
        with pytest.raises(UsageError, match=words):
            packed(pair, tmp_path, **options)
    with pytest.raises(UsageError, match="is a file, and the patterns choose files of a folder"):
        deltafmt.pack(pair.base, pair.finetuned / "model.safetensors", tmp_path / "e.deltafmt", attach=["*"])
    made = cli(
        "pack", pair.base, pair.finetuned, "-o", tmp_path / "g.deltafmt", "--attach", "*.py", "--no-attach", "R*"
    )
    assert "attached: config.json, train.py" in made.out.splitlines()


def embedder(folder: Path, tensors: dict[str, object], seed: int) -> dict[str, object]:
    """Make a folder of sentence-transformers of a model's folder; return the tensors of its dense layer."""
    dense = {"linear.weight": normal(seed, (128, 64)), "linear.bias": normal(seed + 1, (128,))}
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense")]
    listed = [{"idx": n, "name": str(n), "path": path, "type": kind} for n, (path, kind) in enumerate(modules)]
    put(folder, "model.safetensors", tensors, config=config(), modules=json.dumps(listed).encode())  # type: ignore[arg-type]
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    put(folder / "2_Dense", "model.safetensors", dense, config=b'{"out_features": 128}')
    return dense  # type: ignore[return-value]


@situation("the modules of sentence-transformers (`1_Pooling/`, `2_Dense/`)")
def test_the_modules_of_an_embedder_travel(tmp_path: Path, cli: Cli) -> None:
    a = llama()
    before = embedder(tmp_path / "base", a, 50)
    after = embedder(tmp_path / "ft", tuned(a), 60)
    result, out = round_trip(tmp_path / "base", tmp_path / "ft", tmp_path / "o")
    assert files_of(out) == files_of(tmp_path / "ft")
    assert {"1_Pooling/config.json", "2_Dense/config.json"} <= set(result.attached)
    found = read_folder(out / "2_Dense")
    assert all(near(found[name], after[name], before[name]) for name in after)  # type: ignore[arg-type]
    delta = tmp_path / "o" / "d.deltafmt"
    assert "1_Pooling/config.json" in cli("inspect", delta).out
    assert "1_Pooling/config.json" in cli("verify", delta, "--json").json()["attached"]
    # The output of an earlier run is replaced, with its folders.
    assert cli("unpack", tmp_path / "base", delta, "-o", out, "--force").code == 0
    (out / "extra").mkdir()
    assert cli("unpack", tmp_path / "base", delta, "-o", out, "--force").code == 2


def test_a_module_that_cannot_be_read_is_refused_or_left_out_and_said(tmp_path: Path) -> None:
    a = llama()
    embedder(tmp_path / "base", a, 50)
    embedder(tmp_path / "ft", tuned(a), 60)
    (tmp_path / "ft" / "2_Dense" / "model.safetensors").unlink()
    (tmp_path / "ft" / "2_Dense" / "pytorch_model.bin").write_bytes(PICKLE)
    with pytest.raises(InvalidFileError, match=r"2_Dense: .*pytorch_model\.bin cannot be read") as caught:
        deltafmt.pack(tmp_path / "base", tmp_path / "ft", tmp_path / "d.deltafmt")
    assert caught.value.remedy == Remedy("no_attach", "2_Dense/*")
    result = deltafmt.pack(tmp_path / "base", tmp_path / "ft", tmp_path / "d.deltafmt", no_attach=["2_Dense/*"])
    assert result.removed == ["2_Dense/linear.bias", "2_Dense/linear.weight"]
    assert "2_Dense/config.json" not in result.attached
    assert "1_Pooling/config.json" in result.attached


def test_modules_of_the_base_alone_are_not_missed(tmp_path: Path) -> None:
    a = llama()
    embedder(tmp_path / "base", a, 50)
    finetuned = write_folder(tmp_path / "ft", tuned(a), files={"config.json": config()})
    result = deltafmt.pack(tmp_path / "base", finetuned, tmp_path / "d.deltafmt")
    assert result.removed == ["2_Dense/linear.bias", "2_Dense/linear.weight"]


@situation("`adapter_config.json` beside merged weights")
def test_an_adapters_files_stay_behind_beside_merged_weights(tmp_path: Path) -> None:
    lora = safetensors_bytes({"base_model.model.q.lora_A.weight": normal(1, (4, 64))})
    pair = with_files(tmp_path, {"adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.safetensors": lora})
    files, left_out = packed(pair, tmp_path)
    assert files == {"config.json"}
    assert "a loader would apply the adapter again" in left_out["adapter_config.json"]
    assert "an adapter's weights" in left_out["adapter_model.safetensors"]


@situation("a link that leaves the folder")
def test_links_that_leave_the_folder_are_refused(tmp_path: Path, cli: Cli) -> None:
    pair = with_files(tmp_path, {"inner.txt": b"inner"})
    (tmp_path / "outside.txt").write_text("private")
    (pair.finetuned / "link.txt").symlink_to("inner.txt")
    assert packed(pair, tmp_path)[0] == {"config.json", "inner.txt", "link.txt"}
    for target in ("../outside.txt", str(tmp_path / "outside.txt")):
        link = pair.finetuned / "notes.txt"
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        with pytest.raises(
            InvalidFileError, match=r"notes\.txt is a link that leaves the folder, to .*outside"
        ) as caught:
            packed(pair, tmp_path)
        assert caught.value.remedy == Remedy("no_attach", "notes.txt")
    refusal = cli("pack", pair.base, pair.finetuned, "-o", tmp_path / "e.deltafmt")
    assert (refusal.code, refusal.err.count("--no-attach notes.txt leaves it out")) == (3, 1)
    assert "notes.txt" not in packed(pair, tmp_path, no_attach=["notes.txt"])[0]
    assert "notes.txt" in packed(pair, tmp_path, attach=["notes.txt"])[0]
    (pair.finetuned / "notes.txt").unlink()
    (pair.finetuned / "gone.txt").symlink_to("nowhere.txt")
    assert packed(pair, tmp_path)[1] == {"gone.txt": "a link that leads nowhere"}
    # A link to weights would not travel anyway.
    (pair.finetuned / "pytorch_model.bin").symlink_to("../outside.txt")
    assert "pytorch_model.bin" in packed(pair, tmp_path)[1]
    # Nobody packs the base's small files, so its links do not matter.
    (pair.base / "notes.txt").symlink_to("../outside.txt")
    packed(pair, tmp_path)


@situation("a snapshot of the hub's cache, whose files are links to `../../blobs`")
def test_a_snapshot_of_the_hubs_cache(tmp_path: Path) -> None:
    pair = model_pair(tmp_path)
    cache = tmp_path / "models--org--name"
    snapshot = cache / "snapshots" / "0123abcd"
    for folder in (cache / "blobs", snapshot / "additional_chat_templates"):
        folder.mkdir(parents=True)
    files = {path.name: path.read_bytes() for path in pair.finetuned.iterdir()}
    files["additional_chat_templates/x.jinja"] = b"{{ x }}"
    for number, (name, data) in enumerate(files.items()):
        (cache / "blobs" / f"{number:064x}").write_bytes(data)
        up = "../" * (2 + name.count("/"))
        (snapshot / name).symlink_to(f"{up}blobs/{number:064x}")
    result, out = round_trip(pair.base, snapshot, tmp_path / "o")
    assert set(result.attached) == {"config.json", "additional_chat_templates/x.jinja"}
    assert not any(path.is_symlink() for path in out.rglob("*"))
    with pytest.raises(InvalidFileError, match=r"name the folder snapshots/REVISION"):
        deltafmt.pack(pair.base, cache, tmp_path / "e.deltafmt")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "x").write_text("another cache's")
    (snapshot / "notes.txt").symlink_to(tmp_path / "blobs" / "x")
    with pytest.raises(InvalidFileError, match=r"notes\.txt is a link that leaves the folder"):
        deltafmt.pack(pair.base, snapshot, tmp_path / "e.deltafmt")


def test_kinds_of_files_by_their_bytes() -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert kind_of(pickle.dumps({"a": [1.5]}, protocol=protocol), whole=True) == "a pickle"
    assert kind_of(torch_file()) == "a PyTorch file"
    for text in (b"", b"{}", b"(see below).", b"N.", b"I am a text.", b"cat sat on\na mat.", b"c\n", b"\x80abc"):
        assert kind_of(text, whole=True) == ""


def test_names_and_contents_of_secrets() -> None:
    for name in (".env", "prod.env", "id_rsa", "ID_ED25519.pub", "api_key.txt", "token", "my-secrets.json", "a.pem"):
        assert secret_files.by_name(name), name
    for name in (
        "added_tokens.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "keyboard.txt",
        "monkey.md",
        "env.md",
    ):
        assert not secret_files.by_name(name), name
    assert secret_files.by_content(b"-----BEGIN OPENSSH PRIVATE KEY-----")
    assert not secret_files.by_content(b"hf_short and sk-short and ordinary text")


def test_a_link_that_leads_round_in_a_circle_is_named(tmp_path: Path) -> None:
    pair = with_files(tmp_path, {"a.json": b"{}"})
    (pair.finetuned / "loop").symlink_to("loop")
    assert packed(pair, tmp_path) == ({"a.json", "config.json"}, {"loop": "a link that leads nowhere"})
