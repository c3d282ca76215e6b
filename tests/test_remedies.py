"""Errors of the library name keyword arguments; the command line turns them into the options that its users know."""

from __future__ import annotations

import ast
import copy
import inspect
import os
import pickle
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import deltafmt
from conftest import Cli, Pair, normal, raw, refused, write_folder
from deltafmt import errors
from deltafmt.errors import DeltafmtError, Remedy, UsageError
from deltafmt.methods import SVD, DeltaDQ
from deltafmt.tools.remedies import message_of, sentence
from pairs import pair_of

LIBRARY = Path(deltafmt.__file__).parent
# The command line itself.
ELSEWHERE = ("tools",)


def calls() -> Iterator[tuple[str, ast.Call]]:
    """Give every call in the library, with the name of what is called."""
    for path in LIBRARY.rglob("*.py"):
        if path.relative_to(LIBRARY).parts[0] not in ELSEWHERE:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    yield ast.unparse(node.func), node


def classes() -> list[type[DeltafmtError]]:
    """Return every class of the tree."""
    found = [getattr(errors, name) for name in dir(errors)]
    return [each for each in found if isinstance(each, type) and issubclass(each, DeltafmtError)]


@pytest.mark.parametrize("kind", classes())
def test_every_error_carries_its_remedy(kind: type[DeltafmtError]) -> None:
    error = kind("x exists", Remedy("force"))
    for same in (error, copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert type(same) is kind
        assert str(same) == "x exists"
        assert same.remedy == Remedy("force", True)
    moved = error.located("there")
    assert type(moved) is kind
    assert (str(moved), moved.remedy) == ("there: x exists", Remedy("force"))
    assert kind("alone").remedy is None


def test_every_remedy_of_the_library_is_an_argument_and_has_a_sentence() -> None:
    functions = (deltafmt.pack, deltafmt.pack_many, deltafmt.unpack, deltafmt.export_lora, deltafmt.convert)
    known = {name for function in functions for name in inspect.signature(function).parameters}
    found = {ast.literal_eval(call.args[0]) for name, call in calls() if name == "Remedy"}
    assert found == {
        "allow_architecture",
        "base",
        "base_version",
        "calibration",
        "code",
        "encoding",
        "exclude",
        "finetuned",
        "force",
        "limits",
        "missing",
        "no_attach",
        "out",
        "profile",
        "quantized",
        "rename",
        "tensors_only",
        "to",
        "version",
    }
    assert found <= known
    for option in found:
        assert re.match(r"--?[a-z]|NAME=", sentence(Remedy(option, "x")))


def test_no_error_of_the_library_names_an_option_of_the_command_line() -> None:
    checked = 0
    for name, call in calls():
        if re.fullmatch(r"\w+Error|fail", name):
            constants = (node.value for node in ast.walk(call) if isinstance(node, ast.Constant))
            text = "".join(value for value in constants if isinstance(value, str))
            assert not re.search(r"(^|\s)--?[a-z]", text), text
            checked += 1
    assert checked > 200


def test_what_the_command_line_adds() -> None:
    assert message_of(UsageError("a exists", Remedy("force"))) == "a exists; --force replaces it"
    assert message_of(UsageError("no", Remedy("exclude", "a b"))) == "no; --exclude 'a b' stores the tensor whole"
    assert message_of(UsageError("no")) == "no"


def test_the_option_that_the_message_names_helps(tmp_path: Path, cli: Cli) -> None:
    values = np.ones((40, 64), np.float32)
    values[3, 5] = np.nan
    pair = pair_of(tmp_path / "pair", {"w[0]": normal(1, (40, 64))}, {"w[0]": raw(values, "BF16")})
    command = ("pack", pair.base, pair.finetuned, "-o", tmp_path / "d")
    for target in ((), ("--target-ratio", "1.1", "--candidate", "deltadq:bits=2")):
        message = refused(cli(*command, *target), 2, 'tensor "w[0]"')
        option = shlex.split(message.rpartition("; ")[2].removesuffix(" stores the tensor whole"))
        assert option == ["--exclude", "w[[]0]"]
        assert cli(*command, *target, *option).code == 0
        message = refused(cli(*command, *target, *option), 2, str(tmp_path / "d"))
        assert message.endswith(" exists; --force replaces it")
        assert cli(*command, *target, *option, "--force").code == 0
        (tmp_path / "d").unlink()


def test_profiles_and_texts_and_streams(tmp_path: Path, cli: Cli, small: Pair) -> None:
    command = ("pack", small.base, small.finetuned, "-o", tmp_path / "d")
    rank = ("--index", "rank")
    assert refused(cli(*command, *rank), 2, "rank index").endswith("; --profile cold allows it")
    candidate = ("--target-ratio", "1.2", "--candidate", "deltadq:index=rank")
    assert refused(cli(*command, *candidate), 2, "rank index").endswith("; --profile cold allows it")
    assert cli(*command, *candidate, "--profile", "cold").code == 0
    (tmp_path / "d").unlink()
    assert refused(cli(*command, "--method", "gptq"), 2, "method gptq").endswith(
        "; --calibration FILE names a text for the fine-tune to read"
    )
    os.mkfifo(tmp_path / "d")
    assert refused(cli(*command, "--force"), 2, str(tmp_path / "d")).endswith(
        "is not a regular file; -o - writes to standard output"
    )
    os.unlink(tmp_path / "d")
    deltafmt.pack(small.base, small.finetuned, tmp_path / "d", method=DeltaDQ())
    os.mkfifo(tmp_path / "pipe")
    repack = ("repack", tmp_path / "d", "--profile", "cold", "--force", "-o", tmp_path / "pipe")
    assert refused(cli(*repack), 2).endswith("is not a regular file")  # only pack writes to a stream


def test_a_base_for_an_adapter(tmp_path: Path, cli: Cli) -> None:
    name = "h.0.c_attn.weight"
    base = write_folder(tmp_path / "base", {name: normal(1, (40, 24))})
    finetuned = write_folder(tmp_path / "tuned", {name: normal(2, (40, 24))})
    deltafmt.pack(base, finetuned, tmp_path / "d", method=SVD(rank=2))
    command = ("export-lora", tmp_path / "d", "-o", tmp_path / "out")
    assert refused(cli(*command), 2, name).endswith("; --base FOLDER names the base")
