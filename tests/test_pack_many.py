"""``deltafmt pack --many``: the files that ``pack`` makes, from a base that is read once, also if one of them fails."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import deltafmt
from conftest import Cli, Raw, Tensors, normal, nudge, plain, refused, safetensors_bytes, small_tensors, write_folder
from deltafmt.checkpoint.safetensors_file import Tensor
from deltafmt.errors import InvalidFileError, NonFiniteError, StorageError, UsageError, WrongBaseError
from deltafmt.methods import RTN, SVD, Exact, Method
from deltafmt.pipeline import pack_many as module
from deltafmt.pipeline.many_outputs import RECORD

SHAPES = ((40, 96), (7, 33), (300,), (64, 160))


def base_tensors() -> Tensors:
    return {f"layers.{number}.weight": normal(number, shape) for number, shape in enumerate(SHAPES)}


def tuned(seed: int, scale: float = 0.02) -> Tensors:
    """Return a fine-tune of which one tensor is the base's, and which has a tensor of its own."""
    found = {
        name: nudge(tensor, seed + number, scale=scale) for number, (name, tensor) in enumerate(base_tensors().items())
    }
    return {**found, "layers.1.weight": base_tensors()["layers.1.weight"], f"own.{seed}": normal(seed, (3, 5))}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    folder = tmp_path_factory.mktemp("many")
    base = write_folder(folder / "base", base_tensors())
    names = {name: write_folder(folder / name, tuned(seed)) for name, seed in (("one", 10), ("two", 20), ("three", 30))}
    # A fine-tune with other names, a tied tensor and two shards.
    moved = {f"model.{name}": tensor for name, tensor in tuned(40).items() if not name.startswith("own")}
    moved["model.tied"] = moved["model.layers.0.weight"]
    order = list(moved)
    names["moved"] = write_folder(folder / "moved", moved, [order[::2], order[1::2]], {"config.json": b"{}"})
    return base, names


@contextlib.contextmanager
def counted(base: Path) -> Iterator[list[int]]:
    """Count the bytes that are read of a base's tensors."""
    found: list[int] = []
    own = {name: getattr(Tensor, name) for name in ("pages", "pieces", "head")}

    def is_base(tensor: Tensor) -> bool:
        return type(tensor) is Tensor and tensor.file.path.parent == base

    def pages(self: Tensor, start: int, length: int) -> Any:
        found.extend([length] if is_base(self) else [])
        return own["pages"](self, start, length)

    def pieces(self: Tensor, first: int = 0) -> Any:
        small = self.nbytes <= 64 * 1024  # larger ones are read through pages
        found.extend([self.nbytes - first] if small and is_base(self) else [])
        return own["pieces"](self, first)

    def head(self: Tensor, length: int) -> bytes:
        found.extend([length] if is_base(self) else [])
        return own["head"](self, length)  # type: ignore[no-any-return]

    with pytest.MonkeyPatch.context() as patch:
        for name, replaced in (("pages", pages), ("pieces", pieces), ("head", head)):
            patch.setattr(Tensor, name, replaced)
        yield found


@pytest.mark.parametrize("method", [Exact(), Exact("fast"), RTN(4), SVD(rank=2), None], ids=str)
def test_each_file_is_the_one_that_pack_makes(
    folders: tuple[Path, dict[str, Path]], method: Method | None, tmp_path: Path
) -> None:
    base, names = folders
    rules: Any = [("*.3.weight", Exact())]
    result = deltafmt.pack_many(base, names, tmp_path / "out", method=method, rules=rules, threads=3)
    assert list(result.packed) == list(names)
    assert not result.failed
    for name, path in names.items():
        one = deltafmt.pack(base, path, tmp_path / name, method=method, rules=rules, threads=1)
        assert (tmp_path / "out" / f"{name}.deltafmt").read_bytes() == (tmp_path / name).read_bytes()
        assert result.packed[name].actions == one.actions
        assert result.packed[name].restored == one.restored
        assert result.packed[name].content_id == one.content_id
    assert result.size == sum((tmp_path / name).stat().st_size for name in names)


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_any_mixture_of_tensors_gives_the_files_of_pack(data: st.DataObject) -> None:
    """Tensors that are missing, new, of another shape or dtype, tied, or taken apart into shards."""
    names = [f"t{number}" for number in range(5)]
    shapes = st.tuples(st.integers(1, 9), st.integers(1, 70))
    base = {name: normal(number, data.draw(shapes)) for number, name in enumerate(names)}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_folder(root / "base", base)
        tunes = {}
        for number in range(data.draw(st.integers(1, 4))):
            kept = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
            tensors = {name: nudge(base[name], number, data.draw(st.sampled_from((None, "F32")))) for name in kept}
            if data.draw(st.booleans()):
                tensors["tied"] = tensors[kept[0]]
            if data.draw(st.booleans()):
                tensors["new"] = normal(number, data.draw(shapes), "F16")
            order = list(tensors)
            cut = data.draw(st.integers(1, len(order)))
            parts = [order[:cut], order[cut:]] if cut < len(order) else None
            tunes[f"f{number}"] = write_folder(root / f"f{number}", tensors, parts)
        method = data.draw(st.sampled_from((Exact(), RTN(4))))
        # RTN takes what is missing from the base: such a fine-tune has its tensors in its own order of names.
        missing = None if method.exact else "same"
        found = deltafmt.pack_many(
            root / "base", tunes, root / "out", method=method, missing=missing, threads=data.draw(st.integers(1, 3))
        )
        for name, path in tunes.items():
            if name in found.failed:
                with pytest.raises(type(found.failed[name]), match=f"^{str(found.failed[name])[:20]}"):
                    deltafmt.pack(root / "base", path, root / name, method=method, missing=missing, force=True)
                continue
            deltafmt.pack(root / "base", path, root / f"{name}.one", method=method, missing=missing)
            assert (root / "out" / f"{name}.deltafmt").read_bytes() == (root / f"{name}.one").read_bytes()


