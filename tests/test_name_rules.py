"""Rules of names, plain spellings, beginnings and layouts, on names and shapes alone."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltafmt.checkpoint.heads import Head, match_heads
from deltafmt.checkpoint.layouts import Slice, match_layouts
from deltafmt.checkpoint.matching import match_shapes
from deltafmt.checkpoint.name_changes import name_changes
from deltafmt.checkpoint.renames import Rename, Renames
from deltafmt.checkpoint.spellings import numberless, plain_name
from deltafmt.errors import UsageError

# Rules of the user's


@pytest.mark.parametrize(
    ("rule", "name", "expected"),
    [
        ("a.=b.", "a.x", "b.x"),
        ("a.=", "a.x", "x"),
        ("=a.", "x", "a.x"),
        ("a.=b.", "x.a.", None),
        ("a.*=b.*", "a.x.y", "b.x.y"),
        ("*.q=*.query", "l.0.q", "l.0.query"),
        ("*.q=*.query", "l.0.q.bias", None),
        ("*.l.*.w=*.h.*.w", "m.l.l.0.w", "m.h.l.0.w"),
        ("a*b*=*-*", "axbyb", "x-yb"),
        ("a*a=*", "a", None),
    ],
)
def test_a_rule(rule: str, name: str, expected: str | None) -> None:
    assert Rename.parse(rule).apply(name) == expected


@given(st.text("ab.", max_size=12), st.text("ab.*", max_size=8))
def test_a_rule_to_itself_changes_nothing(name: str, pattern: str) -> None:
    assert Rename(pattern, pattern).apply(name) in (name, None)


def test_the_first_rule_that_matches_decides() -> None:
    rules = Renames.parse(["a.=x.", "a.b=y", "c=d"], ["p."])
    assert [rules.apply(name) for name in ("a.b", "c", "p.a.b", "p.", "z")] == ["x.b", "d", "x.b", "p.", "z"]
    assert rules.unused(["p.a.b", "a"]) == "c=d"
    assert rules.unused(["p.a.b", "c"]) is None


def test_a_pattern_with_many_stars_ends_soon() -> None:
    assert Rename.parse("*a" * 40 + "=" + "*b" * 40).apply("a" * 1000 + "x") is None


# Spellings


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("_orig_mod.model.norm.weight", "model.norm.weight"),
        ("module.module.model.norm.weight", "model.norm.weight"),
        ("base_model.model.model.layers.0.q_proj.base_layer.weight", "model.layers.0.q_proj.weight"),
        ("m.layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.mlp.weight", "m.layers.0.mlp.weight"),
        ("module.weight", "module.weight"),
        ("a.module.weight", "a.module.weight"),
        ("bert.output.LayerNorm.gamma", "bert.output.LayerNorm.weight"),
        ("layer.gamma", "layer.gamma"),
        ("l.0.block_sparse_moe.experts.2.w3.weight", "l.0.mlp.experts.2.up_proj.weight"),
        ("l.0.feed_forward.w1.weight", "l.0.feed_forward.w1.weight"),
    ],
)
def test_plain_spelling(name: str, plain: str) -> None:
    assert plain_name(name) == plain
    assert plain_name(plain) == plain


def test_names_are_told_in_few_words() -> None:
    pairs = [(f"a.layers.{i}.w", [f"b.layers.{i}.w"]) for i in range(12)] + [("x", ["x"]), ("a.n.w", ["b.n.w"])]
    joined = [(f"l.{i}.qkv", [f"l.{i}.q", f"l.{i}.k"]) for i in range(3)]
    assert [change.to_obj() for change in name_changes(pairs + joined)] == [
        {"name": "a.*", "base": ["b.*"], "tensors": 13},
        {"name": "l.*.qkv", "base": ["l.*.q", "l.*.k"], "tensors": 3},
    ]
    assert numberless("a.10.b2.c") == "a.*.b2.c"


# Beginnings


def always(_: str, __: str) -> bool:
    return True


def test_beginnings_of_several_parts() -> None:
    base = [f"model.layers.{i}.up.w" for i in range(3)] + [f"visual.blocks.{i}.up.w" for i in range(2)] + ["model.n.w"]
    wanted = {
        name: name.replace("model.language.", "model.") if "language" in name else name.removeprefix("model.")
        for name in (
            *(f"model.language.layers.{i}.up.w" for i in range(3)),
            *(f"model.visual.blocks.{i}.up.w" for i in range(2)),
            "model.language.n.w",
        )
    }
    found = match_heads(wanted, base, always)
    assert found.names == wanted
    assert set(found.heads) == {Head("model.language", "model"), Head("model", "")}


def test_the_part_of_the_base_that_fits_best() -> None:
    """The other part has fewer layers, or other shapes."""
    text = [f"text.layers.{i}.up.w" for i in range(3)]
    wanted = [name.removeprefix("text.") for name in text]
    assert match_heads(wanted, [*text, "eye.layers.0.up.w", "eye.layers.1.up.w"], always).heads == [Head("", "text")]
    eye = [name.replace("text", "eye") for name in text]
    assert match_heads(wanted, [*text, *eye], lambda _, other: "text" in other).heads == [Head("", "text")]
    both = match_heads(wanted, [*text, *eye], always)
    assert both.names == {}
    assert {head.base for head in both.ambiguous[0]} == {"text", "eye"}


def test_a_shared_last_word_is_no_match() -> None:
    assert match_heads(["score.weight"], ["lm_head.weight"], always).names == {}
    assert match_heads(["score.norm.weight"], ["model.norm.weight"], always).names == {}


# Layouts


@given(
    st.integers(1, 4),
    st.lists(st.integers(1, 5), min_size=3, max_size=3),
    st.integers(1, 6),
    st.booleans(),
)
def test_what_is_joined_one_way_is_apart_the_other_way(layers: int, rows: list[int], columns: int, bias: bool) -> None:
    apart = {
        f"l.{i}.attn.{name}_proj.{end}": (size, columns)[: 1 if end == "bias" else 2]
        for i in range(layers)
        for name, size in zip("qkv", rows, strict=True)
        for end in (("weight", "bias") if bias else ("weight",))
    }
    joined = {
        f"l.{i}.attn.qkv_proj.{end}": (sum(rows), columns)[: 1 if end == "bias" else 2]
        for i in range(layers)
        for end in (("weight", "bias") if bias else ("weight",))
    }
    _check_both_ways(apart, joined)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_stacks_of_experts(number: int, hidden: int, inner: int, in_stacks: bool) -> None:
    start = "l.0.mlp.experts."
    joined = {f"{start}gate_up_proj": (number, 2 * inner, hidden)}
    apart: dict[str, tuple[int, ...]]
    if in_stacks:
        apart = {f"{start}{name}_proj": (number, inner, hidden) for name in ("gate", "up")}
    else:
        joined[f"{start}down_proj"] = (number, hidden, inner)
        apart = {
            f"{start}{i}.{name}_proj.weight": (hidden, inner) if name == "down" else (inner, hidden)
            for i in range(number)
            for name in ("gate", "up", "down")
        }
    _check_both_ways(apart, joined)


def _check_both_ways(apart: dict[str, tuple[int, ...]], joined: dict[str, tuple[int, ...]]) -> None:
    whole = match_layouts(joined, apart)
    assert whole.keys() == joined.keys()
    for name, slices in whole.items():
        assert sum(part.count for part in slices) == math.prod(joined[name])
    pieces = match_layouts(apart, joined)
    assert pieces.keys() == apart.keys()
    places: dict[str, list[tuple[int, int]]] = {}
    for name, slices in pieces.items():
        assert sum(part.count for part in slices) == math.prod(apart[name])
        for part in slices:
            places.setdefault(part.name, []).append((part.start, part.count))
    for name, ranges in places.items():
        position = 0
        for start, count in sorted(ranges):
            assert start == position
            position += count
        assert position == math.prod(joined[name])
    # A slice of the joined tensor leads back to the same elements.
    for name, slices in pieces.items():
        for part in slices:
            inside = 0
            for member in whole[part.name]:
                if inside == part.start:
                    assert (member.name, member.count) == (name, part.count)
                inside += member.count


@pytest.mark.parametrize(
    ("wanted", "base"),
    [
        ({"a.qkv_proj.weight": (9, 4)}, {"a.q_proj.weight": (3, 4), "a.k_proj.weight": (3, 4)}),
        ({"a.qkv_proj.weight": (9, 4)}, {f"a.{n}_proj.weight": (3, 5) for n in "qkv"}),
        ({"a.qkv_proj.weight": (8, 4)}, {f"a.{n}_proj.weight": (3, 4) for n in "qkv"}),
        ({"a.experts.down_proj": (2, 4, 3)}, {f"a.experts.{i}.down_proj.weight": (3, 4) for i in range(2)}),
        ({"a.experts.down_proj": (3, 4, 3)}, {f"a.experts.{i}.down_proj.weight": (4, 3) for i in range(2)}),
        ({"a.experts.down_proj": (2**40, 4, 3)}, {f"a.experts.{i}.down_proj.weight": (4, 3) for i in range(2)}),
    ],
)
def test_what_does_not_go_together(wanted: dict[str, tuple[int, ...]], base: dict[str, tuple[int, ...]]) -> None:
    assert match_layouts(wanted, base) == {}
    assert match_layouts(base, wanted) == {}


def test_layers_that_are_left_on_both_sides_are_told() -> None:
    wanted = {"p.layers.0.a.w": (4, 4), "p.layers.0.x.v": (7, 7), "head.w": (9, 4)}
    base = {"layers.0.a.w": (4, 4), "layers.0.b.u": (5, 5), "other.w": (3, 3)}
    match = match_shapes(wanted, base)
    assert match.slices == {"p.layers.0.a.w": [Slice("layers.0.a.w", 0, 16)]}
    assert match.is_open
    del base["layers.0.b.u"]
    assert not match_shapes(wanted, base).is_open


def test_a_prefix_that_makes_one_name_of_two_is_refused() -> None:
    rules = Renames.parse(strip_prefix=["a."])
    assert rules.stripped(["a.x", "b.x"]) == {"x": "a.x", "b.x": "b.x"}
    with pytest.raises(UsageError, match=r'makes one name of "a\.x" and "x"'):
        rules.stripped(["a.x", "x"])
