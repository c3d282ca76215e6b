"""What the commands print: words, tables, JSON, and nothing that a terminal or a pipe chokes on."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import deltafmt
from conftest import (
    SMALL_FILES,
    Cli,
    Pair,
    Result,
    Tensors,
    normal,
    nudge,
    raw,
    refused,
    run_cli,
    write_folder,
    write_pair,
)
from deltafmt.tools.main import COMMANDS

# What the commands print


def test_every_command_in_words(tmp_path: Path, cli: Cli, small: Pair) -> None:
    out = tmp_path / "d.deltafmt"
    packed = cli("pack", small.base, small.finetuned, "-o", out)
    size = os.path.getsize(out)
    weights = os.path.getsize(small.finetuned / "model.safetensors")
    assert f"{size:,} bytes" in packed.out
    assert f"{weights / size:.2f} times smaller" in packed.out
    assert "4 tensors compressed, 1 small one stored whole, 2 same as the base\n" in packed.out
    inspected = cli("inspect", out)
    assert f"{size:,} bytes" in inspected.out
    assert "7 tensors" in cli("verify", out).out
    assert "made for this base (6 tensors compared)" in cli("verify", out, "--base", small.base).out
    repacked = cli("repack", out, "-o", tmp_path / "cold", "--profile", "cold")
    assert deltafmt.open(out).content_id in repacked.out
    assert "7 tensors" in cli("unpack", small.base, out, "-o", tmp_path / "u").out
    assert "0 differences, 7 tensors the same" in cli("diff", out, tmp_path / "cold").out
    differing = cli("diff", small.base, small.finetuned)
    assert "5 differences, 2 tensors the same" in differing.out
    assert "model.embed.weight" in differing.out
    for result in (packed, inspected, repacked, differing):
        assert (result.code, result.err) == (0, "")


def test_matrices_that_are_no_smaller_when_packed_are_no_small_tensors(tmp_path: Path, cli: Cli, small: Pair) -> None:
    packed = cli("pack", small.base, small.finetuned, "-o", tmp_path / "d", "--method", "svd", "--rank", "100")
    assert "0 tensors compressed, 1 small one stored whole, 4 matrices stored whole, 2 same as the base\n" in packed.out
    assert packed.out.count("(no smaller when packed)") == 4


def test_diff_tells_by_its_exit_code_if_it_is_asked_to(cli: Cli, small: Pair) -> None:
    different = cli("diff", small.base, small.finetuned, "--exit-code", "--json")
    assert (different.code, different.json()["equal"]) == (1, False)
    equal = cli("diff", small.base, small.base, "--exit-code", "--json")
    assert (equal.code, equal.json()["equal"]) == (0, True)
    assert cli("diff", small.base, small.finetuned, "--json").json()["equal"] is False


def test_verify_takes_several_files_and_goes_on_after_a_bad_one(tmp_path: Path, cli: Cli, small: Pair) -> None:
    good, bad, missing = tmp_path / "good.deltafmt", tmp_path / "bad.deltafmt", tmp_path / "missing.deltafmt"
    cli("pack", small.base, small.finetuned, "-o", good)
    data = bytearray(good.read_bytes())
    data[4100] ^= 1
    bad.write_bytes(data)
    both = cli("verify", good, good, "--base", small.base)
    assert (both.code, both.err) == (0, "")
    assert both.out.count(f"{good}: file intact, 7 tensors in ") == 2
    result = cli("verify", bad, good, missing)
    assert result.code == 3
    assert f"{good}: file intact" in result.out
    assert [line.split(":")[0] for line in result.err.splitlines()] == ["deltafmt", "deltafmt"]
    assert str(bad) in result.err
    assert str(missing) in result.err
    found = cli("verify", bad, good, missing, "--json").json()
    assert found["ok"] is False
    assert [(file["file"], file["ok"]) for file in found["files"]] == [
        (str(bad), False),
        (str(good), True),
        (str(missing), False),
    ]
    assert [file.get("exit_code") for file in found["files"]] == [3, None, 5]


def test_any_base_fits_a_file_that_holds_every_tensor_whole(tmp_path: Path, cli: Cli, small: Pair) -> None:
    out = tmp_path / "whole.deltafmt"
    cli("pack", small.finetuned / "model.safetensors", small.finetuned, "-o", out)
    same = cli("verify", out, "--base", small.finetuned)
    assert "made for this base (7 tensors compared)" in same.out
    whole = tmp_path / "new.deltafmt"
    before, after = (write_folder(tmp_path / str(seed), {"w": normal(seed, (8, 16))}) for seed in (1, 2))
    cli("pack", before, after, "-o", whole, "--exclude", "*")
    assert "it holds every tensor whole, so any base fits" in cli("verify", whole, "--base", before).out


def test_unpack_does_not_make_a_folder_that_is_named_like_a_file(tmp_path: Path, cli: Cli, small: Pair) -> None:
    delta = tmp_path / "d.deltafmt"
    cli("pack", small.base, small.finetuned, "-o", delta)
    result = cli("unpack", small.base, delta, "-o", tmp_path / "restored.safetensors")
    assert result.code == 2
    assert f"name a folder such as {tmp_path / 'restored'}" in result.err
    assert not (tmp_path / "restored.safetensors").exists()


def test_json_of_every_command(tmp_path: Path, cli: Cli, small: Pair) -> None:
    out = tmp_path / "d.deltafmt"
    size_of = os.path.getsize
    found = cli("pack", small.base, small.finetuned, "-o", out, "--json", "--exclude", "*embed*").json()
    assert found["bytes"] == size_of(out)
    assert found["file"] == str(out)
    assert found["actions"] == {"add": 3, "replace": 2, "same": 2}
    assert found["kept_exactly"] == {"model.embed.weight": "excluded"}
    assert found["finetuned_bytes"] == size_of(small.finetuned / "model.safetensors")
    assert found["ratio"] == round(found["finetuned_bytes"] / found["bytes"], 4)
    results = [found]
    results.append(cli("inspect", out, "--json").json())
    assert results[-1]["content_id"] == found["content_id"]
    assert set(results[-1]["tensors"]) == set(small.b)
    results.append(cli("verify", out, "--base", small.base, "--json").json())
    assert (results[-1]["tensors"], results[-1]["base_tensors"]) == (7, 5)
    results.append(cli("repack", out, "-o", tmp_path / "c", "--profile", "cold", "--json").json())
    assert (results[-1]["bytes"], results[-1]["bytes_before"]) == (size_of(tmp_path / "c"), size_of(out))
    results.append(cli("unpack", small.base, out, "-o", tmp_path / "u", "--json").json())
    assert sorted(results[-1]["files"]) == sorted(SMALL_FILES)
    assert results[-1]["mismatched"] == []
    results.append(cli("diff", out, tmp_path / "c", "--json").json())
    assert (results[-1]["same"], results[-1]["changes"]) == (7, [])
    results.append(cli("diff", small.base, small.finetuned, "--json").json())
    assert {change["name"] for change in results[-1]["changes"]} == {
        name for name in small.b if small.a[name] != small.b[name]
    }
    for result in results:
        assert result["schema"] == 1
        assert result["ok"] is True


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "methods"])
def test_json_of_errors(tmp_path: Path, cli: Cli, command: str) -> None:
    missing = str(tmp_path / "nowhere")
    arguments = {
        "pack": (missing, missing, "-o", "x"),
        "unpack": (missing, missing, "-o", "x"),
        "repack": (missing, "-o", "x", "--profile", "hot"),
        "diff": (missing, missing),
        "import-lora": (missing, missing, "-o", "x"),
        "export-lora": (missing, "-o", "x"),
        "analyze": (missing, missing),
        "evaluate": (missing, missing, missing, "--text", missing),
        "apply": (missing, missing, "-o", "x"),
        "squash": (missing, missing, "-o", "x"),
        "convert": (missing, "-o", "x", "--base", missing),
    }.get(command, (missing,))
    result = cli(command, *arguments, "--json")
    assert result.code == 5
    found = result.json()
    assert (found["schema"], found["ok"], found["exit_code"]) == (1, False, 5)
    assert result.err == f"deltafmt: {found['error']}\n"


def test_json_holds_no_infinity(tmp_path: Path, cli: Cli) -> None:
    """The relative change of a tensor of zeros has no finite value; JSON has no word for it."""
    a = write_folder(tmp_path / "a", {"w": raw(np.zeros((4, 4)), "F32"), "n": raw(np.full((2, 2), np.nan), "F32")})
    b = write_folder(tmp_path / "b", {"w": raw(np.ones((4, 4)), "F32"), "n": raw(np.ones((2, 2)), "F32")})
    result = cli("diff", a, b, "--json")
    assert result.code == 0
    assert {change["name"] for change in result.json()["changes"]} == {"w", "n"}
    assert cli("diff", a, b).code == 0


def test_diff_tells_what_changed(tmp_path: Path, cli: Cli, small: Pair, delta: Path) -> None:
    other = tmp_path / "other.deltafmt"
    rule = ("--rule", "*.down.*", "bits=2,nm=2:16")
    assert cli("pack", small.base, small.finetuned, "-o", other, "--exclude", "*embed*", *rule).code == 0
    changes = {change["name"]: change for change in cli("diff", delta, other, "--json").json()["changes"]}
    assert set(changes) == {"model.embed.weight", "model.layers.0.down.weight"}
    assert "stored whole" in changes["model.embed.weight"]["detail"]
    assert "2:16 bits=2" in changes["model.layers.0.down.weight"]["detail"]
    seeded = tmp_path / "seeded.deltafmt"
    assert cli("pack", small.base, small.finetuned, "-o", seeded, "--seed", "9").code == 0
    changes = {change["name"]: change for change in cli("diff", delta, seeded, "--json").json()["changes"]}
    assert len(changes) == 5
    assert changes["metadata seed"]["detail"] == "0 -> 9"
    a = write_folder(tmp_path / "a", {"x": raw([[1.0, 2.0]], "F32"), "gone": normal(1, (2,))})
    b = write_folder(tmp_path / "b", {"x": raw([[1.0, 4.0]], "F32"), "new": normal(1, (2,))})
    found = {change["name"]: change for change in cli("diff", a, b, "--json").json()["changes"]}
    assert found["gone"]["kind"] == "only in A"
    assert found["new"]["kind"] == "only in B"
    assert found["x"]["largest"] == 2
    assert found["x"]["relative"] == pytest.approx(2 / 5**0.5)


def _sums(node: dict[str, Any]) -> None:
    children = node.get("children", [])
    if children:
        assert sum(child["bytes"] for child in children) == node["bytes"], node["label"]
    for child in children:
        _sums(child)


PACKINGS: dict[str, tuple[str, ...]] = {
    "hot": (),
    "cold": ("--profile", "cold"),
    "fixed": ("--index", "fixed", "--nm", "3:10"),
    "rank": ("--index", "rank", "--profile", "cold"),
    "exact": ("--exclude", "*"),
}


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_tree_of_costs_sums_to_the_file(tmp_path: Path, cli: Cli, small: Pair, packing: str) -> None:
    tensors: Tensors = {**small.b, "model.embed.weight": normal(9, (80, 48))}
    finetuned = write_folder(tmp_path / "ft", tensors, files=SMALL_FILES)
    out = tmp_path / "d.deltafmt"
    assert cli("pack", small.base, finetuned, "-o", out, *PACKINGS[packing]).code == 0
    found = cli("inspect", out, "--json").json()
    assert found["tree"]["bytes"] == found["bytes"] == os.path.getsize(out)
    assert found["tree"]["children"]
    _sums(found["tree"])
    labels = {node["label"]: node for node in found["tree"]["children"]}
    if packing != "exact":
        parts = {node["label"] for node in labels["deltas"]["children"]}
        assert parts == {"codes", "scales", "stored whole", *(["index"] if packing in ("fixed", "rank") else [])}
    stored = sum(tensor["stored_bytes"] for tensor in found["tensors"].values())
    assert found["overhead_bytes"] == found["bytes"] - stored
    for tensor in found["tensors"].values():
        assert tensor["stored_bytes"] == sum(buffer["length"] for buffer in tensor.get("buffers", {}).values())
    # The printed tree has the same numbers.
    text = cli("inspect", out).out
    assert f"{os.path.getsize(out):,}" in text
    for node in found["tree"]["children"]:
        assert node["label"] in text
        assert f"{node['bytes']:,}" in text


def test_inspect_json_gives_the_places_of_buffers(cli: Cli, delta: Path) -> None:
    content = delta.read_bytes()
    with deltafmt.open(delta) as opened:
        found = cli("inspect", delta, "--json").json()["tensors"]
        for name in opened:
            for key, array in opened.buffers(name).items():
                place = found[name]["buffers"][key]
                start = place["file_offset"]
                assert content[start : start + place["length"]] == array.tobytes()


def test_the_table_of_tensors(cli: Cli, small: Pair, delta: Path) -> None:
    lines = cli("inspect", delta, "--tensors").out.splitlines()
    assert lines[0].split() == ["tensor", "dtype", "shape", "bytes", "stored", "how"]
    assert len(lines) == 1 + len(small.b)
    assert any(line.startswith("model.embed.weight") and "70x48" in line and "4:16 bits=4" in line for line in lines)


def test_inspect_reads_no_section(tmp_path: Path, cli: Cli, delta: Path) -> None:
    content = bytearray(delta.read_bytes())
    content[4096 : 4096 + 500] = bytes(500)
    damaged = tmp_path / "damaged.deltafmt"
    damaged.write_bytes(content)
    assert cli("inspect", damaged, "--tensors").code == 0
    assert cli("verify", damaged).code == 3


def test_inspect_loads_neither_numpy_nor_torch(delta: Path) -> None:
    code = (
        "import sys; from deltafmt.tools.main import main; code = main(sys.argv[1:]);"
        "found = {'numpy', 'torch', 'rich', 'transformers'} & set(sys.modules);"
        "sys.exit(f'loaded {found}' if found else code)"
    )
    for more in ((), ("--tensors",), ("--json",)):
        command = [sys.executable, "-c", code, "inspect", str(delta), *more]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def test_the_reading_half_loads_no_torch(delta: Path) -> None:
    code = (
        "import sys, deltafmt; d = deltafmt.open(sys.argv[1]); d.buffers('model.embed.weight');"
        "deltafmt.verify(sys.argv[1]); print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(delta)], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


NASTY = "a\x1b[31mred\x07\r\nb\u202e\u2028c"


def test_names_cannot_reach_the_terminal_raw(tmp_path: Path, cli: Cli) -> None:
    """Names come from files that anyone may have made."""
    a = {"w": normal(1, (64, 64)), NASTY: normal(2, (64, 32)), f"{NASTY}.tied": normal(2, (64, 32))}
    b = {name: nudge(tensor, 5) for name, tensor in a.items()}
    pair = write_pair(tmp_path, a, b)
    delta = tmp_path / "d.deltafmt"
    wrong = write_folder(tmp_path / "wrong", {**a, NASTY: normal(3, (64, 32))})
    results = [
        cli("pack", pair.base, pair.finetuned, "-o", delta),
        cli("inspect", delta),
        cli("inspect", delta, "--tensors"),
        cli("inspect", delta, "--json"),
        cli("diff", pair.base, pair.finetuned),
        cli("verify", delta, "--base", wrong),
        cli("unpack", wrong, delta, "-o", tmp_path / "out"),
        cli("unpack", wrong, delta, "-o", tmp_path / "out", "--force-base"),
        cli("pack", pair.base, pair.finetuned, "-o", tmp_path / "e", "--include", NASTY + "?"),
        cli("inspect", tmp_path / NASTY),
    ]
    assert [result.code for result in results] == [0, 0, 0, 0, 0, 4, 4, 0, 2, 5]
    for result in results:
        for text in (result.out, result.err):
            assert text.replace("\n", "").isprintable()
    assert "\\x1b[31mred" in results[2].out
    for result in results[5:7]:
        refused(result, 4, "\\x1b[31mred")
    refused(results[8], 2)
    refused(results[9], 5)
    assert len(results[2].out.splitlines()) == 4


def test_an_argument_that_is_not_text(tmp_path: Path) -> None:
    """File names are bytes; those that are no UTF-8 must not break the message."""
    command = [os.fsencode(sys.executable), b"-m", b"deltafmt", b"inspect", os.fsencode(tmp_path) + b"/\xff\xfe"]
    done = subprocess.run(command, capture_output=True, check=False)
    refused(Result(done.returncode, done.stdout.decode(), done.stderr.decode()), 5, "no such file")


def test_a_terminal_that_knows_only_ascii(delta: Path) -> None:
    done = run_cli("inspect", delta, env={"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.isascii()


@pytest.mark.parametrize("more", [(), ("--tensors",), ("--json",)])
def test_a_reader_that_stops_early_is_no_error(delta: Path, more: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "deltafmt", "inspect", str(delta), *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()  # before the first byte, as `head -0` does
    assert process.stderr is not None
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait() == 0


def test_pack_to_standard_output(small: Pair, delta: Path) -> None:
    done = run_cli("pack", small.base, small.finetuned, "-o", "-")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == delta.read_bytes()


def test_an_error_while_packing_to_standard_output_prints_no_text_there(small: Pair) -> None:
    done = run_cli("pack", small.base, small.finetuned, "-o", "-", "--nm", "5:4")
    refused(Result(done.returncode, done.stdout.decode(), done.stderr.decode()), 2, "N = 5")


def test_the_module_and_the_script_are_one(delta: Path) -> None:
    done = run_cli("inspect", delta, "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["bytes"] == os.path.getsize(delta)
    done = run_cli("inspect", delta.with_name("nowhere"))
    refused(Result(done.returncode, done.stdout.decode(), done.stderr.decode()), 5, "nowhere")


def test_nothing_is_drawn_where_nobody_watches(tmp_path: Path, small: Pair) -> None:
    done = run_cli("pack", small.base, small.finetuned, "-o", tmp_path / "d", env={"FORCE_COLOR": "1"})
    assert done.returncode == 0
    assert done.stderr == b""
    assert b"\x1b" not in done.stdout


def test_random_command_lines_never_show_a_traceback(tmp_path: Path, cli: Cli, small: Pair, delta: Path) -> None:
    """Words put together at random: whatever comes of it, it is an exit code and clean text."""
    words = [*COMMANDS, "-o", "--json", "--nm", "--bits", "--rule", "--profile", "hot", "--base", "--", "*", "exact"]
    words += [str(small.base), str(small.finetuned), str(delta), str(tmp_path / "x"), "\x1b[0m", "4:16", "-h", ""]
    rng = random.Random(3)
    here = os.getcwd()
    os.chdir(tmp_path)  # whatever a word makes, it makes it here
    try:
        for _ in range(300):
            arguments = [rng.choice(list(COMMANDS)), *rng.choices(words, k=rng.randint(0, 5))]
            result = cli(*arguments)
            assert result.code in (0, 2, 3, 4, 5), (arguments, result)
            assert "Traceback" not in result.err
            assert "internal error" not in result.err, arguments
    finally:
        os.chdir(here)
