"""``deltafmt dedup``: copies are those that all bytes show, and what a base saves is what packing saves."""

from __future__ import annotations

import os
import shlex
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import deltafmt
from conftest import Cli, Raw, Tensors, normal, nudge, plain, refused, write_folder
from deltafmt.analysis import copies, savings
from deltafmt.analysis.base_choice import choose_bases
from deltafmt.analysis.dedup import unlike_names
from deltafmt.analysis.named_bases import named_base, named_bases
from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.checkpoint.safetensors_file import Tensor
from deltafmt.errors import InvalidFileError, UsageError
from deltafmt.methods import Exact
from deltafmt.pipeline.plan import Plan


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_copies_are_those_that_all_bytes_show(data: st.DataObject) -> None:
    """Heads of a few bytes, so that tensors are alike at their beginning and differ behind it."""
    contents = [bytes([first]) * 6 + bytes([last]) for first in (1, 2) for last in (1, 2, 3)]
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(copies, "HEAD", data.draw(st.sampled_from((3, 64))))
        folders: list[Path] = []
        for number in range(data.draw(st.integers(2, 4))):
            names = data.draw(st.lists(st.sampled_from("abcd"), min_size=1, unique=True))
            tensors = {
                each: Raw(data.draw(st.sampled_from(("U8", "I8"))), (7,), data.draw(st.sampled_from(contents)))
                for each in names
            }
            parts = [names[:1], names[1:]] if len(names) > 1 and data.draw(st.booleans()) else None
            small = {"config.json": data.draw(st.sampled_from((b"{}", b'{"a": 1}', b'{"b": 1}')))}
            folders.append(write_folder(Path(name) / str(number), tensors, parts, small))
        result = deltafmt.dedup(folders, threads=data.draw(st.integers(1, 3)))

        by_bytes: dict[Any, set[Any]] = defaultdict(set)
        for number, folder in enumerate(folders):
            with Checkpoint(folder) as opened:
                for tensor in opened.tensors.values():
                    key = tensor.dtype, tensor.shape, b"".join(map(bytes, tensor.pieces()))
                    by_bytes[key].add((number, tensor.name))
        expected = {frozenset(places) for places in by_bytes.values() if len(places) > 1}
        assert {frozenset(group.places) for group in result.tensors} == expected
        same_files: dict[bytes, set[Path]] = defaultdict(set)
        for folder in folders:
            for path, content in files_of(folder).items():
                same_files[content].add(folder / path)
        expected_files = {frozenset(paths) for paths in same_files.values() if len(paths) > 1}
        assert {frozenset(group.paths) for group in result.files} == expected_files


def test_what_cannot_be_a_copy_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = normal(1, (300, 300))
    pair = [{"same": large, "odd": normal(2, (10, 10)), "tuned": normal(seed, (400, 100))} for seed in (3, 4)]
    folders = [write_folder(tmp_path / str(number), tensors) for number, tensors in enumerate(pair)]
    read: list[str] = []
    fingerprint = Tensor.fingerprint
    monkeypatch.setattr(Tensor, "fingerprint", lambda self: read.append(self.name) or fingerprint(self))
    result = deltafmt.dedup(folders)
    assert read == ["same", "same"]
    assert [[name for _, name in group.places] for group in result.tensors] == [["same", "same"], ["odd", "odd"]]


def test_links_and_hidden_files_are_no_copies(tmp_path: Path) -> None:
    content = {"w": normal(1, (40, 40))}
    one = write_folder(tmp_path / "one", content, None, {"notes.txt": b"the same", ".hidden": b"hidden too"})
    two = write_folder(tmp_path / "two", content, None, {".hidden": b"hidden too"})
    (two / "model.safetensors").unlink()
    os.link(one / "model.safetensors", two / "model.safetensors")
    (two / "notes.txt").symlink_to(one / "notes.txt")
    (two / "empty.txt").write_bytes(b"")
    (one / "empty.txt").write_bytes(b"")
    result = deltafmt.dedup([one, two])
    assert result.files == []
    assert len(result.tensors) == 1
    (two / "again.txt").write_bytes(b"the same")
    assert [group.redundant for group in deltafmt.dedup([one, two]).files] == [8]


def test_a_weight_file_with_other_bytes_beside_its_tensors_is_hashed_whole(tmp_path: Path) -> None:
    content = {"w": normal(1, (40, 40))}
    folders = [write_folder(tmp_path / name, content) for name in "abc"]
    for folder, more in zip(folders, (b"x", b"x", b"y"), strict=True):
        with open(folder / "model.safetensors", "ab") as file:
            file.write(more)
    (group,) = deltafmt.dedup(folders).files
    assert group.paths == (folders[0] / "model.safetensors", folders[1] / "model.safetensors")


