"""The regular expressions of ranks: the same as ``re`` finds, in time that grows with a name's length."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltafmt.checkpoint.automaton import MAX_STATES, Automaton
from deltafmt.checkpoint.patterns import MAX_KEY, PatternTable
from deltafmt.errors import InvalidFileError, UnsupportedError
from strategies import examples

ATOMS = ("a", "b", "1", ".", r"\.", "[ab]", "[^a]", r"[a\]]", "[]a]", r"\d", r"\w", "^", "$", "a.b", "-", "_")


def grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Return expressions made of others."""
    counts = st.sampled_from(("*", "+", "?", "*?", "+?", "??", "{2}", "{1,3}", "{,2}", "{2,}", "{", "{a}", ""))
    groups = st.sampled_from(("({})", "(?:{})", "(?P<n>{})"))
    return st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("|".join),
        st.tuples(groups, inner, counts).map(lambda three: three[0].format(three[1]) + three[2]),
    )


EXPRESSIONS = st.recursive(st.sampled_from(ATOMS), grown, max_leaves=6)
NAMES = st.text("ab.1_", max_size=8)


def accepted(key: str) -> bool:
    try:
        re.compile(rf"(.*\.)?({key})$")
    except re.error:
        return False
    return True


@examples(400)
@given(EXPRESSIONS.filter(accepted), st.lists(NAMES, min_size=1, max_size=8))
def test_the_same_as_re(key: str, names: list[str]) -> None:
    try:
        table = PatternTable("rank_pattern", {key: 1})
        found = [table.get(name, 0) for name in names]
    except UnsupportedError:
        return
    assert found == [int(re.match(rf"(.*\.)?({key})$", name) is not None) for name in names]


@examples(200)
@given(st.lists(EXPRESSIONS.filter(accepted), min_size=1, max_size=5), NAMES)
def test_the_first_key_that_matches_decides(keys: list[str], name: str) -> None:
    items = {key: number for number, key in enumerate(keys)}
    try:
        found = PatternTable("rank_pattern", items).get(name, -1)
    except UnsupportedError:
        return
    wanted = (number for key, number in items.items() if re.match(rf"(.*\.)?({key})$", name))
    assert found == next(wanted, -1)


@pytest.mark.parametrize("escaped", [True, False])
def test_plain_keys_are_looked_up(escaped: bool) -> None:
    """No automaton is made for a key without repetitions, however many there are."""
    names = [
        f"model.layers.{layer}.{last}" for layer in range(400) for last in ("q_proj", "k_proj", "v_proj", "o_proj")
    ]
    keys = {re.escape(name) if escaped else name: number for number, name in enumerate(names)}
    table = PatternTable("rank_pattern", keys)
    assert not table._others
    assert len(table._plain) <= 12
    assert [table.get(name, -1) for name in names] == list(range(1600))
    assert table.get("model.layersX1.q_proj", -1) == (-1 if escaped else names.index("model.layers.1.q_proj"))


@pytest.mark.parametrize(
    ("key", "word"),
    [
        ("(.+)+x", "300,000 ways"),
        ("((.*)*)*z", "300,000 ways"),
        ("(?!a)b", "it has"),
        ("(?<=a)b", "it has"),
        (r"(a)\1", "it has"),
        (r"\bq", "it has"),
        ("(?i:a)", "it has"),
        ("a*+", "possessive"),
        (f"(a{{{MAX_STATES}}}b*)", "states"),
        ("a{99999}", "states"),
        ("(((a{1,40}){1,40}){1,40})", "states"),
        ("x" * (MAX_KEY + 1), "characters"),
    ],
)
def test_what_is_refused(key: str, word: str) -> None:
    def find() -> None:
        PatternTable("rank_pattern", {key: 1}).get("model.layers.10.self_attn.q_proj", 0)

    with pytest.raises(UnsupportedError, match=re.escape(word)):
        find()


@pytest.mark.parametrize("key", ["(", "[", "*", "a{2}{3}"])
def test_what_is_no_expression(key: str) -> None:
    with pytest.raises(InvalidFileError, match="is not a regular expression"):
        PatternTable("rank_pattern", {key: 1})


def test_repetitions_that_only_look_endless() -> None:
    """A repetition of a repetition is read if names can be matched in few ways."""
    table = PatternTable("rank_pattern", {r"(\w+\.)*q_proj": 1})
    assert [table.get(name, 0) for name in ("model.layers.1.q_proj", "model.layers.1.k_proj")] == [1, 0]


def test_all_automata_of_a_table_share_their_steps() -> None:
    steps = [100]
    automaton = Automaton("(.*a.*b.*c)$", steps)
    with pytest.raises(UnsupportedError, match="steps"):
        any(automaton.matches(f"{number}abc{number}") for number in range(1000))
