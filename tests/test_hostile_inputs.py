"""Inputs of strangers that are no files, or whose JSON is odd: a line each, and nothing blocks or ends the process."""

from __future__ import annotations

import ast
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import deltafmt
from conftest import Cli, normal, raw, refused, write_folder
from deltafmt import errors, output
from deltafmt.analysis import html
from deltafmt.calibration import tokens
from deltafmt.calibration.text import read_documents
from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.checkpoint.safetensors_file import SafetensorsFile, Tensor
from deltafmt.container import canonical
from deltafmt.container.partial import _RECORD, PartialFile
from deltafmt.errors import InvalidFileError, StorageError, UsageError
from deltafmt.pipeline.pairing import pair_up
from deltafmt.pipeline.plan import find_ties

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a base, a fine-tune and their delta."""
    folder = tmp_path_factory.mktemp("made")
    write_folder(folder / "base", {"a.weight": normal(1, (64, 64))})
    write_folder(folder / "finetuned", {"a.weight": normal(2, (64, 64))})
    deltafmt.pack(folder / "base", folder / "finetuned", folder / "d.deltafmt")
    return folder


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_regular_file_is_refused(made: Path, tmp_path: Path, cli: Cli, kind: str) -> None:
    """Opening a pipe would wait for a writer, and a device has no end."""
    bad = tmp_path / "x.safetensors"
    if kind == "pipe":
        os.mkfifo(bad)
    else:
        bad = Path("/dev/zero")
    named = "it is a pipe" if kind == "pipe" else "it is a device"
    delta, base = made / "d.deltafmt", made / "base"
    for arguments in (
        ["verify", bad],
        ["inspect", bad],
        ["verify", delta, "--base", bad],
        ["unpack", base, bad, "-o", tmp_path / "o"],
        ["pack", base, bad, "-o", tmp_path / "o"],
    ):
        refused(cli(*arguments), 5, f"{named}, not a regular file")
    with pytest.raises(StorageError, match=named):
        read_documents(bad)
    with pytest.raises(StorageError, match=named):
        deltafmt.open(bad, mmap=False)


def test_pipes_inside_a_folder_do_not_block(made: Path, tmp_path: Path, cli: Cli) -> None:
    folder = write_folder(tmp_path / "folder", {"a.weight": normal(1, (64, 64))})
    for name in ("config.json", "tokenizer.json", "notes.txt"):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
    assert cli("pack", made / "base", folder, "-o", tmp_path / "o.deltafmt").code in (0, 2, 3)
    index = tmp_path / "indexed"
    index.mkdir()
    os.mkfifo(index / "model.safetensors.index.json")
    refused(cli("diff", index, index), 5, "not a regular file")


ODD: list[Any] = [None, 5, -1.5, True, "x", "\ud800", "a\0b", [], [[]], ["\ud800"], {}, {"a": []}, "x" * 100_000]


@pytest.mark.parametrize("number", range(len(ODD)))
def test_odd_values_of_configurations_give_a_line(made: Path, tmp_path: Path, cli: Cli, number: int) -> None:
    value = ODD[number]
    keys = (
        *("architectures", "model_type", "tie_word_embeddings", "quantization_config", "num_hidden_layers"),
        *("vocab_size", "auto_map", "torch_dtype", "hidden_size", "text_config", "_name_or_path"),
    )
    folder = write_folder(tmp_path / "f", {"a.weight": normal(2, (64, 64))})
    for at, obj in enumerate([dict.fromkeys(keys, value), value]):
        (folder / "config.json").write_text(json.dumps(obj))
        result = cli("pack", made / "base", folder, "-o", tmp_path / f"{at}.deltafmt", "--force")
        assert result.code == 0 or refused(result, result.code)
        assert "internal error" not in result.err
    (folder / "config.json").unlink()
    for key in ("_class_name", "unet", "vae"):
        (folder / "model_index.json").write_text(json.dumps({key: value, "_diffusers_version": "1"}))
        result = cli("pack", made / "base", folder, "-o", tmp_path / "x.deltafmt", "--force")
        assert "internal error" not in result.err


@pytest.mark.parametrize("number", range(len(ODD)))
def test_odd_weight_maps_give_a_line(tmp_path: Path, cli: Cli, number: int) -> None:
    value = ODD[number]
    folder = tmp_path / "f"
    folder.mkdir()
    for weight_map in (value, {"a": value}, {value if isinstance(value, str) else "b": "x.safetensors"}):
        for obj in ({"weight_map": weight_map}, weight_map):
            (folder / "model.safetensors.index.json").write_text(json.dumps(obj))
            result = cli("diff", folder, folder)
            assert "internal error" not in result.err
            assert len(refused(result, result.code)) < 1500


@pytest.mark.parametrize("number", range(len(ODD)))
def test_odd_adapters_give_a_line(made: Path, tmp_path: Path, cli: Cli, number: int) -> None:
    folder = write_folder(tmp_path / "f", {"base_model.model.a.lora_A.weight": normal(2, (4, 64))})
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["a"]}
    for key in (*config, "modules_to_save", "rank_pattern", "alpha_pattern", "bias", "fan_in_fan_out", "use_dora"):
        (folder / "adapter_config.json").write_text(json.dumps({**config, key: ODD[number]}))
        result = cli("import-lora", made / "base", folder, "-o", tmp_path / "o.deltafmt", "--force")
        assert "internal error" not in result.err
        assert len(result.err) < 1500


@pytest.mark.parametrize(
    "data", [b"\xc1", b"\x91" * 2000, b"\xa5ab", b"\x90", b"\xc0", canonical.encode({"job": None})]
)
def test_a_journal_that_is_no_journal_starts_over(tmp_path: Path, data: bytes) -> None:
    import xxhash

    path = tmp_path / "o.deltafmt"
    record = _RECORD.pack(len(data), xxhash.xxh3_64_intdigest(data)) + data
    good = canonical.encode({"job": b"1"})
    first = _RECORD.pack(len(good), xxhash.xxh3_64_intdigest(good)) + good
    for journal in (record, first + record):
        (tmp_path / ".o.deltafmt.partial.journal").write_bytes(journal)
        (tmp_path / ".o.deltafmt.partial").write_bytes(b"x" * 9000)
        partial = PartialFile(path, b"1")
        assert partial.sections == []
        partial.abandon()


def test_a_panic_of_the_tokenizer_gives_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizers = pytest.importorskip("tokenizers")

    class PanicException(BaseException):
        pass

    def fail(*_: object) -> None:
        raise PanicException("no entry found for key\nnote: run with RUST_BACKTRACE=1")

    monkeypatch.setattr(tokenizers, "Tokenizer", type("Tokenizer", (), {"from_file": staticmethod(fail)}))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match=r"not a tokenizer: no entry found for key$"):
        tokens.load_encoder(tmp_path / "tokenizer.json", None)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenizers, "Tokenizer", type("Tokenizer", (), {"from_file": staticmethod(interrupt)}))
    with pytest.raises(KeyboardInterrupt):
        tokens.load_encoder(tmp_path / "tokenizer.json", None)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.EIO])
def test_a_folder_that_cannot_be_synced_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    if number == errno.EIO:
        with pytest.raises(OSError, match="error"):
            output.sync_folder(tmp_path)
    else:
        output.sync_folder(tmp_path)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP here")
def test_a_terminal_that_closes_is_an_interrupt(cli: Cli, tmp_path: Path) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may ignore it
    cli("inspect", tmp_path)
    assert signal.getsignal(signal.SIGHUP) is signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGHUP)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    cli("inspect", tmp_path)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


TRUNCATED = """
import os, sys
import deltafmt
from deltafmt.checkpoint.safetensors_file import SafetensorsFile
from pathlib import Path
path = Path(sys.argv[1])
size = path.stat().st_size
if path.suffix == ".deltafmt":
    opened = deltafmt.open(path)
    name = opened.keys()[0]
    os.truncate(path, 4096)
    work = [lambda: opened.delta(name), lambda: opened.buffers(name)]