def family(seed: int, count: int, columns: int = 96) -> tuple[Tensors, list[Tensors]]:
    base = {f"layers.{number}.weight": normal(seed + number, (160, columns)) for number in range(3)}
    base["frozen.weight"] = normal(seed + 9, (200, columns))
    tunes = []
    for number in range(count):
        tuned = {name: nudge(each, 100 * number + seed, scale=0.003) for name, each in base.items()}
        tunes.append({**tuned, "frozen.weight": base["frozen.weight"]})
    return base, tunes


def test_families_get_their_bases_and_commands_that_work(tmp_path: Path, cli: Cli, monkeypatch: Any) -> None:
    monkeypatch.setattr("deltafmt.analysis.savings.FILE_BYTES", 6000)  # in small files alignment counts for less
    monkeypatch.chdir(tmp_path)
    for name, seed, columns in (("my llama", 1, 96), ("-bert", 50, 80)):
        base, tunes = family(seed, 3, columns)
        write_folder(Path("all") / name / "base", base)
        for number, tuned in enumerate(tunes):
            write_folder(Path("all") / name / str(number) / "final", tuned)
    folders = [str(path.parent) for path in sorted(Path("all").rglob("model.safetensors"))]
    write_folder(Path("all") / "stranger", {"x": normal(70, (160, 96))})
    shown = cli("dedup", *folders, "all", "--json").json()
    assert [proposal["base"] for proposal in shown["proposals"]] == ["all/my llama/base", "all/-bert/base"]
    assert shown["alone"] == ["all/stranger"]
    assert shown["equal_tensors"]["redundant_bytes"] == 3 * 200 * 2 * (96 + 80)
    for proposal in shown["proposals"]:
        names = [row["name"] for row in proposal["finetunes"]]
        assert names == ["0-final", "1-final", "2-final"]
        for command in proposal["commands"]:
            program, *words = shlex.split(command)
            assert program == "deltafmt"
            if words[0] == "unpack":
                Path("restored").mkdir(exist_ok=True)
                words += ["--force"]
            ran = cli(*words)
            assert ran.code == 0, ran.err
        for row in proposal["finetunes"]:
            folder = Path(shlex.split(proposal["commands"][1])[2]).parent
            size = (folder / f"{row['name']}.deltafmt").stat().st_size
            assert row["delta_error"] == 0
            assert abs(size - row["delta_bytes"]) < 8000
            assert row["equal_bytes"] == 200 * 2 * (96 if "llama" in row["path"] else 80)
            assert row["near_bytes"] + row["equal_bytes"] + row["new_bytes"] <= row["bytes"]
        first = Path(proposal["finetunes"][0]["path"])
        assert files_of(Path("restored") / "0-final") == files_of(first)
    said = cli("dedup", *folders)
    assert said.code == 0
    assert "base: all/my llama/base" in said.out
    assert "  deltafmt pack --many 'all/my llama/base' '0-final=all/my llama/0/final'" in said.out
    named = cli("dedup", *folders, "--base", "all/-bert/1/final", "--json").json()
    assert [proposal["base"] for proposal in named["proposals"]] == ["all/-bert/1/final"]
    assert len(named["proposals"][0]["finetunes"]) == 3
    assert len(named["alone"]) == 4


def test_models_of_one_shape_that_are_not_related_are_left_alone(tmp_path: Path) -> None:
    folders = [write_folder(tmp_path / str(number), family(10 * number, 0)[0]) for number in range(3)]
    result = deltafmt.dedup(folders)
    assert result.proposals == []
    assert result.alone == folders


def test_a_fine_tune_that_is_the_base_takes_almost_nothing(tmp_path: Path) -> None:
    base, _ = family(1, 0, 512)
    folders = [write_folder(tmp_path / name, base) for name in ("one", "two")]
    (proposal,) = deltafmt.dedup(folders).proposals
    (tune,) = proposal.finetunes
    assert (proposal.base, tune.path) == tuple(folders)
    assert tune.saving.same == sum(len(each.data) for each in base.values())
    assert (tune.saving.windows, tune.saving.error) == (0, 0)
    assert tune.saving.size < 20000


