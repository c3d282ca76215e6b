"""``apply --in-place``: the folder is the old state or the new one, and all else that lies in it stays."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest

import deltafmt
from conftest import Cli, Tensors, normal, nudge, read_folder, refused, write_folder
from deltafmt.checkpoint import folder_writer, in_place
from deltafmt.errors import StorageError, UsageError, WrongBaseError
from deltafmt.methods import RTN, Exact
from deltafmt.output import OutputLock
from deltafmt.pipeline.unpack import check_read

FILES = {"config.json": b"{}", "README.md": b"mine"}


def tree(folder: Path) -> dict[str, bytes | str]:
    """Return all that lies below a folder: bytes of files, targets of links."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else "a folder"
    return found


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give versions ``v0``, ``v1`` and ``v2``, and exact deltas ``d1`` and ``d2``; ``v1`` is cut into shards."""
    folder = tmp_path_factory.mktemp("inputs")
    tensors: Tensors = {f"layers.{number}.weight": normal(number, (24, 32)) for number in range(4)}
    for number in range(3):
        names = list(tensors)
        shards = [names[:2], names[2:]] if number == 1 else None
        write_folder(folder / f"v{number}", tensors, shards, {"config.json": b'{"v": %d}' % number})
        if number:
            parent = folder / "d1.deltafmt" if number == 2 else None
            before, after, out = folder / f"v{number - 1}", folder / f"v{number}", folder / f"d{number}.deltafmt"
            deltafmt.pack(before, after, out, method=Exact(), parent=parent)
        tensors = {name: nudge(tensor, number, scale=0.01) for name, tensor in tensors.items()}
    return folder


@pytest.fixture
def model(inputs: Path, tmp_path: Path) -> Path:
    """Give a copy of ``v0`` with files of its own beside the weights."""
    shutil.copytree(inputs / "v0", tmp_path / "model")
    (tmp_path / "model" / "runs" / "first").mkdir(parents=True)
    (tmp_path / "model" / "runs" / "first" / "log.txt").write_text("log")
    (tmp_path / "model" / "README.md").write_text("mine")
    (tmp_path / "model" / ".hidden").write_text("hidden")
    (tmp_path / "model" / "link").symlink_to("README.md")
    (tmp_path / "model" / "nowhere").symlink_to("../gone")
    return tmp_path / "model"


def test_weights_are_replaced_and_all_else_stays(inputs: Path, model: Path) -> None:
    before, inode = tree(model), (model / "runs" / "first" / "log.txt").stat().st_ino
    (model / "model.safetensors").chmod(0o600)
    model.chmod(0o750)
    result = deltafmt.apply(model, [inputs / "d1.deltafmt"], in_place=True)
    weights = {name: data for name, data in tree(inputs / "v1").items() if name != "config.json"}
    kept = {name: data for name, data in before.items() if name not in ("model.safetensors", "config.json")}
    assert tree(model) == {**kept, **weights, "config.json": b'{"v": 1}'}
    assert set(result.restored) == set(weights)
    assert (model / "runs" / "first" / "log.txt").stat().st_ino == inode
    assert stat.S_IMODE(model.stat().st_mode) == 0o750
    # Back to one file: the shards and their index go.
    deltafmt.apply(model, [inputs / "d2.deltafmt"], in_place=True)
    one = {name: data for name, data in tree(inputs / "v2").items() if name.startswith("model")}
    assert tree(model) == {**kept, **one, "config.json": b'{"v": 2}'}
    assert [path.name for path in model.parent.iterdir()] == ["model"]


def test_a_folder_whose_version_another_tool_has_noted_is_refused(inputs: Path, model: Path) -> None:
    note = model / ".weight_sync" / "state.json"
    note.parent.mkdir()
    note.write_text('{"version": "3"}')
    before = tree(model)
    with pytest.raises(UsageError, match=r"state\.json, which says what version .* delete that file, or write a new"):
        deltafmt.apply(model, [inputs / "d1.deltafmt"], in_place=True)
    assert tree(model) == before
    note.unlink()
    deltafmt.apply(model, [inputs / "d1.deltafmt"], in_place=True)
    assert tree(model)["config.json"] == b'{"v": 1}'


def test_private_weights_stay_private(inputs: Path, model: Path) -> None:
    (model / "model.safetensors").chmod(0o600)
    deltas = [inputs / "d1.deltafmt", inputs / "d2.deltafmt"]
    deltafmt.apply(model, deltas, in_place=True)
    assert stat.S_IMODE((model / "model.safetensors").stat().st_mode) == 0o600


def test_whoever_has_the_old_weights_open_keeps_them(inputs: Path, model: Path) -> None:
    old = (model / "model.safetensors").read_bytes()
    with open(model / "model.safetensors", "rb") as file:
        deltafmt.apply(model, [inputs / "d1.deltafmt", inputs / "d2.deltafmt"], in_place=True)
        assert file.read() == old != (model / "model.safetensors").read_bytes()


def test_what_is_applied_already_is_skipped(inputs: Path, model: Path, cli: Cli, tmp_path: Path) -> None:
    deltas = [inputs / "d1.deltafmt", inputs / "d2.deltafmt"]
    assert cli("apply", model, deltas[0], "--in-place").code == 0
    assert f"applied already: {deltas[0]}\n" in cli("apply", model, *deltas, "--in-place").out
    after = tree(model)
    result = deltafmt.apply(model, deltas, in_place=True)
    assert (result.applied, result.skipped) == ([], list(map(str, deltas)))
    assert tree(model) == after
    refused(cli("apply", model, *deltas, "-o", tmp_path / "out"), 2, "is what", "d2.deltafmt gives already")
    # A link that is applied, and then one that is missing: nothing is skipped over.
    refused(cli("apply", inputs / "v1", deltas[0], "--in-place", "-o", tmp_path / "out"), 2, "both are given")
    with pytest.raises(WrongBaseError):
        deltafmt.apply(model, [deltas[0]], in_place=True)


def test_lossy_deltas_are_known_by_what_the_weights_say(inputs: Path, model: Path, tmp_path: Path) -> None:
    first = tmp_path / "first.deltafmt"
    deltafmt.pack(inputs / "v0", inputs / "v1", first, method=RTN(4))
    deltafmt.apply(model, [first], in_place=True)
    assert deltafmt.apply(model, [first], in_place=True).skipped == [str(first)]
    other = read_folder(model)
    other["layers.0.weight"] = nudge(other["layers.0.weight"], 1)
    shutil.rmtree(model)
    write_folder(model, other)
    with pytest.raises(WrongBaseError, match=r"layers\.0\.weight"):
        deltafmt.apply(model, [first], in_place=True)


def test_a_file_a_link_and_this_folder(
    inputs: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    delta = inputs / "d1.deltafmt"
    refused(cli("apply", model / "model.safetensors", delta, "--in-place"), 2, "is a file", "write a new folder")
    (tmp_path / "current").symlink_to("model")
    deltafmt.apply(tmp_path / "current", [delta], in_place=True)
    assert (tmp_path / "current").is_symlink()
    assert read_folder(model) == read_folder(inputs / "v1")
    monkeypatch.chdir(model)
    deltafmt.apply(".", [inputs / "d2.deltafmt"], in_place=True)
    assert read_folder(model) == read_folder(inputs / "v2")


def test_other_weights_that_a_loader_would_read_are_refused(inputs: Path, tmp_path: Path) -> None:
    """Shards were written, and a file that stays is what a loader would read in their place."""
    made = tmp_path / "made"
    shutil.copytree(inputs / "v1", made)
    weights = sorted(path.name for path in made.glob("*.safetensors"))
    check_read(made, made, weights)
    shutil.copy(inputs / "v0" / "model.safetensors", made)
    with pytest.raises(UsageError, match="holds other weights beside those that are patched"):
        check_read(made, made, weights)


def test_a_folder_that_changes_meanwhile_is_left_alone(
    inputs: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill = in_place.PatchedFolder.fill

    def late(self: in_place.PatchedFolder, partial: Path) -> None:
        fill(self, partial)
        (model / "late.txt").write_text("a checkpoint of a training run")

    monkeypatch.setattr(in_place.PatchedFolder, "fill", late)
    with pytest.raises(StorageError, match="model changed while it was being patched"):
        deltafmt.apply(model, [inputs / "d1.deltafmt"], in_place=True)
    assert (model / "late.txt").exists()
    assert read_folder(model) == read_folder(inputs / "v0")


def test_a_mounted_folder_is_refused_before_any_work(
    inputs: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == model)
    with pytest.raises(UsageError, match="a file system is mounted at"):
        deltafmt.apply(model, [inputs / "d1.deltafmt"], in_place=True)


def test_a_socket_is_refused_and_files_are_copied_where_there_are_no_links(
    inputs: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(model / "pipe")
    with pytest.raises(UsageError, match="pipe is no file, folder or link"):
        deltafmt.apply(model, [inputs / "d1.deltafmt"], in_place=True)
    (model / "pipe").unlink()
    kept = tree(model)

    def unlinked(*_: object, **__: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", unlinked)
    deltafmt.apply(model, [inputs / "d1.deltafmt"], in_place=True)
    assert tree(model)["README.md"] == kept["README.md"]
    assert read_folder(model) == read_folder(inputs / "v1")


@pytest.mark.parametrize("at", ["note", "first rename", "second rename", "removal"])
def test_a_kill_where_names_cannot_be_exchanged(
    inputs: Path, model: Path, monkeypatch: pytest.MonkeyPatch, at: str, cli: Cli
) -> None:
    """Between two renames the folder has no name: the next run, or --recover, gives it the new state."""
    delta = inputs / "d1.deltafmt"
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(folder_writer, "exchange", lambda *_: False)
        rename, remove, seen = Path.rename, shutil.rmtree, [0]

        def renamed(self: Path, target: Path) -> Path:
            if at == "note":
                os._exit(9)
            found = rename(self, target)
            seen[0] += 1
            if at == ("first rename", "second rename")[seen[0] - 1]:
                os._exit(9)
            return found

        def removed(path: Path, **options: bool) -> None:
            if at == "removal" and seen[0] == 2:
                os._exit(9)
            remove(path, **options)

        monkeypatch.setattr(Path, "rename", renamed)
        monkeypatch.setattr(folder_writer.shutil, "rmtree", removed)
        deltafmt.apply(model, [delta], in_place=True, threads=1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    gone = at == "first rename"
    assert model.exists() != gone
    if gone:
        assert f"{model}: a run that was killed is finished" in cli("apply", model, "--recover").out
        assert read_folder(model) == read_folder(inputs / "v1")
        assert [path.name for path in model.parent.iterdir()] == ["model"]
    assert deltafmt.apply(model, [delta], in_place=True).path == model
    assert tree(model).keys() > tree(inputs / "v1").keys()
    assert read_folder(model) == read_folder(inputs / "v1")
    assert [path.name for path in model.parent.iterdir()] == ["model"]


def test_recover_keeps_what_may_be_all_that_is_left(model: Path, cli: Cli) -> None:
    assert "nothing was left to finish" in cli("apply", model, "--recover").out
    refused(cli("apply", model, "x.deltafmt", "--recover"), 2, "give no delta and no output")
    old, partial = model.parent / ".model.replaced", model.parent / ".model.partial"
    model.rename(old)
    partial.mkdir()
    (partial / "half.safetensors").write_bytes(b"half")
    (model.parent / ".model.partial.lock").touch()
    refused(cli("apply", model, "--recover"), 5, "no such folder", ".model.replaced and .model.partial", "whole")
    assert (old / "README.md").read_text() == "mine"
    assert (partial / "half.safetensors").exists()


def test_two_runs_at_once(inputs: Path, model: Path) -> None:
    held = OutputLock(in_place.lock_of(model), model)
    with pytest.raises(UsageError, match="another process is writing"):
        deltafmt.apply(model, [inputs / "d1.deltafmt"], in_place=True)
    held.remove()
    deltafmt.apply(model, [inputs / "d1.deltafmt"], in_place=True)


def test_arguments_that_do_not_go_together(inputs: Path, model: Path, tmp_path: Path, cli: Cli) -> None:
    delta = inputs / "d1.deltafmt"
    refused(cli("apply", model, delta), 2, "-o DIR, or in place of the model, --in-place: give one of the two")
    refused(cli("apply", model, "--in-place"), 2, "no delta file is given")
    refused(cli("apply", model, delta, "--in-place", "--force"), 2, "--force replaces the folder behind -o")
    refused(cli("apply", model, delta, "-o", model), 2, "model exists")
    refused(cli("apply", model, delta, "-o", model, "--force"), 2, "holds the folder runs")
    refused(cli("apply", inputs / "v0", delta, "-o", inputs / "v0", "--force"), 2, "is, or holds, the input")
    refused(cli("apply", tmp_path / "gone", delta, "--in-place"), 5, "no such file or folder", "gone")