else:
    tensor = next(iter(SafetensorsFile(path).tensors.values()))
    os.truncate(path, 4096)
    work = [tensor.fingerprint, lambda: tensor.head(size), lambda: list(tensor.pieces())]
for each in work:
    try:
        each()
    except deltafmt.errors.DeltafmtError as error:
        print(error)
"""


@pytest.mark.parametrize("name", ["a.deltafmt", "a.safetensors"])
def test_a_file_that_becomes_shorter_while_it_is_mapped_gives_an_error(tmp_path: Path, name: str) -> None:
    """Pages of a map behind the file's end would end the process by SIGBUS."""
    rng = np.random.default_rng(1)
    base = write_folder(tmp_path / "base", {"w": normal(int(rng.integers(99)), (512, 512))})
    path = tmp_path / name
    if name.endswith("safetensors"):
        (base / "model.safetensors").rename(path)
    else:
        other = write_folder(tmp_path / "other", {"w": normal(int(rng.integers(99)), (512, 512))})
        deltafmt.pack(base, other, path)
    done = subprocess.run([sys.executable, "-c", TRUNCATED, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) >= 2
    assert all("shorter" in line for line in lines)


def test_a_page_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.html"
    path.write_text("before")
    monkeypatch.setattr(html, "render", lambda _: "x" * 100)
    with pytest.raises(UsageError, match="exists"):
        html.write(None, path)  # type: ignore[arg-type]

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail)
        with pytest.raises(StorageError, match="no space left"):
            html.write(None, path, force=True)  # type: ignore[arg-type]
    assert (path.read_text(), sorted(os.listdir(tmp_path))) == ("before", ["r.html"])
    html.write(None, path, force=True)  # type: ignore[arg-type]
    assert (path.read_text(), sorted(os.listdir(tmp_path))) == ("x" * 100, ["r.html"])


