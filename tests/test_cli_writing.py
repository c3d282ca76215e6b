"""Outputs of the command line: existing files, full disks, missing folders; nothing is lost or half-written."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import deltafmt
from conftest import (
    Cli,
    Pair,
    Result,
    refused,
    small_tensors,
    write_pair,
)


def test_an_output_that_exists(tmp_path: Path, cli: Cli, small: Pair, delta: Path) -> None:
    file = tmp_path / "old.deltafmt"
    file.write_bytes(b"old")
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "mine.txt").write_text("old")
    (folder / "model.safetensors").write_text("old")
    pack = ("pack", small.base, small.finetuned, "-o", file)
    repack = ("repack", delta, "-o", file, "--profile", "cold")
    unpack = ("unpack", small.base, delta, "-o", folder)
    for arguments in (pack, repack, unpack):
        refused(cli(*arguments), 2, str(arguments[arguments.index("-o") + 1]), "exists; --force replaces it")
        assert file.read_bytes() == b"old"
        assert (folder / "mine.txt").read_text() == "old"
    for arguments in (pack, repack, unpack):
        assert cli(*arguments, "--force").code == 0
    assert cli("verify", file).code == 0
    assert not (folder / "mine.txt").exists()
    assert (folder / "model.safetensors").exists()
    # A folder is no file, and a file is no folder, forced or not.
    for force in ((), ("--force",)):
        refused(cli("pack", small.base, small.finetuned, "-o", folder, *force), 2, str(folder))
        refused(cli("repack", delta, "-o", folder, "--profile", "hot", *force), 2, str(folder))
        refused(cli("unpack", small.base, delta, "-o", file, *force), 2, str(file))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "old.deltafmt"]


def test_force_replaces_outputs_and_nothing_else(tmp_path: Path, cli: Cli, small: Pair, delta: Path) -> None:
    notes, nested = tmp_path / "notes", tmp_path / "nested"
    notes.mkdir()
    (notes / "thesis.tex").write_text("mine")
    (nested / "sub").mkdir(parents=True)
    (nested / "model.safetensors").write_text("old")
    for folder, what in ((notes, "not a checkpoint"), (nested, "holds the folder sub")):
        refused(cli("unpack", small.base, delta, "-o", folder, "--force"), 2, str(folder), what)
    assert (notes / "thesis.tex").read_text() == "mine"
    assert (nested / "sub").is_dir()
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    refused(cli("pack", small.base, small.finetuned, "-o", fifo, "--force"), 2, "not a regular file")
    assert fifo.is_fifo()


def test_a_dangling_link_is_an_output_that_exists(tmp_path: Path, cli: Cli, small: Pair, delta: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "target")
    refused(cli("pack", small.base, small.finetuned, "-o", link), 2, "link exists")
    refused(cli("unpack", small.base, delta, "-o", link), 2, "link exists")


def test_an_output_in_a_missing_folder(tmp_path: Path, cli: Cli, small: Pair, delta: Path) -> None:
    out = tmp_path / "missing" / "o"
    for arguments in (
        ("pack", small.base, small.finetuned, "-o", out),
        ("repack", delta, "-o", out, "--profile", "hot"),
        ("unpack", small.base, delta, "-o", out),
    ):
        refused(cli(*arguments), 5, "no such folder", str(tmp_path / "missing"))
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_an_input(tmp_path: Path, cli: Cli) -> None:
    pair = write_pair(tmp_path, *small_tensors())
    delta = tmp_path / "d.deltafmt"
    assert cli("pack", pair.base, pair.finetuned, "-o", delta).code == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    link = tmp_path / "link.deltafmt"
    link.symlink_to(delta)
    for out in (
        pair.base / "model.safetensors",
        pair.finetuned / "model.safetensors",
        pair.finetuned / "config.json",
        tmp_path / "ft" / ".." / "base" / "model.safetensors",
    ):
        for force in ((), ("--force",)):
            refused(cli("pack", pair.base, pair.finetuned, "-o", out, *force), 2, "input")
    for force in ((), ("--force",)):
        refused(cli("repack", delta, "-o", delta, "--profile", "cold", *force), 2, "itself the input")
        refused(cli("repack", delta, "-o", link, "--profile", "cold", *force), 2, "itself the input")
        refused(cli("unpack", pair.base, delta, "-o", pair.base, *force), 2)
        refused(cli("unpack", pair.base, delta, "-o", tmp_path, *force), 2)
    assert {path: path.read_bytes() for path in before} == before
    assert not list(tmp_path.rglob("*partial*"))


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
from deltafmt.tools.main import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("command", ["pack", "repack", "unpack"])
@pytest.mark.parametrize("limit", [0, 100, 9000])
def test_a_file_that_may_not_grow(tmp_path: Path, small: Pair, delta: Path, command: str, limit: int) -> None:
    """Every process may be limited in the size of its files; the error is that of a full disk but for its name."""
    source = tmp_path / "in.deltafmt"
    source.write_bytes(delta.read_bytes())
    arguments = {
        "pack": ("pack", small.base, small.finetuned, "-o", tmp_path / "out"),
        "repack": ("repack", source, "-o", tmp_path / "out", "--profile", "hot"),
        "unpack": ("unpack", small.base, source, "-o", tmp_path / "out"),
    }[command]
    done = subprocess.run(
        [sys.executable, "-B", "-W", "error", "-c", LIMITED, str(limit), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        # The limit would hold for what coverage writes as well.
        env={name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")},
    )
    reason = os.strerror(errno.EFBIG).lower()
    refused(Result(done.returncode, done.stdout, done.stderr), 5, f"cannot write {tmp_path / 'out'}", reason)
    assert list(tmp_path.iterdir()) == [source]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """Give a file system of 16 KiB, which only root can make."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no right to mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(tmp_path: Path, tiny_disk: Path, cli: Cli, small: Pair, delta: Path) -> None:
    out = tiny_disk / "out"
    reason = os.strerror(errno.ENOSPC).lower()
    for arguments in (
        ("pack", small.base, small.finetuned, "-o", out),
        ("repack", delta, "-o", out, "--profile", "hot"),
        ("unpack", small.base, delta, "-o", out),
    ):
        refused(cli(*arguments), 5, f"cannot write {out}", reason)
        assert list(tiny_disk.iterdir()) == []


def test_a_device_that_is_always_full(small: Pair) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    command = [sys.executable, "-m", "deltafmt", "pack", str(small.base), str(small.finetuned), "-o", "-"]
    with full.open("wb") as sink:
        done = subprocess.run(command, stdout=sink, stderr=subprocess.PIPE, text=True, check=False)
    refused(Result(done.returncode, "", done.stderr), 5, os.strerror(errno.ENOSPC).lower())


@pytest.mark.parametrize(("closed", "code"), [("1", 5), ("2", 0), ("0", 0)])
def test_standard_streams_that_the_caller_has_closed(tmp_path: Path, small: Pair, closed: str, code: int) -> None:
    """A file that is opened next would be the stream; the command ended with an internal error."""
    out = tmp_path / "d.deltafmt"
    command = ["sh", "-c", f'exec "$@" {closed}>&-', "sh", sys.executable, "-m", "deltafmt"]
    command += ["pack", str(small.base), str(small.finetuned), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert done.stderr == ("" if code == 0 else f"deltafmt: {os.strerror(errno.EBADF).lower()}\n")
    whole = tmp_path / "again.deltafmt"
    deltafmt.pack(small.base, small.finetuned, whole)
    assert out.read_bytes() == whole.read_bytes()
