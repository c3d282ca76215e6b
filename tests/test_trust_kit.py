"""What others need to tell and trust delta files: their type, the schema of ``inspect``, signatures."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
import zlib
from pathlib import Path
from typing import Any

import pytest

import deltafmt
import json_schema
from conftest import Cli
from deltafmt.format.constants import HEADER_MAGIC

ROOT = Path(__file__).resolve().parent.parent
CORPUS = sorted((ROOT / "fuzz" / "corpus").glob("*.deltafmt"))
MEDIA_TYPE = "application/vnd.deltafmt"
SCHEMA: dict[str, Any] = json.loads((ROOT / "docs" / "inspect.schema.json").read_text("utf-8"))


def run(*words: object, code: int = 0, **options: Any) -> str:
    """Run a program and return what it prints."""
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False, **options)
    assert done.returncode == code, done.stderr + done.stdout
    return done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("file") is None, reason="there is no file(1)")
def test_file_tells_a_delta_file_by_its_magic(tmp_path: Path) -> None:
    magic = ROOT / "filetypes" / "deltafmt.magic"
    assert run("file", "-b", "-m", magic, CORPUS[0]).startswith("deltafmt delta of a fine-tuned model, version 1")
    assert run("file", "-b", "--mime-type", "-m", magic, CORPUS[0]).strip() == MEDIA_TYPE
    assert run("file", "-b", "--extension", "-m", magic, CORPUS[0]).strip() == "deltafmt"
    damaged = tmp_path / "d"
    damaged.write_bytes(CORPUS[0].read_bytes().replace(b"\r\n", b"\n"))
    assert "deltafmt" not in run("file", "-b", "-m", magic, damaged)


def test_the_entry_for_desktops_has_the_magic_and_the_ending(tmp_path: Path) -> None:
    path = ROOT / "filetypes" / "deltafmt.xml"
    space = "{http://www.freedesktop.org/standards/shared-mime-info}"
    (entry,) = ET.parse(path).getroot()
    assert entry.get("type") == MEDIA_TYPE
    match = entry.find(f"{space}magic/{space}match")
    glob = entry.find(f"{space}glob")
    assert match is not None
    assert glob is not None
    text = match.get("value", "").replace("\\r", "\r").replace("\\n", "\n")
    value = re.sub(r"\\x(..)", lambda found: chr(int(found[1], 16)), text)
    assert (value.encode("latin-1"), match.get("offset")) == (HEADER_MAGIC, "0")
    assert glob.get("pattern") == "*.deltafmt"
    if shutil.which("update-mime-database"):
        (tmp_path / "packages").mkdir()
        shutil.copy(path, tmp_path / "packages")
        run("update-mime-database", tmp_path)
        assert f"{MEDIA_TYPE}:*.deltafmt" in (tmp_path / "globs2").read_text()


@pytest.mark.parametrize("path", ["docs/how-to/files-from-strangers.md", "spec/deltafmt-v1.md"])
def test_the_media_type_is_named(path: str) -> None:
    assert f"`{MEDIA_TYPE}`" in (ROOT / path).read_text("utf-8")


def test_inspect_prints_what_its_schema_says(cli: Cli, tmp_path: Path) -> None:
    """Of the seed inputs and of all good vectors: nothing is missing, of another type, or not listed."""
    files = [path.read_bytes() for path in CORPUS]
    for path in sorted((ROOT / "spec" / "vectors").glob("*.vec")):
        head, _, body = path.read_bytes().partition(b"\n\n")
        if head.startswith(b"expect: ok"):
            files.append(zlib.decompress(body))
    for data in files:
        (tmp_path / "d.deltafmt").write_bytes(data)
        found = cli("inspect", tmp_path / "d.deltafmt", "--json").json()
        assert list(json_schema.faults(found, SCHEMA, closed=True)) == [], found
    assert len(files) > 40


def test_the_schema_refuses_what_is_wrong(cli: Cli) -> None:
    right = cli("inspect", CORPUS[0], "--json").json()
    changes: list[tuple[tuple[Any, ...], Any, str]] = [
        (("schema",), 2, ".schema: 2 is not 1"),
        (("bytes",), -1, ".bytes: -1 is below 0"),
        (("bytes",), True, ".bytes: True is no integer"),
        (("content_id",), "x", ".content_id: 'x' does not match"),
        (("profile",), "warm", ".profile: 'warm' is none of"),
        (("removed",), [1], ".removed[0]: 1 is no string"),
        (("tree", "children", 0, "bytes"), None, ".tree.children[0].bytes: None is no integer"),
        (("sections", 0, "codec"), 2, ".sections[0].codec: 2 is none of"),
        (("more",), 1, ": more is not listed"),
    ]
    for place, value, message in changes:
        wrong = copy.deepcopy(right)
        held = wrong
        for key in place[:-1]:
            held = held[key]
        held[place[-1]] = value
        (fault,) = json_schema.faults(wrong, SCHEMA, closed=True)
        assert fault.startswith(message)
    del right["ok"]
    assert list(json_schema.faults(right, SCHEMA)) == [": ok is missing"]


def content_id(path: Path, cli: Cli) -> str:
    """Return the content id, computed from the content."""
    return str(cli("verify", path, "--json").json()["content_id"])


@pytest.fixture
def forms(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Return a file, the same content in another file, and another content."""
    hot, cold, other = (tmp_path / f"{name}.deltafmt" for name in ("hot", "cold", "other"))
    shutil.copy(ROOT / "fuzz" / "corpus" / "hot-fixed.deltafmt", hot)
    deltafmt.repack(hot, cold, profile="cold")
    shutil.copy(ROOT / "fuzz" / "corpus" / "hot-sum.deltafmt", other)
    assert hot.read_bytes() != cold.read_bytes()
    return hot, cold, other


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="there is no ssh-keygen")
def test_a_content_id_is_signed_with_a_key_of_ssh(cli: Cli, tmp_path: Path, forms: tuple[Path, Path, Path]) -> None:
    """As docs/how-to/files-from-strangers.md shows it, with a key that is made here."""
    key, note, signers = tmp_path / "key", tmp_path / "math.id", tmp_path / "allowed_signers"
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
    signers.write_text("maker@example.org " + (tmp_path / "key.pub").read_text())
    note.write_text(content_id(forms[0], cli) + "\n")
    run("ssh-keygen", "-Y", "sign", "-f", key, "-n", "deltafmt", note)
    check = ["ssh-keygen", "-Y", "verify", "-f", signers, "-I", "maker@example.org", "-n", "deltafmt"]
    for path, code in zip(forms, (0, 0, 255), strict=True):
        text = content_id(path, cli) + "\n"
        assert ("Good" in run(*check, "-s", f"{note}.sig", code=code, input=text)) == (code == 0)