def test_a_message_has_some_hundred_characters() -> None:
    for kind in (InvalidFileError, UsageError, StorageError):
        message = str(kind("a" * 600 + "\U0001f600" * 10**6 + "the end"))
        assert len(message) <= errors.MAX_MESSAGE
        assert message.startswith("aaa")
        assert message.endswith("the end")
        assert "characters]" in message
    assert str(UsageError("x" * errors.MAX_MESSAGE)) == "x" * errors.MAX_MESSAGE


def test_matrices_that_begin_alike_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of n matrices that share their first bytes, each is read once: comparing pairs would read n * n / 2."""
    many = 40
    rows = {f"w{n:02d}": np.zeros((64, 128), np.float32) for n in range(many)}
    for n, row in enumerate(rows.values()):
        row[-1, -1] = n // 2  # pairs of equal ones
    tensors = {name: raw(row, "F32") for name, row in rows.items()}
    base = write_folder(tmp_path / "base", tensors)
    tuned = write_folder(tmp_path / "tuned", tensors)
    reads: list[str] = []

    def counted(method: Callable[..., Any]) -> Callable[..., Any]:
        def work(self: Tensor, *arguments: Any) -> Any:
            reads.append(self.name)
            return method(self, *arguments)

        return work

    with Checkpoint(base) as a, Checkpoint(tuned) as b:
        pairing = pair_up(a, b)
        monkeypatch.setattr(Tensor, "equals", counted(Tensor.equals))
        monkeypatch.setattr(Tensor, "fingerprint", counted(Tensor.fingerprint))
        ties = find_ties(pairing, b)
    assert ties == {f"w{n:02d}": f"w{n - 1:02d}" for n in range(1, many, 2)}
    assert len(reads) <= 3 * many


CODE = [*(ROOT / "deltafmt").rglob("*.py"), *(ROOT / "tools").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]
CODE += [*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "docs").rglob("*.py")]


def test_every_from_pretrained_trusts_no_code() -> None:
    found = 0
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("from_pretrained"):
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert keywords.get("trust_remote_code") == "False", f"{path}:{node.lineno}"
                found += 1
    assert found >= 7


def test_links_of_small_files_that_leave_the_folder_do_not_travel(made: Path, tmp_path: Path, cli: Cli) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text('{"key": 1}')
    folder = write_folder(tmp_path / "f", {"a.weight": normal(2, (64, 64))})
    (folder / "generation_config.json").symlink_to(secret)
    refused(cli("pack", made / "base", folder, "-o", tmp_path / "o.deltafmt"), 3, "a link that leaves the folder")
    assert SafetensorsFile(folder / "model.safetensors").tensors
