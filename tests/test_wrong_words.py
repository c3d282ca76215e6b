"""Wrong words on the command line that somebody new to it would write: each gets one line with a way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import Cli, Pair, refused
from deltafmt.methods import METHODS
from deltafmt.methods.declare import options_of
from deltafmt.tools.main import build_parser
from deltafmt.tools.method_arguments import PREFIX


@pytest.mark.parametrize("method", METHODS)
def test_every_option_of_a_method_is_a_flag_that_takes_a_value(method: str) -> None:
    for key, each in options_of(METHODS[method]).items():
        flag = f"--{key.replace('_', '-')}"
        value = [] if each.is_switch else [each.choices[0] if each.choices else "3"]
        assert each.is_switch == (each.type == "bool") == (not each.metavar)
        options, unknown = build_parser("pack").parse_known_args(["pack", "a", "b", "-o", "c", flag, *value])
        assert not unknown
        assert getattr(options, PREFIX + key) == (value[0] if value else True)


def test_the_level_of_an_archive_is_given_as_a_flag(small: Pair, tmp_path: Path, cli: Cli) -> None:
    sizes = []
    for words in (("exact", "--level", "fast"), ("exact:level=fast",), ("exact",)):
        out = tmp_path / str(len(sizes))
        assert cli("pack", small.base, small.finetuned, "-o", out, "--method", *words).code == 0
        sizes.append(out.stat().st_size)
    assert sizes[0] == sizes[1] > sizes[2]
    start = ("pack", small.base, small.finetuned, "-o", tmp_path / "x", "--method", "exact")
    refused(cli(*start, "--level", "slow"), 2, "level 'slow' is not one of default, fast (see deltafmt methods exact)")
    refused(cli(*start, "--calibration", "t"), 2, "method exact reads no calibration text, so t has no effect")
    refused(cli(*start, "--bits", "4"), 2, "method exact has no option 'bits'; it has level")


def test_fine_tunes_may_stand_behind_options(small: Pair, tmp_path: Path, cli: Cli) -> None:
    assert cli("pack", small.base, "-o", tmp_path / "a", small.finetuned, "--method", "exact").code == 0
    assert cli("pack", "-o", tmp_path / "b", small.base, small.finetuned, "--method", "exact").code == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    refused(cli("pack", small.base, "-o", tmp_path / "c"), 2, "FINETUNED is missing")
    refused(cli("pack", small.base, "-o", tmp_path / "c", small.finetuned, "x"), 2, "one argument too many: 'x'")


def test_a_value_that_is_no_choice(tmp_path: Path, cli: Cli) -> None:
    for words, said in (
        (("unpack", "a", "b", "-o", "c", "--code", "read"), "--code 'read' is not one of write, leave"),
        (("export-lora", "a", "-o", "c", "--for", "x"), "--for 'x' is not one of vllm"),
    ):
        refused(cli(*words), 2, f"{said} (see deltafmt {words[0]} --help)")


def test_base_and_delta_the_other_way_round(delta: Path, small: Pair, tmp_path: Path, cli: Cli) -> None:
    said = refused(cli("unpack", delta, small.base, "-o", tmp_path / "out"), 2)
    assert said == f"{delta} is a delta file and {small.base} a folder; BASE stands before DELTA"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("pack", "", "FT", "-o", "OUT"), "BASE"),
        (("pack", "BASE", "", "-o", "OUT"), "FINETUNED"),
        (("pack", "BASE", "FT", "-o", ""), "-o"),
        (("pack", "--many", "BASE", "FT", "-o", ""), "-o"),
        (("unpack", "BASE", "", "-o", "OUT"), "DELTA"),
        (("verify", ""), "DELTA"),
        (("dedup", "BASE", ""), "FOLDER"),
    ],
)
def test_an_empty_path_is_not_the_current_folder(words: tuple[str, ...], what: str, small: Pair, cli: Cli) -> None:
    names = {"BASE": str(small.base), "FT": str(small.finetuned)}
    refused(cli(*(names.get(word, word) for word in words)), 2, f"{what} is empty, as from a variable that is not set")


def test_an_empty_name_of_the_base_is_none(small: Pair, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "d"
    words = ("pack", small.base, small.finetuned, "-o", out, "--method", "exact", "--base-name", "", "--json")
    assert cli(*words).json()["base_name"] is None
