"""Arguments from Python that mean something else than what was meant end in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import deltafmt
from conftest import Pair
from deltafmt.errors import StorageError, UsageError
from deltafmt.methods import Exact

# The letters of a text, or nothing at all, would be taken for the items of a list.
CASES: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (deltafmt.pack, {"include": "*.weight"}),
    (deltafmt.pack, {"exclude": "*"}),
    (deltafmt.pack, {"attach": "*.txt"}),
    (deltafmt.pack, {"no_attach": b"*"}),
    (deltafmt.pack, {"rules": "*"}),
    (deltafmt.pack, {"rename": "a=b"}),
    (deltafmt.analyze, {"include": "*"}),
    (deltafmt.analyze, {"exclude": "*"}),
]


@pytest.mark.parametrize(("function", "options"), CASES)
def test_one_item_in_the_place_of_a_list(
    function: Callable[..., Any], options: dict[str, Any], small: Pair, tmp_path: Path
) -> None:
    out = [tmp_path / "d"] if function is deltafmt.pack else []
    with pytest.raises(UsageError, match="is one item, and a list of them is needed"):
        function(small.base, small.finetuned, *out, **options)


@pytest.mark.parametrize("option", ["include", "exclude", "attach", "no_attach", "rules", "rename", "strip_prefix"])
def test_what_is_no_list(option: str, small: Pair, tmp_path: Path) -> None:
    """What can be gone through once was read once, and ignored from then on."""
    for given, kind in ((None, "NoneType"), (3, "int"), (iter(["*"]), "list_iterator")):
        options: dict[str, Any] = {option: given}
        with pytest.raises(UsageError, match=f"^{option}: a {kind} is given, and a list is needed$"):
            deltafmt.pack(small.base, small.finetuned, tmp_path / "d", **options)


def test_what_is_no_rule(small: Pair, tmp_path: Path) -> None:
    rules: Any
    for rules in ([()], [("*",)], [("*", Exact(), None)], ["*"], [None], [(None, Exact())], {"*": Exact()}):
        with pytest.raises(UsageError, match="is no rule; give a pattern and a method, or None"):
            deltafmt.pack(small.base, small.finetuned, tmp_path / "d", rules=rules)


def test_one_delta_file_in_the_place_of_a_chain(small: Pair, delta: Path, tmp_path: Path) -> None:
    one: Any
    for one in (delta, str(delta)):
        for run in (
            lambda given: deltafmt.apply(small.base, given, tmp_path / "out"),
            lambda given: deltafmt.squash(given, tmp_path / "out"),
            lambda given: deltafmt.verify(delta, small.base, before=given),
            deltafmt.dedup,
        ):
            with pytest.raises(UsageError, match="is one item, and a list of them is needed"):
                run(one)


def test_what_is_no_method(small: Pair, tmp_path: Path) -> None:
    other: Any
    for other, line in (
        ("exact", "'exact' is no method; deltafmt.methods.parse reads a text"),
        (Exact, "is no method; make one, as by Exact"),
    ):
        for options in ({"method": other}, {"rules": [("*", other)]}):
            with pytest.raises(UsageError, match=line):
                deltafmt.pack(small.base, small.finetuned, tmp_path / "d", **options)


@pytest.mark.parametrize(("name", "why"), [("o" * 300, "file name too long"), ("a\0b", "embedded null byte")])
def test_outputs_that_no_file_can_be(name: str, why: str, small: Pair, delta: Path, tmp_path: Path) -> None:
    out = tmp_path / name
    for run in (
        lambda: deltafmt.pack(small.base, small.finetuned, out, force=True),
        lambda: deltafmt.unpack(small.base, delta, out, force=True),
        lambda: deltafmt.apply(small.base, [delta], out),
        lambda: deltafmt.repack(delta, out, profile="cold"),
        lambda: deltafmt.squash([delta, delta], out),
        lambda: deltafmt.convert(delta, out, small.base, "trl"),
    ):
        with pytest.raises(StorageError, match=why):
            run()


def test_fine_tunes_and_names_that_no_file_can_have(small: Pair, tmp_path: Path) -> None:
    given: Any
    for given in ({3: small.finetuned}, {"a\0b": small.finetuned}):
        with pytest.raises(UsageError, match="is no name for the delta file"):
            deltafmt.pack_many(small.base, given, tmp_path / "many")
    for given in ({"o" * 300: small.finetuned}, {"x": tmp_path / ("o" * 300)}, {"x": "a\0b"}):
        (error,) = deltafmt.pack_many(small.base, given, tmp_path / "many").failed.values()
        assert isinstance(error, StorageError)


def test_shards_without_bytes(small: Pair, delta: Path, tmp_path: Path) -> None:
    for size in (0, -1):
        with pytest.raises(UsageError, match=f"a shard of {size} bytes holds nothing"):
            deltafmt.unpack(small.base, delta, tmp_path / "out", max_shard_bytes=size)
