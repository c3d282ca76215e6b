"""Every rule of the specification has a vector that only its check refuses; every wrong reader is caught by a vector."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

SPEC = Path(__file__).resolve().parent.parent / "spec"
sys.path.insert(0, str(SPEC))

import mutants  # noqa: E402
import mutation  # noqa: E402
import musts  # noqa: E402
import suite  # noqa: E402
from rules import RULES  # noqa: E402

VECTORS = {path.stem: suite.load(path.stem) for path in suite.FOLDER.glob("*.vec")}


def test_a_reader_without_a_rule_accepts_the_files_that_break_it() -> None:
    refused = {
        (rule.section, rule.words, name)
        for rule in RULES
        for name in rule.vectors
        if not mutation.mistaken(VECTORS[name], rule.without)
    }
    assert refused == set()


def test_rules_say_what_the_specification_says() -> None:
    assert musts.unnamed() == []


def test_every_bad_vector_breaks_a_rule() -> None:
    named = {name for rule in RULES for name in rule.vectors + rule.others}
    bad = {name for name, vector in VECTORS.items() if vector.keys["expect"] != "ok"}
    assert bad - named == set()
    assert named - VECTORS.keys() == set()


@pytest.mark.parametrize("wrong", mutants.WRONG, ids=lambda wrong: wrong.what)
def test_a_vector_catches_every_wrong_reader(wrong: mutants.Wrong) -> None:
    assert mutation.caught(VECTORS[wrong.by], wrong.mutation) is not None