def test_the_base_is_read_once(folders: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    base, names = folders
    size = sum(len(tensor.data) for tensor in base_tensors().values())
    for method in (Exact(), RTN(4)):
        with counted(base) as read:
            deltafmt.pack_many(base, names, tmp_path / str(method.exact), method=method, threads=2)
        # Of the fine-tune with other names, 24 rows of a matrix are compared to find what belongs together.
        assert size <= sum(read) < 1.5 * size
    same = {name: path for name, path in names.items() if name != "moved"}
    with counted(base) as read:
        deltafmt.pack_many(base, same, tmp_path / "same", method=Exact(), threads=2)
    assert sum(read) == size
    with counted(base) as read:
        for name, path in names.items():
            deltafmt.pack(base, path, tmp_path / name, method=Exact(), threads=2)
    assert len(names) * size <= sum(read) < 1.5 * len(names) * size


def test_one_that_fails_does_not_lose_the_others(tmp_path: Path, cli: Cli) -> None:
    a, b = small_tensors()
    base = write_folder(tmp_path / "base", a)
    name = "model.layers.0.up.weight"
    bits = np.frombuffer(b[name].data, np.uint16).copy()
    bits[5] = 0x7FC0
    good = [write_folder(tmp_path / each, b) for each in ("first", "last")]
    nan = write_folder(tmp_path / "nan", {**b, name: Raw("BF16", b[name].shape, bits.tobytes())})
    empty = tmp_path / "empty"
    empty.mkdir()
    other = write_folder(tmp_path / "other", {"x": plain(np.zeros((3, 4), np.float32))})
    result = deltafmt.pack_many(base, [good[0], nan, empty, other, good[1]], tmp_path / "out")
    assert list(result.packed) == ["first", "last"]
    kinds = {each: type(error) for each, error in result.failed.items()}
    assert kinds == {"nan": NonFiniteError, "empty": InvalidFileError, "other": WrongBaseError}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [RECORD, "first.deltafmt", "last.deltafmt"]
    deltafmt.pack(base, good[1], tmp_path / "one")
    assert (tmp_path / "out" / "last.deltafmt").read_bytes() == (tmp_path / "one").read_bytes()
    ran = cli("pack", "--many", base, good[0], nan, empty, good[1], "-o", tmp_path / "out2")
    assert ran.code == 2
    lines = [line for line in ran.err.splitlines() if "columns wide" not in line]
    way_out = f"--exclude {name} stores the tensor whole"
    assert lines == [
        f'deltafmt: nan: tensor "{name}": the delta at row 0, column 5 is nan; {way_out}',
        f"deltafmt: empty: {empty}: no .safetensors weights in this folder",
    ]
    assert "failed: 2 of 4; the same command packs them once they are mended" in ran.out
    assert "2 fine-tunes of" in ran.out
    shown = cli("pack", "--many", base, good[0], nan, "-o", tmp_path / "out2", "--json").json()
    assert (shown["ok"], shown["failed"]) == (False, 1)
    assert [row["ok"] for row in shown["files"]] == [True, False]
    assert shown["files"][0]["finished_before"] is True
    assert shown["files"][1]["exit_code"] == 2
    # Once it is mended, only that one is packed.
    write_folder(tmp_path / "nan2", b)
    (nan / "model.safetensors").write_bytes((tmp_path / "nan2" / "model.safetensors").read_bytes())
    again = deltafmt.pack_many(base, [good[0], nan, good[1]], tmp_path / "out")
    assert (list(again.packed), list(again.finished)) == (["nan"], ["first", "last"])


def test_a_source_that_changes_spoils_its_own_file(tmp_path: Path) -> None:
    a, b = small_tensors()
    base = write_folder(tmp_path / "base", a)
    tunes = [write_folder(tmp_path / name, b) for name in ("one", "two", "three")]

    def touch(folder: Path) -> Any:
        file = folder / "model.safetensors"
        stat = file.stat()
        return lambda *_: os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))

    result = deltafmt.pack_many(base, tunes, tmp_path / "out", method=Exact(), progress=touch(tunes[1]))
    assert list(result.packed) == ["one", "three"]
    assert str(result.failed["two"]) == f"{tunes[1]}/model.safetensors changed while it was being read"
    result = deltafmt.pack_many(base, tunes, tmp_path / "out2", method=Exact(), progress=touch(base))
    assert not result.packed
    assert {type(error) for error in result.failed.values()} == {StorageError}
    assert not (tmp_path / "out2").exists()


