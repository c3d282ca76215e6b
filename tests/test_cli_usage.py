"""Wrong and right usage: options, patterns, sizes, help."""

from __future__ import annotations

from pathlib import Path

import pytest

import deltafmt
from conftest import (
    Cli,
    Pair,
    refused,
)
from deltafmt.tools.main import COMMANDS

# Options


USAGE = {
    "N above M": (("--nm", "5:4"), "N = 5"),
    "N of zero": (("--nm", "0:4"), "N = 0"),
    "M of one": (("--nm", "1:1"), "M = 1"),
    "M too large": (("--nm", "1:256", "--index", "fixed"), "M = 256"),
    "M too large for seeded": (("--nm", "1:256"), "256"),
    "M no power of two": (("--nm", "3:12"), "power of two"),
    "rank too wide": (("--nm", "40:100", "--index", "rank", "--profile", "cold"), "2**64"),
    "rank in a hot file": (("--nm", "4:16", "--index", "rank"), "--profile cold"),
    "k of zero": (("--bits", "0"), "k = 0"),
    "k of seven": (("--bits", "7"), "k = 7"),
    "k of nine": (("--bits", "9"), "k = 9"),
    "k below zero": (("--bits", "-1"), "k = -1"),
    "k no number": (("--bits", "four"), "'four'"),
    "nm without colon": (("--nm", "416"), "'416'"),
    "nm with words": (("--nm", "four:sixteen"), "'four:sixteen'"),
    "nm of three": (("--nm", "1:2:3"), "'1:2:3'"),
    "nm empty": (("--nm", ""), "''"),
    "nm half empty": (("--nm", "4:"), "'4:'"),
    "nm with a sign": (("--nm", "4:+16"), "'4:+16'"),
    "nm with other digits": (("--nm", "\u0664:16"), "N:M"),
    "nm endless": (("--nm", "1:" + "9" * 6000), "N:M"),
    "share": (("--share", "3"), "v = 3"),
    "index": (("--index", "random"), "'random'"),
    "grid": (("--grid", "round"), "'round'"),
    "one bit midtread": (("--bits", "1", "--grid", "midtread"), "midrise"),
    "scale": (("--scale", "max"), "'max'"),
    "scale group": (("--scale-group", "-1"), "-1"),
    "scale dtype": (("--scale-dtype", "F16"), "'F16'"),
    "method": (("--method", "delta"), "unknown method 'delta'"),
    "profile": (("--profile", "warm"), "'warm'"),
    "seed below zero": (("--seed", "-1"), "seed -1"),
    "seed too large": (("--seed", str(2**64)), "seed 18446744073709551616"),
    "seed no number": (("--seed", "x"), "'x'"),
    "threads no number": (("--threads", "many"), "'many'"),
    "threads of zero": (("--threads", "0"), "0"),
    "include matches nothing": (("--include", "*.mlp.*"), "pattern '*.mlp.*' matches no tensor"),
    "exclude matches nothing": (("--exclude", "lm_head"), "pattern 'lm_head' matches no tensor"),
    "rule matches nothing": (("--rule", "nothing", "whole"), "pattern 'nothing' matches no tensor"),
    "pattern in another case": (("--include", "MODEL.*"), "pattern 'MODEL.*'"),
    "rule without value": (("--rule", "*", "bits"), "'bits'"),
    "rule with unknown key": (("--rule", "*", "bit=4"), "'bit'"),
    "rule with bad number": (("--rule", "*", "bits=x"), "'x'"),
    "rule with a strange digit": (("--rule", "*", "bits=\u00b2"), "bits"),
    "rule with an endless number": (("--rule", "*", "bits=" + "9" * 6000), "bits"),
    "rule with bad nm": (("--rule", "*", "nm=16"), "'16'"),
    "rule out of range": (("--rule", "*", "nm=9:8"), "N = 9"),
    "rule empty": (("--rule", "*", ""), "rule"),
    "rule of one word": (("--rule", "*"), "--rule"),
    "unknown option": (("--fast",), "--fast"),
    "one checkpoint more": (("third",), "third"),
}