@pytest.mark.parametrize(("scale", "dtype"), [(0.001, "BF16"), (0.1, "BF16"), (0.01, "F32"), (0.01, "I16")])
def test_the_estimate_is_within_its_error(tmp_path: Path, monkeypatch: Any, scale: float, dtype: str) -> None:
    """Windows of a part of the tensors, beside all bytes coded in windows of the same length."""
    monkeypatch.setattr(savings, "WINDOW", 512)
    rng = np.random.default_rng(1)
    a: Tensors = {}
    for number in range(30):
        shape = (int(rng.integers(1, 120)), int(rng.integers(1, 250)))
        a[f"t{number}"] = (
            plain((rng.normal(0, 300, shape)).astype(np.int16)) if dtype == "I16" else normal(number, shape, dtype)
        )
    b = {}
    for number, (name, tensor) in enumerate(a.items()):
        if dtype == "I16":
            step = rng.integers(0, 3, tensor.shape).astype(np.int16)
            b[name] = plain(np.frombuffer(tensor.data, np.int16).reshape(tensor.shape) + step)
        else:
            b[name] = nudge(tensor, number, scale=scale * (1 + number % 3))
    base, tuned = write_folder(tmp_path / "a", a), write_folder(tmp_path / "b", b)
    with Checkpoint(base) as before, Checkpoint(tuned) as after, ThreadPoolExecutor(2) as pool:
        plans = [Plan(tensor, before.tensors[name], Exact()) for name, tensor in after.tensors.items()]
        total = sum(plan.tensor.nbytes for plan in plans)
        found = savings.estimate(plans, frozenset(), total, 48, pool)
        monkeypatch.setattr(savings, "CHUNK_UNITS", 512)
        complete = savings.estimate(plans, frozenset(), total, 10**6, pool)
    assert (found.windows, complete.error) == (48, 0)
    assert 0 < found.error < 0.1 * total
    assert abs(found.size - complete.size) <= found.error
    assert abs(found.alone - complete.alone) <= 0.02 * total
    assert complete.windows > 300


@given(st.integers(1, 6), st.data())
def test_the_choice_of_bases(count: int, data: st.DataObject) -> None:
    pairs = [(one, other) for one in range(count) for other in range(count) if one != other]
    gains = {pair: data.draw(st.integers(1, 9)) for pair in pairs if data.draw(st.booleans())}
    found = choose_bases(count, gains)
    members = [each for tunes in found.values() for each in tunes]
    assert len(members) == len(set(members))
    assert not set(members) & set(found)
    for base, tunes in found.items():
        for each in tunes:
            assert gains[base, each] == max(gains.get((other, each), 0) for other in found) > 0
    # Never less than the best single base, and who is left out could be helped by no base.
    saved = sum(gains[base, each] for base, tunes in found.items() for each in tunes)
    alone = max((sum(gain for (one, _), gain in gains.items() if one == base) for base in range(count)), default=0)
    assert saved >= alone or len(found) > 1
    for each in set(range(count)) - set(members) - set(found):
        assert all((base, each) not in gains for base in found)


