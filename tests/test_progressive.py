"""``--exact``: served from the beginning of a file, restored byte for byte from all of it (spec, 17.7 and 17.8)."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import deltafmt
from conftest import Cli, Tensors, normal, nudge, read_folder, refused, small_tensors, write_folder, write_pair
from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.errors import InvalidFileError, UsageError, WrongBaseError
from deltafmt.exact.chunk import FORMS, SPARSE, check, decode, encode
from deltafmt.exact.differences import exponents, joined, ordered, planes_of, sorted_planes, zigzag
from deltafmt.exact.units import unit_of
from deltafmt.format.constants import FEATURE_EXACT, FEATURE_PROGRESSIVE, SECTION_KIND_EXACT
from deltafmt.methods import parse
from deltafmt.pipeline.exact_parts import ExactPart, chunk_units, measured_factors
from implementations import running
from test_exact_files import ANCHOR, folder_bytes
from test_exact_files import everything as everything_exact

METHODS = [
    "deltadq:nm=4:16",
    "deltadq:nm=2:8,bits=2,index=fixed,share=1",
    "deltadq-sq:nm=4:16",
    "residual",
    "bitdelta",
    "dare",
    "delta-come",
    "magnitude:density=0.2",
    "rtn:bits=3",
]
# What ends a file that differs in its features alone: the seal, and the magic.
SEAL_AND_MAGIC = 40


def everything() -> tuple[Tensors, Tensors]:
    """Return a pair with grown, shrunk, converted, new, equal and tied tensors; a convolution; NaNs stored whole."""
    a, b = everything_exact()
    a = {name: tensor for name, tensor in a.items() if not name.startswith("every.F")}
    b = {name: tensor for name, tensor in b.items() if not name.startswith(("every.F", "every.BF"))}
    a["conv"] = normal(20, (40, 6, 3, 3))
    b["conv"] = nudge(a["conv"], 21, scale=0.01)
    a["shrunk"] = normal(22, (40, 30), "F32")
    b["shrunk"] = nudge(normal(22, (40, 30), "F32"), 23)
    b["shrunk"] = type(b["shrunk"])("F32", (33, 30), b["shrunk"].data[: 33 * 30 * 4])
    return a, b


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("progressive")
    a, b = everything()
    names = list(b)
    files = {"config.json": b'{"model_type": "tiny"}\n', "tokenizer.json": b"{}"}
    write_folder(folder / "base", a)
    write_folder(folder / "ft", b, [names[::2], names[1::2]], files)
    return folder / "base", folder / "ft"


@pytest.fixture(scope="module")
def file(pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("file") / "p.deltafmt"
    deltafmt.pack(*pair, out, exact=True, missing="removed", threads=2)
    return out


@pytest.mark.parametrize("spelling", METHODS)
def test_every_file_comes_back_byte_for_byte(spelling: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    out, alone, dropped = (tmp_path / name for name in ("p.deltafmt", "alone.deltafmt", "dropped.deltafmt"))
    options = {"method": parse(spelling), "missing": "removed"}
    result = deltafmt.pack(*pair, out, exact=True, **options)
    unpacked = deltafmt.unpack(pair[0], out, tmp_path / "out", threads=3)
    assert folder_bytes(tmp_path / "out") == folder_bytes(pair[1])
    verified = deltafmt.verify(out, pair[0])
    assert set(unpacked.restored) == set(verified.restored) == {n for n in folder_bytes(pair[1]) if "model" in n}
    with deltafmt.open(out) as opened:
        assert {e.name for e in opened.container.entries() if e.exact} == {n for n in opened if opened[n].terms}
    # What is served is what would be without exact parts.
    plain = deltafmt.pack(*pair, alone, **options)
    assert (result.served, result.served_id) == (plain.size, plain.content_id)
    assert verified.served is not None
    assert (verified.served.length, verified.served.content_id.hex()) == (plain.size, plain.content_id)
    whole, expected = out.read_bytes(), alone.read_bytes()
    cut = whole[: result.served]
    assert cut[64:-SEAL_AND_MAGIC] == expected[64:-SEAL_AND_MAGIC]
    assert deltafmt.verify(io.BytesIO(cut)).content_id == plain.content_id
    assert deltafmt.repack(out, dropped, drop="exact").content_id == plain.content_id
    deltafmt.verify(dropped, pair[0])
    with deltafmt.open(dropped) as opened:
        assert not opened.container.features & (FEATURE_EXACT | FEATURE_PROGRESSIVE)
        assert not opened.container.files


def test_what_is_unpacked_from_the_cut_file_is_what_the_terms_give(
    pair: tuple[Path, Path], file: Path, tmp_path: Path
) -> None:
    alone, cut = tmp_path / "alone.deltafmt", tmp_path / "cut.deltafmt"
    deltafmt.pack(*pair, alone, missing="removed")
    cut.write_bytes(file.read_bytes()[: alone.stat().st_size])
    for path in (alone, cut):
        deltafmt.unpack(pair[0], path, tmp_path / path.stem)
    found, expected = read_folder(tmp_path / "cut"), read_folder(tmp_path / "alone")
    assert found.keys() == expected.keys()
    assert all(found[name].data == expected[name].data for name in found)
    assert folder_bytes(tmp_path / "cut") != folder_bytes(pair[1])


def test_bytes_do_not_depend_on_threads_or_loops(pair: tuple[Path, Path], file: Path, tmp_path: Path) -> None:
    deltafmt.pack(*pair, tmp_path / "one", exact=True, missing="removed", threads=1)
    with running("numpy"):
        deltafmt.pack(*pair, tmp_path / "numpy", exact=True, missing="removed", threads=2)
        deltafmt.unpack(pair[0], file, tmp_path / "out")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "numpy").read_bytes() == file.read_bytes()
    assert folder_bytes(tmp_path / "out") == folder_bytes(pair[1])


def test_a_repacked_file_says_the_same(pair: tuple[Path, Path], file: Path, tmp_path: Path) -> None:
    method = parse("deltadq:nm=2:8,index=fixed,share=1")
    fixed, cold, hot, served = (tmp_path / f"{name}.deltafmt" for name in ("fixed", "cold", "hot", "served"))
    packed = deltafmt.pack(*pair, fixed, method=method, exact=True, missing="removed")
    assert deltafmt.repack(fixed, cold, profile="cold").content_id == packed.content_id
    assert deltafmt.repack(cold, hot, profile="hot").content_id == packed.content_id
    assert hot.stat().st_size == fixed.stat().st_size
    verified = deltafmt.verify(cold, pair[0])
    assert verified.served is not None
    assert verified.served.content_id.hex() == packed.served_id
    assert verified.restored
    result = deltafmt.repack(cold, served, profile="hot", drop="exact")
    assert (result.content_id, result.size) == (packed.served_id, packed.served)
    assert deltafmt.diff(fixed, cold).changes == []
    changes = {change.name: change for change in deltafmt.diff(fixed, served).changes}
    assert "restored file model-00001-of-00002.safetensors" in changes
    assert changes[ANCHOR].kind == "changed"


def test_a_device_takes_the_served_part(file: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    import deltafmt.torch
    from operands import naive_delta

    cut = tmp_path / "cut.deltafmt"
    with deltafmt.open(file) as opened:
        last = opened.container.sections[opened.container.served or 0]
        exact = [section for section in opened.container.sections if section.kind == SECTION_KIND_EXACT]
    data = bytearray(file.read_bytes())
    cut.write_bytes(data[: last.offset + last.length])
    deltafmt.pack(*pair, tmp_path / "alone.deltafmt", missing="removed")
    # Exact parts are not read: they may be damaged.
    data[exact[0].offset] ^= 1
    (tmp_path / "damaged.deltafmt").write_bytes(data)
    with pytest.raises(InvalidFileError, match="is damaged"):
        deltafmt.verify(tmp_path / "damaged.deltafmt")
    paths = [tmp_path / f"{name}.deltafmt" for name in ("alone", "cut", "damaged")]
    loads = [deltafmt.torch.load(str(path), "cpu") for path in paths]
    assert list(loads[0]) == list(loads[1]) == list(loads[2])
    assert loads[0].nbytes == loads[1].nbytes == loads[2].nbytes
    for name in loads[0]:
        first, *others = (load[name] for load in loads)
        for other in others:
            assert len(first.terms) == len(other.terms)
            assert all(map(torch.equal, map(naive_delta, first.terms), map(naive_delta, other.terms)))
            assert (first.data is None) == (other.data is None)
            if first.data is not None and other.data is not None:
                assert torch.equal(*(data.reshape(-1).view(torch.uint8) for data in (first.data, other.data)))


def test_another_base_is_refused_even_by_force(file: Path, tmp_path: Path) -> None:
    a, _ = everything()
    a[ANCHOR] = nudge(a[ANCHOR], 99)
    other = write_folder(tmp_path / "other", a)
    for force in (False, True):
        with pytest.raises(WrongBaseError, match=f'tensor "{ANCHOR}" differs'):
            deltafmt.unpack(other, file, tmp_path / "out", force_base=force)
    with pytest.raises(WrongBaseError, match=f'tensor "{ANCHOR}" differs'):
        deltafmt.verify(file, other)
    assert not (tmp_path / "out").exists()
    deltafmt.repack(file, tmp_path / "served", drop="exact")
    assert deltafmt.unpack(other, tmp_path / "served", tmp_path / "out", force_base=True).mismatched


def test_an_interrupted_file_goes_on(pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltafmt.container.writer.SECTION_TARGET", 1)
    whole = tmp_path / "whole.deltafmt"
    deltafmt.pack(*pair, whole, exact=True, missing="removed")
    tensors = len(everything()[1])
    for number, after in enumerate((9, tensors, tensors + 3)):  # among terms, before exact parts, and among these
        resumed, done = tmp_path / f"{number}.deltafmt", []

        def stop(name: str, _: int, done: list[str] = done, after: int = after) -> None:
            done.append(name)
            if len(done) == after:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt, match="goes on where it stopped"):
            deltafmt.pack(*pair, resumed, exact=True, missing="removed", progress=stop)
        result = deltafmt.pack(*pair, resumed, exact=True, missing="removed")
        assert result.resumed > 0
        assert (result.resumed == tensors) == (after >= tensors)
        assert resumed.read_bytes() == whole.read_bytes()
        assert result.served == deltafmt.verify(resumed).served.length  # type: ignore[union-attr]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_target_is_one_for_the_served_part(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, *small_tensors())
    size = deltafmt.pack(pair.base, pair.finetuned, tmp_path / "alone", target_ratio=2).size
    result = deltafmt.pack(pair.base, pair.finetuned, tmp_path / "both", target_ratio=2, exact=True)
    assert result.served == size <= result.finetuned_bytes / 2 < result.size
    deltafmt.unpack(pair.base, tmp_path / "both", tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == folder_bytes(pair.finetuned)


def test_what_cannot_be_is_refused_in_a_line(tmp_path: Path, cli: Cli) -> None:
    pair = write_pair(tmp_path, *small_tensors())
    pack = ("pack", pair.base, pair.finetuned, "-o", tmp_path / "d", "--exact")
    refused(cli(*pack, "--method", "exact"), 2, "the method exact leaves nothing of", "to serve")
    refused(cli(*pack, "--rule", "*.up.*", "exact"), 2, "leaves nothing of", 'up.weight" to serve')
    refused(cli(*pack[:4], "-", "--exact"), 2, "which a stream does not give back")
    _, b = small_tensors()
    lacks = write_folder(tmp_path / "lacks", {name: b[name] for name in list(b)[1:]})
    refused(
        cli("pack", pair.base, lacks, "-o", tmp_path / "d", "--exact", "--missing", "same"), 2, "would be in no file"
    )
    emptied = write_folder(tmp_path / "emptied", {**b, "new.bias": type(b[next(iter(b))])("F32", (0,), b"")})
    for missing in ("same", "removed"):
        pack_emptied = ("pack", pair.base, emptied, "-o", tmp_path / "d", "--exact", "--missing", missing)
        refused(cli(*pack_emptied), 2, '"new.bias" of', "has no elements and is left out")
    gap = write_folder(tmp_path / "gap", b)
    with open(gap / "model.safetensors", "ab") as file:
        file.write(b"more")
    refused(cli("pack", pair.base, gap, "-o", tmp_path / "d", "--exact"), 3, "belong to no tensor")
    assert not (tmp_path / "d").exists()
    cli("pack", pair.base, pair.finetuned, "-o", tmp_path / "plain")
    cli("pack", pair.base, pair.finetuned, "-o", tmp_path / "archive", "--method", "exact")
    repack = ("repack", tmp_path / "plain", "-o", tmp_path / "d")
    refused(cli(*repack, "--drop", "exact"), 2, "has no exact parts to drop")
    refused(cli("repack", tmp_path / "archive", "-o", tmp_path / "d", "--drop", "exact"), 2, "it is an archive")
    refused(cli(*repack, "--drop", "terms"), 2, "drop 'terms' is not exact")
    refused(cli(*repack), 2, "nothing to do: give --profile hot, --profile cold or --drop exact")
    assert not (tmp_path / "d").exists()


def test_commands_say_what_is_served(file: Path, pair: tuple[Path, Path], tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "p.deltafmt"
    packed = cli("pack", *pair, "-o", out, "--exact", "--missing", "removed").out
    assert out.read_bytes() == file.read_bytes()
    with deltafmt.open(out) as opened:
        last = opened.container.sections[opened.container.served or 0]
    size = last.offset + last.length
    assert f"served from its first {size:,} bytes, " in packed
    assert "restored byte for byte by unpack: model-0" in packed
    verified = cli("verify", out, "--base", pair[0]).out
    assert f"served from its first {size:,} bytes, content id " in verified
    assert "restored byte for byte with this base: model-0" in verified
    tree = cli("inspect", out).out
    assert f"served from its first {size:,} bytes" in tree
    assert "exact parts" in tree
    assert "end of the served part" in tree
    assert ", and exact" in cli("inspect", out, "--tensors").out
    described = cli("inspect", out, "--json").json()
    dropped = cli("repack", out, "-o", tmp_path / "served", "--drop", "exact", "--json").json()
    assert described["served"] == {"bytes": size, "content_id": dropped["content_id"]}
    assert dropped["bytes"] == size
    assert sum(child["bytes"] for child in described["tree"]["children"]) == out.stat().st_size
    assert len(described["tensors"][ANCHOR]["factors"]) == 1
    assert cli("verify", tmp_path / "served", "--json").json()["served"] is None


@pytest.mark.parametrize(("spelling", "low", "high"), [("deltadq:nm=4:16", 0.2, 0.3), ("rtn:bits=4", 0.9, 1.05)])
def test_factors_divide_the_rescaling_out(
    spelling: str, low: float, high: float, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    deltafmt.pack(*pair, tmp_path / "d", method=parse(spelling), missing="removed")
    with deltafmt.open(tmp_path / "d") as opened, Checkpoint(pair[0]) as base, Checkpoint(pair[1]) as finetuned:
        entry = opened[ANCHOR]
        both = finetuned.tensors[entry.name], base.tensors[entry.name]
        (bits,) = measured_factors(opened, entry, *both)
    assert low < np.uint32(bits).view(np.float32) < high
    assert bits & (1 << 16) - 1 == 0  # few bits, whatever the order of sums


@pytest.mark.parametrize("spelling", METHODS)
def test_any_span_is_predicted_alike(
    spelling: str, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltafmt.delta.RUN_ELEMENTS", 2048)
    deltafmt.pack(*pair, tmp_path / "d", method=parse(spelling), missing="removed")
    rng = np.random.default_rng(1)
    with deltafmt.open(tmp_path / "d") as opened, Checkpoint(pair[0]) as base:
        entries = [opened[name] for name in opened if opened[name].terms]
        assert {"embed.weight", ANCHOR} <= {entry.name for entry in entries}
        for entry in entries:
            tensor = base.tensors[entry.name].as_matrix(entry.leading)
            factors = [int(np.float32(0.3 + i).view(np.uint32)) for i in range(len(entry.terms))]
            part, count = ExactPart(opened, entry, tensor, factors), entry.rows * entry.columns
            units, marks = part.predicted(0, count)
            with running("numpy"):
                again = part.predicted(0, count)
            assert np.array_equal(units, again[0])
            assert np.array_equal(marks, again[1])
            for first, end in np.sort(rng.integers(0, count, (6, 2)), axis=1):
                found = part.predicted(int(first), int(end))
                assert np.array_equal(found[0], units[first:end])
                assert np.array_equal(found[1], marks[first:end])
            dense = opened.delta(entry.name).reshape(-1)
            kinds = {term.layout.kind for term in entry.terms}
            assert marks[np.flatnonzero(dense)].all() or not kinds <= {"nm", "sparse"}
            assert marks.any() == bool(kinds & {"nm", "sparse"})
            assert chunk_units(opened, entry) >= 1 << 20


@given(st.data())
@settings(max_examples=120, deadline=None)
def test_marked_units_lie_behind_the_others(data: st.DataObject) -> None:
    unit = unit_of(data.draw(st.sampled_from(["BF16", "F16", "F32"])))
    count = data.draw(st.integers(1, 300))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    prediction, values = (rng.integers(0, 256, count * unit.width, np.uint8).view(unit.dtype) for _ in range(2))
    near = rng.random(count) < data.draw(st.sampled_from([0.0, 0.5, 0.97, 1.0]))
    values = np.where(near, prediction, values)
    marks = rng.random(count) < data.draw(st.sampled_from([0.0, 0.25, 1.0]))
    planes, counts = sorted_planes(values, prediction, unit, unit, marks)
    keys = exponents(prediction, unit).astype(np.int64) + (marks.astype(np.int64) << unit.bits)
    with np.errstate(over="ignore"):
        codes = zigzag(ordered(values, unit) - ordered(prediction, unit), unit)
    assert np.array_equal(planes, planes_of(codes[np.argsort(keys, kind="stable")], unit))
    assert np.array_equal(counts, np.bincount(keys, minlength=2 << unit.bits))
    assert np.array_equal(joined(planes, prediction, unit, unit, marks), values)
    for level in ("default", "fast"):
        chunk = encode(values, prediction, unit, level, marks)
        check(chunk.form, chunk.data, count, unit)
        assert np.array_equal(decode(chunk.form, chunk.data, prediction, unit, marks), values)
    assert SPARSE in FORMS


def test_a_real_file_is_small(models: Path, tmp_path: Path) -> None:
    base, finetuned = models / "wordmath/base", models / "wordmath/math"
    result = deltafmt.pack(base, finetuned, tmp_path / "d.deltafmt", exact=True)
    assert result.size <= 0.465 * result.finetuned_bytes
    assert result.served == deltafmt.pack(base, finetuned, tmp_path / "alone.deltafmt").size
    assert deltafmt.verify(tmp_path / "d.deltafmt", base).restored


def test_a_file_object_takes_no_exact_parts(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, *small_tensors())
    with pytest.raises(UsageError, match="a stream does not give back"):
        deltafmt.pack(pair.base, pair.finetuned, io.BytesIO(), exact=True)


def test_links_of_a_chain_may_be_progressive(tmp_path: Path) -> None:
    a, b = small_tensors()
    versions = [a, b, {name: nudge(tensor, 5) if len(tensor.shape) == 2 else tensor for name, tensor in b.items()}]
    folders = [write_folder(tmp_path / f"v{number}", tensors) for number, tensors in enumerate(versions)]
    links = [tmp_path / "1.deltafmt", tmp_path / "2.deltafmt"]
    deltafmt.pack(folders[0], folders[1], links[0], exact=True)
    result = deltafmt.pack(folders[1], folders[2], links[1], exact=True, parent=links[0])
    deltafmt.apply(folders[0], links, tmp_path / "applied")
    found, expected = read_folder(tmp_path / "applied"), read_folder(folders[2])
    assert {name: tensor.data for name, tensor in found.items()} == {n: t.data for n, t in expected.items()}
    cut = links[1].read_bytes()[: result.served]
    assert deltafmt.verify(io.BytesIO(cut)).content_id == result.served_id
    with pytest.raises(UsageError, match="differences are sorted by the values of the base") as caught:
        deltafmt.squash(links, tmp_path / "no")
    assert caught.value.remedy is not None
    squashed = deltafmt.squash(links, tmp_path / "one.deltafmt", base=folders[0])
    assert squashed.restored
    deltafmt.unpack(folders[0], tmp_path / "one.deltafmt", tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == folder_bytes(folders[2])


def test_many_progressive_files_are_those_of_single_packs(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, *small_tensors())
    second = write_folder(
        tmp_path / "second",
        {name: nudge(tensor, 8) if tensor.dtype == "BF16" else tensor for name, tensor in pair.b.items()},
    )
    sources = {"one": pair.finetuned, "two": second}
    assert not deltafmt.pack_many(pair.base, sources, tmp_path / "all", exact=True).failed
    for name, source in sources.items():
        deltafmt.pack(pair.base, source, tmp_path / name, exact=True)
        assert (tmp_path / "all" / f"{name}.deltafmt").read_bytes() == (tmp_path / name).read_bytes()