@pytest.mark.parametrize("what", USAGE)
def test_a_wrong_option_of_pack(tmp_path: Path, cli: Cli, small: Pair, what: str) -> None:
    arguments, word = USAGE[what]
    refused(cli("pack", small.base, small.finetuned, "-o", tmp_path / "o", *arguments), 2, word)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((), "COMMAND"),
        (("pak",), "pak"),
        (("--fast",), "COMMAND"),
        (("pack",), "BASE"),
        (("pack", "a"), "FINETUNED"),
        (("pack", "a", "b"), "-o OUT"),
        (("pack", "a", "b", "-o"), "-o"),
        (("unpack", "a", "b"), "-o"),
        (("unpack", "a", "-o", "x"), "DELTA"),
        (("unpack", "a", "b", "-o", "x", "--max-shard-size", "5XB"), "'5XB'"),
        (("unpack", "a", "b", "-o", "x", "--max-shard-size", "0"), "'0'"),
        (("inspect",), "DELTA"),
        (("inspect", "a", "b"), "b"),
        (("verify",), "DELTA"),
        (("repack", "a", "-o", "b"), "--profile"),
        (("repack", "a", "--profile", "hot"), "-o"),
        (("repack", "a", "-o", "b", "--profile", "warm"), "'warm'"),
        (("diff", "a"), "B"),
    ],
)
def test_wrong_usage(cli: Cli, arguments: tuple[str, ...], word: str) -> None:
    refused(cli(*arguments), 2, word)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "COMMAND is missing (see deltafmt --help)"),
        (("unpak", "a"), "unknown command 'unpak'; there are pack, methods, "),
        (("unpack",), "BASE, DELTA, -o are missing (see deltafmt unpack --help)"),
        (("unpack", "a", "b"), "-o is missing (see deltafmt unpack --help)"),
        (("unpack", "a", "b", "-o"), "-o needs a value (see deltafmt unpack --help)"),
        (("pack", "--rule", "*"), "--rule needs 2 values (see deltafmt pack --help)"),
        (("verify", "a", "--threads", "two"), "--threads 'two' is not a whole number (see deltafmt verify --help)"),
        (("inspect", "a", "b"), "one argument too many: 'b' (see deltafmt inspect --help)"),
        (("inspect", "a", "--fast"), "inspect has no option --fast (see deltafmt inspect --help)"),
        (
            ("pack", "a", "b", "--method", "rtn", "--method", "svd"),
            "--method is given twice (see deltafmt pack --help)",
        ),
        (("pack", "a", "b", "--bits", "3", "--bits", "3"), "--bits is given twice (see deltafmt pack --help)"),
        (("--tensors", "inspect", "a"), "--tensors stands before the command; write it after: deltafmt inspect ..."),
    ],
)
def test_what_is_wrong_is_said_in_plain_words(cli: Cli, arguments: tuple[str, ...], message: str) -> None:
    assert refused(cli(*arguments), 2).startswith(message)


@pytest.mark.parametrize("command", ["unpack", "repack", "import-lora", "export-lora"])
def test_only_pack_writes_to_standard_output(cli: Cli, command: str) -> None:
    inputs = {"repack": ("a", "--profile", "hot"), "export-lora": ("a",)}.get(command, ("a", "b"))
    refused(cli(command, *inputs, "-o", "-"), 2, f"{command} does not write to standard output")
    assert not Path("-").exists()


def test_json_before_the_command(cli: Cli) -> None:
    result = cli("--json", "inspect", "a")
    assert result.code == 2
    assert result.json()["error"] == "--json stands before the command; write it after: deltafmt inspect ... --json"


@pytest.mark.parametrize("command", ["verify", "unpack"])
def test_no_threads(tmp_path: Path, cli: Cli, small: Pair, delta: Path, command: str) -> None:
    arguments = {"verify": (delta,), "unpack": (small.base, delta, "-o", tmp_path / "out")}[command]
    refused(cli(command, *arguments, "--threads", "0"), 2, "0 threads are fewer than one")


def test_json_and_the_file_itself_cannot_share_standard_output(cli: Cli, small: Pair) -> None:
    result = cli("pack", small.base, small.finetuned, "-o", "-", "--json")
    assert result.code == 2
    assert "standard output" in result.json()["error"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help(cli: Cli, command: str) -> None:
    result = cli(command, "--help")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(f"usage: deltafmt {command} ")
    assert "--json" in result.out
    overview = cli("--help")
    assert overview.code == 0
    assert command in overview.out


def test_version(cli: Cli) -> None:
    assert cli("--version").out == f"deltafmt {deltafmt.__version__}\n"


def test_shard_sizes(tmp_path: Path, cli: Cli, small: Pair, delta: Path) -> None:
    for size, several in (("10KB", True), ("10KiB", True), ("12000", True), ("1 gb", False)):
        out = tmp_path / size
        assert cli("unpack", small.base, delta, "-o", out, "--max-shard-size", size).code == 0
        assert (len(list(out.glob("*.safetensors"))) > 1) is several


def test_the_settings_of_the_garbage_collector_are_put_back(cli: Cli) -> None:
    import gc

    before = gc.get_threshold()
    assert cli("methods").code == 0
    assert cli("inspect", "nowhere.deltafmt").code == 5
    assert gc.get_threshold() == before