@given(st.integers(2, 6), st.data())
def test_a_base_that_is_named_is_taken_where_it_helps(count: int, data: st.DataObject) -> None:
    pairs = [(one, other) for one in range(count) for other in range(count) if one != other]
    gains = {pair: data.draw(st.integers(1, 9)) for pair in pairs if data.draw(st.booleans())}
    roots = data.draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=count - 1))
    others = [each for each in range(count) if each not in roots]
    named = {each: data.draw(st.sampled_from(sorted(roots))) for each in others if data.draw(st.booleans())}
    found = choose_bases(count, gains, named)
    of = {each: base for base, tunes in found.items() for each in tunes}
    for each, base in named.items():
        if (base, each) in gains:
            assert of[each] == base
    members = [each for tunes in found.values() for each in tunes]
    assert len(members) == len(set(members))
    assert not set(members) & set(found)


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: mit\nbase_model: someone/base\n---\n# Title\n", "someone/base"),
        ("---\nbase_model: 'someone/base' # exact\n---\n", "someone/base"),
        ("---\nbase_model: [someone/base]\n---\n", "someone/base"),
        ("---\r\nbase_model:\r\n- someone/base\r\ntags:\r\n- x\r\n---\r\n", "someone/base"),
        ("---\nbase_model:\n  - a/b\n  - c/d\n---\n", None),
        ("---\nbase_model: [a/b, c/d]\n---\n", None),
        ("---\nbase_model:\ntags:\n- x\n---\n", None),
        ("---\ntags:\n- x\n---\nbase_model: a/b\n", None),
        ("base_model: a/b\n", None),
        ("", None),
    ],
)
def test_a_model_card_names_a_base(card: str, expected: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(card.encode())
    assert named_base(tmp_path) == expected
    assert named_base(tmp_path / "absent") is None


def test_the_base_is_the_one_that_model_cards_name(tmp_path: Path, cli: Cli) -> None:
    base, (tuned,) = family(1, 1)
    folders = [write_folder(tmp_path / "tuned", tuned), write_folder(tmp_path / "base", base)]
    said = cli("dedup", *folders)
    assert f"base: {folders[0]}\nit saves most of the others" in said.out
    assert "name a base that you know with --base" in said.out
    (folders[0] / "README.md").write_text("---\nbase_model: someone/Base\n---\n")
    said = cli("dedup", *folders)
    assert f"base: {folders[1]}\nmodel cards name it as the base\n" in said.out
    (proposal,) = cli("dedup", *folders, "--json").json()["proposals"]
    assert (proposal["base"], proposal["chosen_by"]) == (str(folders[1]), "model cards")
    (proposal,) = cli("dedup", folders[1], "--base", folders[0], "--json").json()["proposals"]
    assert (proposal["base"], proposal["chosen_by"]) == (str(folders[0]), "given")


def test_a_base_that_names_a_base_is_passed_over(tmp_path: Path) -> None:
    names = {"base": "", "middle": "x/base", "last": "x/middle", "one": "x/two", "two": "x/one", "itself": "x/itself"}
    paths = [tmp_path / name for name in names]
    for path, named in zip(paths, names.values(), strict=True):
        path.mkdir()
        (path / "README.md").write_text(f"---\nbase_model: {named}\n---\n")
    assert named_bases(paths) == {1: 0, 2: 0}
    cached = tmp_path / "models--x--Base" / "snapshots" / "0123"
    cached.mkdir(parents=True)
    assert named_bases([cached, paths[1]]) == {1: 0}
    assert named_bases([cached, *paths[:2]]) == {}  # two checkpoints may be meant


def test_names_are_told_apart_by_the_folders_above() -> None:
    paths = [Path("/m/a/final"), Path("/m/b/Final"), Path("/m/c/last"), Path("/n/a/final"), Path("/m/x.safetensors")]
    assert unlike_names(paths) == ["m-a-final", "b-Final", "last", "n-a-final", "x"]
    assert unlike_names([Path("/a"), Path("/b")]) == ["a", "b"]


def test_one_that_cannot_be_read_is_left_out(tmp_path: Path, cli: Cli) -> None:
    base, (tuned,) = family(1, 1)
    folders = [write_folder(tmp_path / "base", base), write_folder(tmp_path / "tuned", tuned)]
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "model.safetensors").write_bytes(b"not weights at all")
    ran = cli("dedup", *folders, bad)
    assert ran.code == 3
    assert ran.err.startswith(f"deltafmt: {bad} is left out: {bad}/model.safetensors: ")
    assert ran.err.count("\n") == 1
    assert f"base: {folders[0]}" in ran.out
    shown = cli("dedup", *folders, bad, "--json").json()
    assert (shown["ok"], shown["failed"][0]["exit_code"]) == (False, 3)
    refused(cli("dedup", folders[0]), 2, "dedup compares checkpoints, and fewer than two are given")
    refused(cli("dedup", folders[0], folders[0]), 2, "fewer than two are given")
    refused(cli("dedup", folders[0], tmp_path / "gone"), 5, f"no such file or folder: {tmp_path / 'gone'}")
    refused(cli("dedup", folders[0], bad), 3, "bad/model.safetensors")
    refused(cli("dedup", *folders, "--base", bad), 3, "bad/model.safetensors")
    refused(cli("dedup", *folders, "--threads", "0"), 2, "0 threads are fewer than one")
    refused(cli("dedup"), 2, "FOLDER is missing")
    with pytest.raises(InvalidFileError):
        deltafmt.dedup([bad, folders[0]])
    with pytest.raises(UsageError):
        deltafmt.dedup([])


def test_the_estimate_of_a_real_pair(models: Path, tmp_path: Path) -> None:
    base, math = models / "wordmath" / "base", models / "wordmath" / "math"
    (proposal,) = deltafmt.dedup([base, math]).proposals
    (tune,) = proposal.finetunes
    size = deltafmt.pack(base, math, tmp_path / "d", method=Exact()).size
    assert abs(tune.saving.size - size) < 0.01 * size + tune.saving.error