def test_an_interrupted_run_goes_on(
    folders: tuple[Path, dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, names = folders
    monkeypatch.setattr("deltafmt.container.writer.SECTION_TARGET", 1)
    whole, out = tmp_path / "whole", tmp_path / "out"
    deltafmt.pack_many(base, names, whole, method=Exact())
    for stop in (3, 4, 5):
        done: list[str] = []

        def halt(name: str, _: int, done: list[str] = done, stop: int = stop) -> None:
            done.append(name)
            if len(done) == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt, match="interrupted; the same command goes on where it stopped"):
            deltafmt.pack_many(base, names, out, method=Exact(), progress=halt)
    result = deltafmt.pack_many(base, names, out, method=Exact())
    assert result.finished or any(packed.resumed for packed in result.packed.values())
    for name in names:
        assert (out / f"{name}.deltafmt").read_bytes() == (whole / f"{name}.deltafmt").read_bytes()
    assert not list(out.glob(".*partial*"))


def test_what_is_finished_is_known_by_what_it_was_made_of(tmp_path: Path) -> None:
    a, b = small_tensors()
    base = write_folder(tmp_path / "base", a)
    tunes = [write_folder(tmp_path / name, b, None, {"config.json": b"{}"}) for name in ("one", "two")]
    out = tmp_path / "out"
    first = deltafmt.pack_many(base, tunes, out, method=Exact())
    assert deltafmt.pack_many(base, tunes, out, method=Exact()).finished == {
        name: packed.content_id for name, packed in first.packed.items()
    }
    # With force as well: what would be the same stays.
    assert list(deltafmt.pack_many(base, tunes, out, method=Exact(), force=True).finished) == ["one", "two"]
    # Another method, another small file, a file that somebody else wrote: these would not be the same.
    other = deltafmt.pack_many(base, tunes, out, method=RTN(4))
    assert {str(error) for error in other.failed.values()} == {
        f"{out}/{name}.deltafmt exists" for name in ("one", "two")
    }
    (tunes[0] / "config.json").write_text('{"a": 1}')
    (out / "two.deltafmt").write_bytes(b"something else")
    again = deltafmt.pack_many(base, tunes, out, method=Exact())
    assert list(again.failed) == ["one", "two"]
    again = deltafmt.pack_many(base, tunes, out, method=Exact(), force=True)
    assert list(again.packed) == ["one", "two"]
    # A record that cannot be read counts as none.
    for text in ("{", "[]", "[" * 100_000, '{"schema": 1, "files": {"one.deltafmt": 3}}', '{"schema": 2}'):
        (out / RECORD).write_text(text)
        assert list(deltafmt.pack_many(base, tunes, out, method=Exact()).failed) == ["one", "two"]


def test_what_two_runs_at_once_have_finished_is_known(tmp_path: Path) -> None:
    a, b = small_tensors()
    base = write_folder(tmp_path / "base", a)
    one, two = (write_folder(tmp_path / name, b) for name in ("one", "two"))
    out, ran = tmp_path / "out", []

    def meanwhile(*_: object) -> None:
        if not ran:
            ran.append(True)
            deltafmt.pack_many(base, [two], out, method=Exact())

    deltafmt.pack_many(base, [one], out, method=Exact(), progress=meanwhile)
    assert list(deltafmt.pack_many(base, [one, two], out, method=Exact()).finished) == ["one", "two"]


def test_what_does_not_fit_is_refused(folders: tuple[Path, dict[str, Path]], tmp_path: Path, cli: Cli) -> None:
    base, names = folders
    one, two = names["one"], names["two"]
    out = tmp_path / "out"
    many = ("pack", "--many", base)
    twin = tmp_path / "twin" / "one"
    write_folder(twin.parent, base_tensors()).rename(tmp_path / "moving")
    twin.parent.mkdir()
    (tmp_path / "moving").rename(twin)
    refused(cli(*many, one, twin, "-o", out), 2, f"{one} and {twin} would both be one.deltafmt; NAME={twin} gives it")
    refused(cli(*many, one, f"ONE={twin}", "-o", out), 2, "would both be ONE.deltafmt, but for capitals")
    refused(cli(*many, one, f"a/b={twin}", "-o", out), 2, "'a/b' is no name for the delta file of")
    refused(cli(*many, one, base, "-o", out), 2, f"{base} is the base itself; leave it out of the fine-tunes")
    refused(cli(*many, one, f"x={one}", "-o", out), 2, f"{one} is given twice, as one and as x; leave one out")
    refused(cli(*many, one, "-o", "-"), 2, "standard output takes one; name a folder after -o")
    for option, value in (("--target-ratio", "5"), ("--calibration", "text"), ("--candidate", "rtn")):
        refused(cli(*many, one, "-o", out, option, value), 2, f"--many and {option}: that takes a run for each")
    refused(cli(*many, one, "-o", out, "--parent", "x"), 2, "--many and --parent: a chain has one link after another")
    refused(cli("pack", base, one, two, "-o", out), 2, f"one argument too many: '{two}'; --many packs several")
    refused(cli("pack", "--many", base, "-o", out), 2, "FINETUNED is missing")
    file = tmp_path / "file"
    file.write_bytes(b"")
    refused(cli(*many, one, "-o", file), 2, f"{file} is a file, and the delta files of several fine-tunes go into a")
    refused(cli(*many, one, "-o", tmp_path / "no" / "out"), 5, f"no such folder: {tmp_path / 'no'}")
    refused(cli("pack", "--many", tmp_path / "gone", one, "-o", out), 5, "no such file or folder")
    refused(cli(*many, one, "-o", out, "--method", "gptq"), 2, "method gptq needs a calibration text, which every")
    with pytest.raises(UsageError, match="no fine-tune is given"):
        deltafmt.pack_many(base, [], out)
    with pytest.raises(UsageError, match="is one fine-tune, and a list of them is needed"):
        deltafmt.pack_many(base, str(one), out)
    assert not out.exists()
    assert cli(*many, "-o", out, one, f"other={twin}", "--method", "exact").code == 0
    assert sorted(path.name for path in out.glob("*.deltafmt")) == ["one.deltafmt", "other.deltafmt"]


def test_groups_and_single_files(
    folders: tuple[Path, dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, names = folders
    monkeypatch.setattr(module, "TOGETHER", 2)
    single = tmp_path / "single.safetensors"
    single.write_bytes(safetensors_bytes(tuned(50)))
    result = deltafmt.pack_many(base, [*names.values(), single], tmp_path / "out", method=Exact())
    assert list(result.packed) == [*names, "single"]
    deltafmt.unpack(base, tmp_path / "out" / "single.deltafmt", tmp_path / "restored")
    assert (tmp_path / "restored" / "single.safetensors").read_bytes() == single.read_bytes()
    assert json.loads((tmp_path / "out" / RECORD).read_text())["files"].keys() == {
        f"{name}.deltafmt" for name in result.packed
    }


def test_the_command_says_what_each_became(folders: tuple[Path, dict[str, Path]], tmp_path: Path, cli: Cli) -> None:
    base, names = folders
    out = tmp_path / "out"
    said = cli("pack", "--many", base, *names.values(), "-o", out, "--method", "exact")
    assert said.code == 0
    assert said.err == ""
    lines = said.out.splitlines()
    assert lines[0].split() == ["fine-tune", "bytes", "of", "its", "own", "tensors"]
    assert [line.split()[0] for line in lines[1:5]] == list(names)
    assert f"{out}: 4 fine-tunes of {base}, " in lines[5]
    again = cli("pack", "--many", base, *names.values(), "-o", out, "--method", "exact")
    assert again.out.count("finished before") == 4
