"""The table of rules in ``musts.md``, and what of the specification's text it must name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from rules import RULES, Rule

SPECIFICATION = Path(__file__).parent / "deltafmt-v1.md"

# Sentences with MUST that no file can break: what a writer does, and what a program says.
OF_PROGRAMS = {
    "5.4": ("one that verifies a file MUST",),
    "7.6": ("MUST compute it anew from the index", "MUST say that the content id was not checked"),
    "7.10": ("Whoever restores files MUST compare their digests before the files appear",),
    "17.1": ("Whoever restores a tensor MUST refuse a base that differs from the recorded one",),
    "17.6": ("A verifier with the base MUST restore all chunks",),
    "7.9": ("so whoever writes attachments into a folder MUST NOT write a file",),
    "7.5": ("then the result MUST say so",),
    "18": (
        "MUST compute the content id of every link anew",
        "MUST refuse a chain in which they differ",
        "MUST refuse a file with a parent unless",
    ),
    "11.4": ("The seed MUST NOT be chosen by the error that it gives",),
}

HEAD = """# Rules of the specification, and the vectors that isolate them

Made by `make_vectors.py` from `rules/`. A vector *isolates* a rule if nothing else is wrong with its file: checksums,
digests, lengths and seal are right. A test shows this for every one of them: this package's reader *without* that one
check accepts the file. Some rules are about right files. For those, good vectors stand here, of which a reader without
the rule gives a wrong result.

"""


def table() -> str:
    """Return the page."""
    isolated = {name for rule in RULES for name in rule.vectors}
    rows = list(_rows())
    open_rules = sum(not row[2] for row in rows)
    lines = [
        f"{len(rows)} rules; {len(isolated)} vectors isolate one. {open_rules} rules have none, for the reason given.",
        "",
        "| section | rule | vectors that isolate it | further vectors, and why they do not |",
        "|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    return HEAD + "\n".join(lines) + "\n"


def _rows() -> Iterator[tuple[str, str, str, str]]:
    groups: dict[tuple[str, str], list[Rule]] = {}
    for rule in RULES:
        groups.setdefault((rule.section, rule.words), []).append(rule)
    for (section, words), rules in sorted(groups.items(), key=lambda item: _order(item[0][0])):
        vectors = dict.fromkeys(name for rule in rules for name in rule.vectors)
        others = dict.fromkeys(name for rule in rules for name in rule.others)
        reasons = dict.fromkeys(rule.reason for rule in rules if rule.reason)
        last = ": ".join(part for part in (", ".join(others), "; ".join(reasons)) if part)
        yield section, words.replace("|", "\\|").rstrip(" \\|"), ", ".join(vectors), last


def _order(section: str) -> tuple[int, ...]:
    return tuple(int(part) for part in section.split("."))


def sections() -> dict[str, str]:
    """Return the text of every numbered section, in one line."""
    found: dict[str, list[str]] = {}
    number = ""
    for line in SPECIFICATION.read_text(encoding="utf-8").splitlines():
        match = re.match(r"(?:#+ (\d+(?:\.\d+)?)\.? |(\d+\.\d+)\. )", line)
        if match:
            number = match[1] or match[2]
        elif line.startswith("#"):
            number = ""
        found.setdefault(number, []).append(line)
    return {number: re.sub(r"\s+", " ", " ".join(lines)) for number, lines in found.items()}


def unnamed() -> list[str]:
    """Return the sentences with MUST that no rule has the words of, and the words of rules that the text has not."""
    text = sections()
    wrong = [
        f"{rule.section} does not say: {rule.words}" for rule in RULES if rule.words not in text.get(rule.section, "")
    ]
    for number, whole in text.items():
        named = [rule.words for rule in RULES if rule.section == number] + list(OF_PROGRAMS.get(number, ()))
        wrong += [
            f"{number} has no rule for: {sentence}"
            for sentence in re.split(r"(?<=[.:;|]) ", whole)
            if "MUST" in sentence
            and number not in {"", "2", "15"}
            and not any(_meet(words, sentence) for words in named)
        ]
    return wrong


def _meet(words: str, sentence: str) -> bool:
    return words in sentence or sentence.rstrip(" .;:") in words