def test_openssf_model_signing_signs_the_file_and_the_content_id(
    cli: Cli, tmp_path: Path, forms: tuple[Path, Path, Path]
) -> None:
    """With the package model-signing and a key that is made here; without the package, the test is skipped."""
    pytest.importorskip("model_signing", reason="model-signing is not installed: pip install 'deltafmt[signing]'")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    secret = ec.generate_private_key(ec.SECP256R1())
    private, public = tmp_path / "key.pem", tmp_path / "key.pub"
    private.write_bytes(
        secret.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    public.write_bytes(
        secret.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )

    def sign(path: Path) -> None:
        run(
            sys.executable,
            "-m",
            "model_signing",
            "sign",
            "key",
            "--private_key",
            private,
            "--signature",
            f"{path}.sig",
            path,
        )

    def check(path: Path, signature: Path, code: int = 0) -> None:
        words = ("verify", "key", "--public_key", public, "--signature", signature, path)
        run(sys.executable, "-m", "model_signing", *words, code=code)

    hot, cold, other = forms
    sign(hot)
    check(hot, Path(f"{hot}.sig"))
    signed = hot.read_bytes()
    hot.write_bytes(cold.read_bytes())
    check(hot, Path(f"{hot}.sig"), code=1)  # the same content, but not the same file
    hot.write_bytes(signed)
    note = tmp_path / "math.id"
    note.write_text(content_id(hot, cli) + "\n")
    sign(note)
    for path, code in ((hot, 0), (cold, 0), (other, 1)):
        note.write_text(content_id(path, cli) + "\n")
        check(note, Path(f"{note}.sig"), code)
