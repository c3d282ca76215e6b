"""The names of attached files: what the rules mean, and that pack writes none that a reader refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import deltafmt
from conftest import Pair, Raw, normal, write_folder
from deltafmt.errors import InvalidFileError, UsageError
from deltafmt.index.file_names import (
    ascii_lower,
    collisions,
    first_collision,
    is_program,
    is_safe_path,
    is_source,
    is_weight_file,
)
from lora_files import small_files
from pairs import pair_of
from situations import situation
from strategies import examples


@pytest.mark.parametrize("name", ["CON", "con .txt", "aux.tar", "a/NUL", "com\u00b9", "LPT3  .x", "CONOUT$", "prn.a"])
def test_devices_are_no_paths(name: str) -> None:
    assert not is_safe_path(name)


@pytest.mark.parametrize("name", ["con\u00a0.txt", "com0", "com10", "null", "\u00b2", "a con", "CONIN", "lpt\u2074"])
def test_what_is_nearly_a_device_is_a_path(name: str) -> None:
    assert is_safe_path(name)


def test_endings_are_those_of_the_name_in_lower_case() -> None:
    assert is_weight_file("a/MODEL.SafeTensors")
    assert is_weight_file("x.PT/readme.md")
    assert is_weight_file("Model.safetensors.INDEX.fp16.json")
    assert not is_weight_file("model.safetensors.index.fp16.json.txt")
    assert not is_weight_file("x.safetensors.index.a/b.json")
    # The sign of kelvin is no K: its lower case depends on whose.
    assert not is_weight_file("x.p\u212al")
    assert is_program("a.SO")
    assert is_program("x/ADAPTER_config.json")
    assert not is_program("so")
    assert is_source("a/b.PY")
    assert not is_source("a.pyi")


PARTS = st.sampled_from(("a", "A", "b", "B"))
NAMES = st.lists(PARTS, min_size=1, max_size=3).map("/".join)


@examples(200)
@given(st.lists(NAMES, unique=True, max_size=8))
def test_without_collisions_all_names_stand_in_one_folder(names: list[str]) -> None:
    lower = [ascii_lower(name) for name in names]
    pairs = [(a, b) for i, a in enumerate(lower) for b in lower[i + 1 :]]
    collide = any(a == b or a.startswith(b + "/") or b.startswith(a + "/") for a, b in pairs)
    assert (first_collision(names) is not None) == collide
    gone = collisions(names)
    assert first_collision([name for name in names if name not in gone]) is None
    assert all(other in names for other in gone.values())


def with_files(folder: Path, *names: str) -> Pair:
    pair = pair_of(folder, {}, {})
    for name in names:
        (pair.finetuned / name).write_bytes(b"{}")
    return pair


@situation("files whose names differ only in the case of letters")
def test_of_two_names_that_differ_in_case_one_travels(tmp_path: Path) -> None:
    pair = with_files(tmp_path, "README.md", "readme.md", "Config.json", "config.json")
    result = deltafmt.pack(pair.base, pair.finetuned, tmp_path / "d.deltafmt")
    assert {"config.json", "readme.md"} <= set(result.attached)
    assert not {"README.md", "Config.json"} & set(result.attached)
    assert result.left_out["README.md"] == "not every system can hold it beside readme.md"
    assert "Config.json" in result.left_out
    deltafmt.verify(tmp_path / "d.deltafmt")


def test_of_an_adapter_and_its_base_the_adapters_name_travels(tmp_path: Path) -> None:
    files = small_files(tmp_path)
    (files.base / "NOTES.txt").write_bytes(b"base")
    (files.adapter / "notes.txt").write_bytes(b"adapter")
    path = deltafmt.import_lora(files.base, files.adapter, tmp_path / "d.deltafmt").path
    with deltafmt.open(path) as delta:
        assert delta.attachment("notes.txt") == b"adapter"
        assert "NOTES.txt" not in delta.container.attachments


@pytest.mark.parametrize(("name", "reason"), [("x.so", "a program"), ("adapter_config.json", "an adapter's")])
def test_programs_do_not_travel_even_if_asked_for(tmp_path: Path, name: str, reason: str) -> None:
    pair = with_files(tmp_path, name)
    with pytest.raises(UsageError, match=f"that can travel: {name} is {reason}"):
        deltafmt.pack(pair.base, pair.finetuned, tmp_path / "d.deltafmt", attach=[name])


def test_a_checkpoint_that_no_delta_can_restore_is_refused(tmp_path: Path) -> None:
    named = write_folder(tmp_path / "named", {"w": normal(1, (40, 64)), "x/__metadata__": normal(2, (4, 4))})
    with pytest.raises(InvalidFileError, match="a delta file has no tensor of this name"):
        deltafmt.pack(named, named, tmp_path / "d.deltafmt")
    half = write_folder(tmp_path / "half", {"w": normal(1, (40, 64)), "f": Raw("F4", (3,), bytes(2))})
    with pytest.raises(InvalidFileError, match=r"F4 \[3\] does not take whole bytes"):
        deltafmt.pack(half, half, tmp_path / "d.deltafmt")
