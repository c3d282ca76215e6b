"""Every tensor that a pair of checkpoints can hold survives pack and unpack."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import deltafmt
from conftest import (
    Pair,
    Raw,
    normal,
    nudge,
    plain,
    raw,
    read_folder,
    small_tensors,
    write_folder,
    write_pair,
)
from deltafmt.errors import NonFiniteError, Remedy, UsageError, WrongBaseError
from deltafmt.methods import DeltaDQ
from pairs import ANCHOR, DTYPES, check_round_trip, pack_pair, pair_of

# Kinds of tensors


def test_tensors_that_only_one_side_has(tmp_path: Path) -> None:
    new = {"new.matrix": normal(2, (20, 30)), "new.vector": normal(3, (30,)), "new.scalar": normal(4, ())}
    pair = pair_of(tmp_path, {"old.matrix": normal(1, (20, 30)), "old.b": normal(5, (3,))}, new)
    delta = pack_pair(pair, tmp_path / "d.deltafmt", missing="removed")
    actions = check_round_trip(pair, delta, tmp_path / "out")
    assert actions == {ANCHOR: "add", **dict.fromkeys(new, "replace")}
    with deltafmt.open(delta) as opened:
        assert opened.container.removed == ("old.b", "old.matrix")
        assert opened.keys() == sorted(pair.b)
        assert "old.b" not in opened
        with pytest.raises(KeyError):
            opened["old.b"]
        with pytest.raises(UsageError, match="replaces the base's"):
            opened.delta("new.matrix")


@pytest.mark.parametrize("rows", [65, 64 + 31, 64 + 32, 150])
def test_a_grown_vocabulary_keeps_its_new_rows_bit_for_bit(tmp_path: Path, rows: int) -> None:
    old = normal(1, (64, 40))
    grown = Raw("BF16", (rows, 40), nudge(old, 2).data + normal(3, (rows - 64, 40)).data)
    pair = pair_of(tmp_path, {"embed": old}, {"embed": grown})
    delta = pack_pair(pair, tmp_path / "d.deltafmt")
    assert check_round_trip(pair, delta, tmp_path / "out")["embed"] == "add"
    unpacked = read_folder(tmp_path / "out")["embed"].data
    assert unpacked[64 * 80 :] == grown.data[64 * 80 :]
    assert unpacked[: 64 * 80] not in (grown.data[: 64 * 80], old.data)
    with deltafmt.open(delta) as opened:
        assert opened.buffers("embed")["new_rows"].tobytes() == grown.data[64 * 80 :]


def test_new_rows_may_hold_anything(tmp_path: Path) -> None:
    old = normal(1, (64, 40), "F32")
    tail = raw(np.full((4, 40), np.nan), "F32")
    pair = pair_of(tmp_path, {"embed": old}, {"embed": Raw("F32", (68, 40), nudge(old, 2).data + tail.data)})
    assert check_round_trip(pair, pack_pair(pair, tmp_path / "d.deltafmt"), tmp_path / "out")["embed"] == "add"


def test_shrunk_rows(tmp_path: Path) -> None:
    old = normal(1, (64, 40))
    shrunk = Raw("BF16", (50, 40), nudge(old, 2).data[: 50 * 80])
    pair = pair_of(tmp_path, {"embed": old}, {"embed": shrunk})
    assert check_round_trip(pair, pack_pair(pair, tmp_path / "d.deltafmt"), tmp_path / "out")["embed"] == "add"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((40, 32), (40, 64)),
        ((40, 32), (32, 40)),
        ((40, 32), (4, 10, 32)),
        ((40,), (50,)),
        ((), (1,)),
        ((8, 4, 32), (8, 5, 32)),
        ((0, 32), (40, 32)),
        ((40, 0), (40, 32)),
    ],
    ids=str,
)
def test_other_changes_of_shape_are_kept_exactly(
    tmp_path: Path, before: tuple[int, ...], after: tuple[int, ...]
) -> None:
    pair = pair_of(tmp_path, {"w": normal(1, before)}, {"w": normal(2, after)})
    assert check_round_trip(pair, pack_pair(pair, tmp_path / "d.deltafmt"), tmp_path / "out")["w"] == "replace"


def test_scalars_vectors_and_empty_tensors_are_kept_exactly(tmp_path: Path) -> None:
    shapes: list[tuple[int, ...]] = [(), (1,), (7,), (4096,), (0,), (0, 5), (5, 0), (0, 0, 3), (1, 1, 1)]
    a = {f"w{i}": normal(i, shape, "F32") for i, shape in enumerate(shapes)}
    b = {f"w{i}": normal(50 + i, shape, "F32") for i, shape in enumerate(shapes)}
    pair = pair_of(tmp_path, a, b)
    actions = check_round_trip(pair, pack_pair(pair, tmp_path / "d.deltafmt"), tmp_path / "out")
    empty = {name for name, tensor in a.items() if not tensor.data}
    assert len(empty) == 4
    assert actions == {ANCHOR: "add", **{name: "same" if name in empty else "replace" for name in a}}


def test_empty_tensors_that_change_dtype(tmp_path: Path) -> None:
    pair = pair_of(tmp_path, {"e": normal(1, (0, 5))}, {"e": normal(1, (0, 5), "F32")})
    delta = pack_pair(pair, tmp_path / "d.deltafmt")
    assert check_round_trip(pair, delta, tmp_path / "out")["e"] == "replace"
    with deltafmt.open(delta) as opened:
        assert opened.buffers("e")["data"].size == 0
    assert [change.name for change in deltafmt.diff(pair.base, pair.finetuned).changes] == [ANCHOR, "e"]


def test_nothing_but_empty_tensors(tmp_path: Path) -> None:
    a, b = {"x": normal(1, (0, 4)), "y": normal(1, (0,))}, {"x": normal(1, (0, 4)), "y": normal(1, (3, 0))}
    pair = write_pair(tmp_path, a, b)
    delta = pack_pair(pair, tmp_path / "d.deltafmt")
    assert check_round_trip(pair, delta, tmp_path / "out") == {"x": "same", "y": "replace"}
    deltafmt.repack(delta, tmp_path / "cold.deltafmt", profile="cold")
    assert deltafmt.verify(tmp_path / "cold.deltafmt", pair.base).tensors == 2


@pytest.mark.parametrize("shape", [(4, 48, 40), (2, 3, 20, 33), (1, 1, 70, 20)], ids=str)
def test_stacked_matrices(tmp_path: Path, shape: tuple[int, ...]) -> None:
    experts = normal(1, shape)
    pair = pair_of(tmp_path, {"experts": experts}, {"experts": nudge(experts, 2)})
    delta = pack_pair(pair, tmp_path / "d.deltafmt", method=DeltaDQ(4, 8, 4))
    assert check_round_trip(pair, delta, tmp_path / "out")["experts"] == "add"


def test_more_experts(tmp_path: Path) -> None:
    old = normal(1, (3, 20, 32))
    pair = pair_of(tmp_path, {"e": old}, {"e": Raw("BF16", (4, 20, 32), nudge(old, 2).data + normal(3, (20, 32)).data)})
    assert check_round_trip(pair, pack_pair(pair, tmp_path / "d.deltafmt"), tmp_path / "out")["e"] == "add"


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    old = normal(1, (64, 48))
    tuned = nudge(old, 2)
    tied = pair_of(tmp_path / "tied", {"embed": old, "lm_head": old}, {"embed": tuned, "lm_head": tuned})
    alone = pair_of(tmp_path / "alone", {"embed": old}, {"embed": tuned})
    delta = pack_pair(tied, tmp_path / "tied.deltafmt")
    assert check_round_trip(tied, delta, tmp_path / "out") == {ANCHOR: "add", "embed": "add", "lm_head": "alias"}
    with deltafmt.open(delta) as opened, deltafmt.open(pack_pair(alone, tmp_path / "alone.deltafmt")) as other:
        assert opened["lm_head"].target == "embed"
        assert np.array_equal(opened.delta("lm_head"), opened.delta("embed"))
        assert np.shares_memory(opened.buffers("lm_head")["codes"], opened.buffers("embed")["codes"])
        assert [s.length for s in opened.container.sections] == [s.length for s in other.container.sections]
    assert deltafmt.verify(delta, tied.base).tensors == 3
    for profile in ("cold", "hot"):
        deltafmt.repack(delta, tmp_path / f"{profile}.deltafmt", profile=profile)
    assert (tmp_path / "hot.deltafmt").read_bytes() == delta.read_bytes()


def test_a_tie_that_the_base_lacks(tmp_path: Path) -> None:
    """The fine-tune stores the head too; the base leaves it to the embedding."""
    old = normal(1, (64, 48))
    tuned = nudge(old, 2)
    pair = pair_of(tmp_path, {"embed": old}, {"embed": tuned, "lm_head": tuned})
    actions = check_round_trip(pair, pack_pair(pair, tmp_path / "d.deltafmt"), tmp_path / "out")
    assert actions == {ANCHOR: "add", "embed": "add", "lm_head": "alias"}


def test_equal_matrices_over_different_bases_are_not_tied(tmp_path: Path) -> None:
    tuned = normal(3, (64, 48))
    pair = pair_of(tmp_path, {"x": normal(1, (64, 48)), "y": normal(2, (64, 48))}, {"x": tuned, "y": tuned})
    actions = check_round_trip(pair, pack_pair(pair, tmp_path / "d.deltafmt"), tmp_path / "out")
    assert actions == {ANCHOR: "add", "x": "add", "y": "add"}


@pytest.mark.parametrize("options", [{"exclude": ["lm_head"]}, {"rules": [("lm_head", None)]}, {"include": ["embed"]}])
def test_a_tied_tensor_that_is_to_be_kept_exactly_is(tmp_path: Path, options: dict[str, Any]) -> None:
    old = normal(1, (64, 48))
    tuned = nudge(old, 2)
    pair = pair_of(tmp_path, {"embed": old, "lm_head": old}, {"embed": tuned, "lm_head": tuned})
    deltafmt.unpack(pair.base, pack_pair(pair, tmp_path / "d.deltafmt", **options), tmp_path / "out")
    assert read_folder(tmp_path / "out")["lm_head"] == tuned


def test_what_is_the_same_costs_no_payload(tmp_path: Path) -> None:
    a, _ = small_tensors()
    pair = write_pair(tmp_path, a, dict(a))
    delta = tmp_path / "d.deltafmt"
    result = deltafmt.pack(pair.base, pair.finetuned, delta)
    assert result.actions == {"same": len(a)}
    assert set(check_round_trip(pair, delta, tmp_path / "out").values()) == {"same"}
    with deltafmt.open(delta) as opened:
        assert not opened.buffers("model.embed.weight")
        assert not opened.delta("model.embed.weight").any()
        assert [section.kind for section in opened.container.sections] == [2]  # the attachments alone
    assert deltafmt.verify(delta, pair.base).base_tensors == len(a)


def test_nan_that_does_not_change_is_the_same(tmp_path: Path) -> None:
    odd = raw(np.full((32, 32), np.nan), "F32")
    pair = pair_of(tmp_path, {"w": odd}, {"w": odd})
    assert check_round_trip(pair, pack_pair(pair, tmp_path / "d.deltafmt"), tmp_path / "out")["w"] == "same"


@pytest.mark.parametrize(("before", "after"), list(itertools.product(DTYPES, DTYPES)))
def test_every_pair_of_dtypes(tmp_path: Path, before: str, after: str) -> None:
    old = normal(1, (50, 70), before)
    pair = pair_of(tmp_path, {"w": old}, {"w": nudge(old, 2, after)})
    assert check_round_trip(pair, pack_pair(pair, tmp_path / "d.deltafmt"), tmp_path / "out")["w"] == "add"
    for name in ("verify", "alone"):
        assert deltafmt.verify(tmp_path / "d.deltafmt", pair.base if name == "verify" else None).tensors == 2


def test_negative_zero_in_the_base_survives(tmp_path: Path) -> None:
    old = raw(np.where(np.arange(64 * 64).reshape(64, 64) % 3, 1.0, -0.0), "F32")
    pair = pair_of(tmp_path, {"w": old}, {"w": nudge(old, 2)})
    check_round_trip(pair, pack_pair(pair, tmp_path / "d.deltafmt"), tmp_path / "out")
    bits = np.frombuffer(read_folder(tmp_path / "out")["w"].data, "<u4")
    assert np.count_nonzero(bits == 0x80000000) > 500


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_a_delta_that_is_not_finite_is_refused_with_its_place(tmp_path: Path, value: float, side: int) -> None:
    old = normal(1, (40, 32), "F32")
    values = [old.floats().copy(), nudge(old, 2).floats().copy()]
    values[side][37, 5] = value
    pair = pair_of(tmp_path, {"w": raw(values[0], "F32")}, {"w": raw(values[1], "F32")})
    with pytest.raises(NonFiniteError, match=r'^tensor "w": the delta at row 37, column 5 is [-a-z]+$') as caught:
        pack_pair(pair, tmp_path / "d.deltafmt")
    assert caught.value.remedy == Remedy("exclude", "w")
    assert not list(tmp_path.glob("*d.deltafmt*"))
    delta = pack_pair(pair, tmp_path / "d.deltafmt", exclude=["w"])
    assert check_round_trip(pair, delta, tmp_path / "out")["w"] == "replace"


def test_a_difference_that_overflows_is_refused(tmp_path: Path) -> None:
    pair = pair_of(tmp_path, {"w": raw(np.full((32, 32), -3e38), "F32")}, {"w": raw(np.full((32, 32), 3e38), "F32")})
    with pytest.raises(NonFiniteError, match='tensor "w"'):
        pack_pair(pair, tmp_path / "d.deltafmt")


def test_a_rescaled_entry_that_overflows_is_refused_or_finite(tmp_path: Path) -> None:
    """The delta itself is finite; times M / N it is not."""
    pair = pair_of(tmp_path, {"w": raw(np.zeros((32, 32)), "F32")}, {"w": raw(np.full((32, 32), 2e38), "F32")})
    try:
        delta = pack_pair(pair, tmp_path / "d.deltafmt")
    except UsageError as error:
        assert '"w"' in str(error)  # noqa: PT017 - either outcome is right
        return
    assert deltafmt.verify(delta, pair.base).tensors == 2
    with deltafmt.open(delta) as opened:
        assert np.isfinite(opened.delta("w")).all()


def test_a_model_of_another_architecture_is_a_wrong_base(tmp_path: Path) -> None:
    a = write_folder(tmp_path / "a", {"x.weight": normal(1, (32, 32))})
    b = write_folder(tmp_path / "b", {"y.weight": normal(2, (32, 32))})
    with pytest.raises(WrongBaseError, match="same shapes under other names"):
        deltafmt.pack(a, b, tmp_path / "d.deltafmt")
    c = write_folder(tmp_path / "c", {"x.weight": normal(1, (32, 48))})
    with pytest.raises(WrongBaseError, match=r'tensor "x\.weight" of shape \[32, 48\] has shape \[32, 32\]'):
        deltafmt.pack(a, c, tmp_path / "d.deltafmt")
    (a / "config.json").write_text('{"model_type": "one"}')
    d = write_folder(tmp_path / "d", {"x.weight": normal(2, (32, 32))}, files={"config.json": b'{"model_type": "two"}'})
    with pytest.raises(WrongBaseError, match=r"'one' model.*'two' model"):
        deltafmt.pack(a, d, tmp_path / "d.deltafmt")


# Names and rules


def _how(pair: Pair, out: Path, **options: Any) -> dict[str, str]:
    """Pack; return for each tensor its N:M and bits, or its action if it has no term."""
    found = {}
    with deltafmt.open(pack_pair(pair, out, **options)) as opened:
        for name in opened:
            found[name] = opened[name].action
            for term in opened[name].terms:
                found[name] = f"{term.layout.n}:{term.layout.m} k={term.layout.bits}"
    return found


def test_include_exclude_and_rules(tmp_path: Path, small: Pair) -> None:
    up0, up10 = "model.layers.0.up.weight", "model.layers.10.up.weight"
    embed, down = "model.embed.weight", "model.layers.0.down.weight"
    default, mine = "4:16 k=4", DeltaDQ(2, 16, 2)
    fixed = {"model.layers.0.norm.weight": "replace", "model.layers.0.frozen.weight": "same", "position_ids": "same"}
    assert _how(small, tmp_path / "0") == {**fixed, **dict.fromkeys((up0, up10, embed, down), default)}
    assert _how(small, tmp_path / "1", include=["*.up.*"]) == {
        **fixed,
        up0: default,
        up10: default,
        embed: "replace",
        down: "replace",
    }
    assert _how(small, tmp_path / "2", exclude=["*.layers.0.*"]) == {
        **fixed,
        up0: "replace",
        down: "replace",
        up10: default,
        embed: default,
    }
    assert _how(small, tmp_path / "3", include=["*.up.*"], exclude=[up0]) == {
        **fixed,
        up0: "replace",
        up10: default,
        embed: "replace",
        down: "replace",
    }
    rules = [("*.layers.*", mine), ("*.layers.0.*", None), (down, mine)]
    assert _how(small, tmp_path / "4", rules=rules) == {
        **fixed,
        up0: "replace",
        up10: "2:16 k=2",
        embed: default,
        down: "2:16 k=2",
    }
    assert _how(small, tmp_path / "5", rules=[("*", mine)], exclude=["*embed*"]) == {
        **fixed,
        up0: "2:16 k=2",
        up10: "2:16 k=2",
        embed: "replace",
        down: "2:16 k=2",
    }


def test_what_is_kept_exactly_says_why(tmp_path: Path) -> None:
    a = {"shape": normal(1, (32, 16)), "tiny": normal(2, (1, 2)), "out": normal(3, (32, 32)), "int": plain(np.eye(3))}
    b = {
        "shape": normal(1, (32, 17)),
        "tiny": normal(5, (1, 2)),
        "out": normal(6, (32, 32)),
        "int": plain(np.ones((3, 3))),
        "new": normal(7, (4, 4)),
    }
    pair = pair_of(tmp_path, a, b)
    result = deltafmt.pack(pair.base, pair.finetuned, tmp_path / "d.deltafmt", exclude=["out"])
    assert result.kept == {
        "shape": "another shape than the base's",
        "tiny": "no smaller when packed",
        "out": "excluded",
        "int": "dtype F64",
        "new": "not in the base",
    }


@pytest.mark.parametrize("where", ["include", "exclude", "rules"])
def test_a_pattern_that_matches_nothing_is_refused(tmp_path: Path, small: Pair, where: str) -> None:
    wrong: Any = [("*.mlp.*", None)] if where == "rules" else ["*.mlp.*"]
    with pytest.raises(UsageError, match=r"pattern '\*\.mlp\.\*' matches no tensor"):
        pack_pair(small, tmp_path / "d.deltafmt", **{where: wrong})
    assert not list(tmp_path.iterdir())
