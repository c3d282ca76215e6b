"""A pack that goes on after an earlier one: what it may reuse when options, inputs or the partial file have changed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import deltafmt
from conftest import Pair
from deltafmt.container import writer
from deltafmt.container.partial import PartialFile
from deltafmt.methods import DeltaDQ
from many_sections import make_pair, pack_afresh


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Give a pair whose delta has many small sections."""
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pair: Pair) -> Callable[..., Path]:
    """Give a function that leaves the partial files of a pack stopped after some sections; it returns the output."""
    monkeypatch.setattr(writer, "SECTION_TARGET", 1500)

    def run(sections: int = 4, **options: Any) -> Path:
        out = tmp_path / "d.deltafmt"
        record = PartialFile.record

        def stopping(self: PartialFile, *arguments: Any) -> None:
            record(self, *arguments)
            if len(self.sections) == sections:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(PartialFile, "record", stopping)
            with pytest.raises(KeyboardInterrupt):
                deltafmt.pack(pair.base, pair.finetuned, out, **options)
        assert out.with_name(".d.deltafmt.partial").exists()
        return out

    return run


def test_a_resumed_pack_reports_what_the_whole_would(
    stop_after: Callable[..., Path], tmp_path: Path, pair: Pair
) -> None:
    seen: list[str] = []
    options: dict[str, Any] = {"exclude": ["layers.1.w"]}
    whole = deltafmt.pack(pair.base, pair.finetuned, tmp_path / "fresh.deltafmt", **options)
    out = stop_after(8, **options)
    result = deltafmt.pack(pair.base, pair.finetuned, out, progress=lambda name, _: seen.append(name), **options)
    assert result.resumed > 0
    assert len(seen) == len(pair.b) - result.resumed
    assert out.read_bytes() == (tmp_path / "fresh.deltafmt").read_bytes()
    assert (result.actions, result.size, result.content_id) == (whole.actions, whole.size, whole.content_id)
    assert result.kept == whole.kept


CHANGES: dict[str, dict[str, Any]] = {
    "seed": {"seed": 1},
    "profile": {"profile": "cold"},
    "bits": {"method": DeltaDQ(bits=5)},
    "n": {"method": DeltaDQ(n=2)},
    "share": {"method": DeltaDQ(share=2)},
    "index": {"method": DeltaDQ(index="fixed")},
    "grid": {"method": DeltaDQ(grid="midrise")},
    "scale rule": {"method": DeltaDQ(scale="mse")},
    "scale group": {"method": DeltaDQ(scale_group=16)},
    "scale dtype": {"method": DeltaDQ(scale_dtype="F32")},
    "rescale": {"method": DeltaDQ(rescale=False)},
    "exclude": {"exclude": ["layers.0.w"]},
    "include": {"include": ["layers.1*"]},
    "rules": {"rules": [("layers.2.w", DeltaDQ(bits=8))]},
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_option_starts_over(stop_after: Callable[..., Path], tmp_path: Path, pair: Pair, change: str) -> None:
    out = stop_after()
    result = deltafmt.pack(pair.base, pair.finetuned, out, **CHANGES[change])
    assert result.resumed == 0
    assert out.read_bytes() == pack_afresh(tmp_path, pair, **CHANGES[change])


def test_the_same_options_go_on_whatever_the_threads(
    stop_after: Callable[..., Path], tmp_path: Path, pair: Pair
) -> None:
    out = stop_after(threads=1)
    assert deltafmt.pack(pair.base, pair.finetuned, out, threads=4).resumed > 0
    assert out.read_bytes() == pack_afresh(tmp_path, pair)


@pytest.mark.parametrize("side", ["base", "finetuned"])
def test_a_changed_input_starts_over(stop_after: Callable[..., Path], tmp_path: Path, pair: Pair, side: str) -> None:
    out = stop_after()
    weights = getattr(pair, side) / "model.safetensors"
    before = weights.read_bytes(), os.stat(weights)
    try:
        content = bytearray(before[0])
        content[-1] ^= 1
        weights.write_bytes(content)
        result = deltafmt.pack(pair.base, pair.finetuned, out)
        assert result.resumed == 0
        assert out.read_bytes() == pack_afresh(tmp_path, pair)
    finally:
        weights.write_bytes(before[0])
        os.utime(weights, ns=(before[1].st_atime_ns, before[1].st_mtime_ns))


def test_a_changed_small_file_is_taken_as_it_is_now(
    stop_after: Callable[..., Path], tmp_path: Path, pair: Pair
) -> None:
    out = stop_after()
    card = pair.finetuned / "README.md"
    before = card.read_bytes()
    try:
        card.write_bytes(b"rewritten in the meantime")
        deltafmt.pack(pair.base, pair.finetuned, out)
        with deltafmt.open(out) as opened:
            assert opened.attachment("README.md") == b"rewritten in the meantime"
        assert out.read_bytes() == pack_afresh(tmp_path, pair)
    finally:
        card.write_bytes(before)


def _flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize("place", [0.0, 0.1, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("which", [".d.deltafmt.partial", ".d.deltafmt.partial.journal"])
def test_a_damaged_partial_file_is_never_trusted(
    stop_after: Callable[..., Path], tmp_path: Path, pair: Pair, which: str, place: float
) -> None:
    expected = pack_afresh(tmp_path, pair)
    out = stop_after(6)
    _flip(out.with_name(which), place)
    deltafmt.pack(pair.base, pair.finetuned, out)
    assert out.read_bytes() == expected
    assert not out.with_name(which).exists()


@pytest.mark.parametrize("which", [".d.deltafmt.partial", ".d.deltafmt.partial.journal"])
@pytest.mark.parametrize("change", ["cut", "emptied", "grown", "replaced", "removed"])
def test_a_partial_file_of_another_length_is_never_trusted(
    stop_after: Callable[..., Path], tmp_path: Path, pair: Pair, which: str, change: str
) -> None:
    expected = pack_afresh(tmp_path, pair)
    out = stop_after(6)
    path = out.with_name(which)
    content = path.read_bytes()
    half = content[: len(content) // 2]
    new = {"cut": half, "emptied": b"", "grown": content + b"\xff" * 999, "replaced": b"?" * 999}
    if change == "removed":
        path.unlink()
    else:
        path.write_bytes(new[change])
    result = deltafmt.pack(pair.base, pair.finetuned, out)
    assert out.read_bytes() == expected
    assert (result.resumed > 0) is (change in ("grown", "cut"))
    assert not path.exists()
