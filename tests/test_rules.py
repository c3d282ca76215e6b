"""Every rule of the specification has a vector that only its check refuses; a vector catches every wrong reader."""

from __future__ import annotations

import sys
from pathlib import Path

SPEC = Path(__file__).resolve().parent.parent / "spec"
sys.path.insert(0, str(SPEC))

import musts
import mutants
import mutation
import suite
from rules import RULES

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


def test_a_vector_catches_every_wrong_reader() -> None:
    found = {wrong.what: mutation.caught(VECTORS[wrong.by], wrong.mutation) for wrong in mutants.WRONG}
    assert [what for what, difference in found.items() if difference is None] == []
    assert len(found) == len(mutants.WRONG) > 250
