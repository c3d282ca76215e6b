"""Methods on the command line: shorthands, rules, the command that explains methods, and what pack prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import deltafmt
from conftest import Cli, Pair, refused
from deltafmt.methods import METHODS, parse
from deltafmt.methods.declare import options_of
from method_files import pair_of


def layouts(file: Path) -> dict[str, list[str]]:
    with deltafmt.open(file) as opened:
        return {name: [term.layout.describe() for term in opened[name].terms] for name in opened}


def test_methods_are_listed(cli: Cli) -> None:
    lines = cli("methods").out.splitlines()
    assert [line.split()[0] for line in lines[: len(METHODS)]] == list(METHODS)
    for line, method in zip(lines, METHODS.values(), strict=False):
        assert line.endswith(method.summary)
    assert max(map(len, lines)) <= 100
    found = cli("methods", "--json").json()
    assert (found["schema"], found["ok"]) == (1, True)
    assert [each["name"] for each in found["methods"]] == list(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_explained(cli: Cli, name: str) -> None:
    method = METHODS[name]
    text = cli("methods", name).out
    assert text.startswith(f"{name}: {method.summary}\n")
    assert max(map(len, text.splitlines())) <= 100
    words = " ".join(text.split())
    for key, each in options_of(method).items():
        assert f" {key} ({each.possible}; default: {each.default_text}) " in words
        assert each.help in words
        for need in method.needs.get(key, ()):
            assert f"needs {need.text}" in words
    for said in (method.details, method.paper, method.stores, f"--method {method.example}"):
        assert said in words
    found = cli("methods", name, "--json").json()
    assert (found["schema"], found["ok"]) == (1, True)
    explained = found["method"]
    assert explained["example"] == method.example
    assert [each["key"] for each in explained["options"]] == list(options_of(method))
    # Defaults that are said can be given, where the option has an effect by itself.
    for each in explained["options"]:
        if each["default"] is not None and not each["needs"]:
            assert parse(f"{name}:{each['key']}={each['default']}") == method()


def test_an_unknown_method_is_not_explained(cli: Cli) -> None:
    refused(cli("methods", "rnt"), 2, "unknown method 'rnt', perhaps rtn; there are deltadq")
    assert cli("methods", "rnt", "--json").json()["exit_code"] == 2


def test_the_help_of_pack_fits_a_screen(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in ("80", "100", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        text = cli("pack", "--help").out
        lines = text.splitlines()
        assert len(lines) <= 72
        assert max(map(len, lines)) <= 100
    for flag in (
        *("--output", "--method", "--rule", "--include", "--exclude", "--profile", "--seed", "--threads", "--force"),
        *("--target-ratio", "--target-size", "--candidate", "--plan", "--json", "--nm", "--bits", "--share", "--index"),
        *("--calibration", "--calibration-tokens", "--calibration-length", "--calibration-device", "--tokenizer"),
        *("--sequential", "deltafmt methods NAME", "--missing", "--variant", "--attach", "--no-attach", "--rename"),
    ):
        assert flag in text
    # The commands that the help shows are spelled rightly.
    for spelling in re.findall(r"--method ([a-z-]+:[^\s\"]+)", text):
        parse(spelling)


def test_every_option_of_a_method_is_a_flag(tmp_path: Path, cli: Cli) -> None:
    pair = pair_of(tmp_path, (64, 256), "BF16")
    out = tmp_path / "o"
    files = pair.base, pair.finetuned, "-o", out, "--force"
    for name, flags in (
        ("deltadq:nm=2:8,bits=3,rescale=no", ("--nm", "2:8", "--bits", "3", "--no-rescale")),
        ("bitdelta:mean=group,scale_group=64", ("--mean", "group", "--scale-group", "64")),
        ("svd:bits_per_weight=1.5,bits=4", ("--bits-per-weight", "1.5", "--bits", "4")),
        ("delta-come:bands=1@8+2@1,refit=yes", ("--bands", "1@8+2@1", "--refit")),
        ("magnitude:nm=2:8,index=fixed,share=2", ("--nm", "2:8", "--index", "fixed", "--share", "2")),
    ):
        method = name.partition(":")[0]
        spelled = cli("pack", *files, "--method", name, "--json").json()["content_id"]
        assert cli("pack", *files, "--method", method, *flags, "--json").json()["content_id"] == spelled
        # The same value twice is no contradiction.
        assert cli("pack", *files, "--method", name, *flags, "--json").json()["content_id"] == spelled
    assert cli("pack", *files, "--method", "bitdelta:scale_group=64", "--mean", "group").code == 0


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--method", "rtn:bits=3", "--bits", "4"), "--bits 4 and bits=3 of --method contradict each other"),
        (("--method", "deltadq:nm=4:16", "--nm", "2:16"), "--nm 2:16 and nm=4:16 of --method contradict"),
        (("--method", "deltadq:rescale=yes", "--no-rescale"), "--rescale no and rescale=yes of --method contradict"),
        (("--method", "bitdelta", "--scale-group", "64"), "scale_group needs mean=group"),
        (("--method", "bitdelta:scale_group=64", "--mean", "row"), "scale_group needs mean=group"),
        (("--method", "dare", "--scale", "mse", "--scale-dtype", "F32"), "needs bits"),
        (("--method", "svd", "--rank", "4", "--scale", "mse"), "scale needs bits"),
        (("--method", "magnitude", "--density", ".1", "--share", "8", "--index", "rank"), "needs nm"),
        (("--method", ""), "unknown method ''"),
        (("--method", "help"), "unknown method 'help'; there are deltadq"),
        (("--method", "help"), "(see deltafmt methods)"),
        (("--method", "rtn:bit=3"), "perhaps bits"),
        (("--method", "rtn:bit=3"), "(see deltafmt methods rtn)"),
        (("--method", "bits=3"), "names no method; write NAME:bits=3, such as deltadq:bits=3"),
        (("--method", "rtn,bits=3"), "write rtn:bits=3"),
        (("--rule", "*", "method=rtn,bits=3"), "rule 'method=rtn,bits=3': a method is spelled NAME:key=value"),
        (("--rule", "*", "method=rtn,bits=3"), "write rtn:bits=3"),
        (("--rule", "*", "rtn:bits=3,grid"), "'grid' is not of the form key=value"),
        (("--rule", "*", "mean=row"), "method deltadq has no option 'mean'"),
        (("--target-ratio", "4", "--candidate", "nm=4:16"), "candidate 'nm=4:16': no method is named"),
        (("--method", "rtn", "--tokenizer", "x"), "--tokenizer needs --calibration FILE"),
        (("--threads", "-1"), "threads"),
    ],
)
def test_wrong_methods(tmp_path: Path, cli: Cli, small: Pair, arguments: tuple[str, ...], word: str) -> None:
    refused(cli("pack", small.base, small.finetuned, "-o", tmp_path / "o", *arguments), 2, word)
    assert not list(tmp_path.iterdir())


def test_a_rule_of_pairs_changes_the_commands_method(tmp_path: Path, cli: Cli, small: Pair) -> None:
    out = tmp_path / "o"
    rules = ("--rule", "*.up.*", "bits=2", "--rule", "*.down.*", "rtn:bits=3")
    assert cli("pack", small.base, small.finetuned, "-o", out, "--method", "rtn:scale_group=16", *rules).code == 0
    found = layouts(out)
    assert found["model.embed.weight"] == ["k=4 midtread scale/16"]
    assert found["model.layers.0.up.weight"] == ["k=2 midrise scale/16"]
    # A method that is named has its own defaults.
    assert found["model.layers.0.down.weight"] == ["k=3 midtread scale/128"]


def test_the_tokenizer_is_looked_for_before_any_work(tmp_path: Path, cli: Cli) -> None:
    bare = pair_of(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("one two three\n")
    hint = "has no tokenizer; add --tokenizer PATH"
    for method in (("--method", "gptq"), ("--target-ratio", "4")):
        out = ("-o", tmp_path / "o", "--calibration", text)
        refused(cli("pack", bare.base, bare.finetuned, *out, *method), 2, hint)
    refused(cli("analyze", bare.base, bare.finetuned, "--calibration", text), 2, hint)
    assert not (tmp_path / "o").exists()


def test_narrow_matrices_are_warned_of(tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "o"
    for columns, warned in ((256, True), (320, False)):
        pair = pair_of(tmp_path / str(columns), (64, columns), "BF16")
        said = cli("pack", pair.base, pair.finetuned, "-o", out, "--force").out
        warning = "warning: 1 matrix is 256 columns wide or less; with 4:16 the restored model will probably not work. "
        assert (warning + "Use --nm 2:2, or --target-ratio R" in said) is warned
        assert "1 tensor compressed\n" in said
    pair = pair_of(tmp_path / "again", (64, 256), "BF16")
    for method in ("deltadq:nm=2:2", "rtn"):
        assert "warning" not in cli("pack", pair.base, pair.finetuned, "-o", out, "--force", "--method", method).out


def test_what_a_target_chose_is_said(tmp_path: Path, cli: Cli, small: Pair) -> None:
    out = tmp_path / "o"
    candidates = ("--candidate", "rtn:bits=3", "--candidate", "rtn:bits=2,scale_group=16")
    said = cli("pack", small.base, small.finetuned, "-o", out, "--target-ratio", "1.5", *candidates).out
    lines = said.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("chosen method"))
    chosen = {line.split()[0]: int(line.split()[1]) for line in lines[first + 1 : -1]}
    assert set(chosen) <= {"rtn:bits=3", "rtn:bits=2,scale_group=16"}
    assert sum(chosen.values()) == sum(bool(terms) for terms in layouts(out).values())
    assert lines[-1].endswith("(to compare plans of this pair; lower is better; not an accuracy)")
