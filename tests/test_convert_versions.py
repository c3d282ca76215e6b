"""Which versions ``deltafmt convert`` says: what source, base and caller know, and no guess that they contradict."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import deltafmt
from conftest import Cli, Tensors, normal, read_file, refused, write_folder
from deltafmt.errors import InvalidFileError, UsageError, WrongBaseError
from foreign_files import INDEX, apply_sparse_file, write_sparse_file, write_version_folder

# Two steps that change some elements, of which the second takes one back.
STATES: list[Tensors] = [{"w": normal(1, (256, 256)), "v": normal(2, (8,))}]
for changed in ((3, 7, 70), (70, 90)):
    data = bytearray(STATES[-1]["w"].data)
    for place in changed:
        data[2 * place] ^= 1
    STATES.append(STATES[-1] | {"w": replace(STATES[-1]["w"], data=bytes(data))})


def written(where: Path) -> list[Path]:
    return [write_folder(where / f"c{number}", state) for number, state in enumerate(STATES)]


def told(delta: Path) -> dict[str, str]:
    with deltafmt.open(delta) as opened:
        return {key: value for key, value in opened.metadata.items() if key.startswith(("convert.", "sync."))}


def metadata_of(path: Path) -> dict[str, str]:
    found: dict[str, str] = read_file(path)[1]["__metadata__"]
    return found


@pytest.mark.parametrize("others", [{}, {"prev_model_version": "{}"}])
def test_a_squash_lies_between_its_ends(tmp_path: Path, others: dict[str, str]) -> None:
    """Two links of one version each: what they give together is two versions later."""
    bases, links = written(tmp_path), []
    for number in (1, 2):
        rest = {key: value.format(number - 1) for key, value in others.items()}
        patch = write_sparse_file(
            tmp_path / f"{number}.safetensors", *STATES[number - 1 : number + 1], model_version=str(number), **rest
        )
        links.append(tmp_path / f"{number}.deltafmt")
        deltafmt.convert(patch, links[-1], bases[number - 1], parent=links[-2] if number > 1 else None)
    both, out = tmp_path / "both.deltafmt", tmp_path / "both.safetensors"
    deltafmt.squash(links, both, base=bases[0])
    deltafmt.convert(both, out, bases[0], "trl")
    assert (metadata_of(out)["model_version"], metadata_of(out)["prev_model_version"]) == ("2", "0")
    assert apply_sparse_file(out, STATES[0]) == STATES[2]
    with pytest.raises(WrongBaseError, match=r"was made on version 0, and what .*1.deltafmt gives is version 1"):
        deltafmt.convert(out, tmp_path / "x.deltafmt", bases[1], parent=links[0])


def test_a_squash_of_links_that_count_otherwise_says_no_version(tmp_path: Path) -> None:
    bases = written(tmp_path)
    one, two = tmp_path / "1.deltafmt", tmp_path / "2.deltafmt"
    deltafmt.pack(bases[0], bases[1], one, method=deltafmt.methods.Exact())
    deltafmt.convert(write_version_folder(tmp_path / "v", *STATES[1:]), two, bases[1], parent=one)
    deltafmt.squash([one, two], tmp_path / "both.deltafmt", base=bases[0])
    assert told(tmp_path / "both.deltafmt") == {}


def messages(where: Path, bases: list[Path], **options: Any) -> tuple[list[Any], list[Path]]:
    """Publish the states, and return the messages with the files that they are in."""
    safetensors = pytest.importorskip("safetensors.torch")
    states = [safetensors.load_file(base / "model.safetensors") for base in bases]
    publisher = deltafmt.sync.Publisher(base=states[0], **options)
    sent = [publisher.publish(state) for state in states[1:]]
    files = [where / f"m{message.version}.deltafmt" for message in sent]
    for file, message in zip(files, sent, strict=True):
        file.write_bytes(message.data)
    return sent, files


def test_a_squash_of_messages_knows_its_versions_and_is_no_message(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    bases = written(tmp_path)
    sent, files = messages(tmp_path, bases)
    assert [message.kind for message in sent] == ["patch", "patch"]
    both = tmp_path / "both.deltafmt"
    deltafmt.squash(files, both, base=bases[0])
    result = deltafmt.convert(both, tmp_path / "v", bases[0], "version-folder")
    assert (result.version, result.base_version) == ("000002", "000000")
    assert told(both) == {"convert.version": "2", "convert.base_version": "0"}


def test_an_anchor_does_not_say_which_version_comes_before(tmp_path: Path, cli: Cli) -> None:
    pytest.importorskip("torch")
    bases = written(tmp_path)
    sent, files = messages(tmp_path, bases, version=4, anchor_every=1)
    assert [message.kind for message in sent] == ["anchor", "anchor"]
    words = ("convert", files[0], "-o", tmp_path / "v", "--base", bases[0], "--to", "version-folder", "--tensors-only")
    refused(cli(*words), 2, "which version comes before '5' is not known", "--base-version V says which")
    assert "version 000005 on 000003" in cli(*words, "--base-version", "3").out


def test_a_base_that_is_known_is_not_guessed(tmp_path: Path) -> None:
    bases = written(tmp_path)
    patch = write_version_folder(tmp_path / "v", *STATES[:2], version="000001", base="000000")
    out = tmp_path / "t.safetensors"
    result = deltafmt.convert(patch, out, bases[0], "trl", version="9")
    assert (result.version, result.base_version) == ("9", "0")


def noted(base: Path, version: str) -> None:
    (base / ".weight_sync").mkdir()
    (base / ".weight_sync" / "state.json").write_text(json.dumps({"version": version}))


def test_what_an_engine_has_noted_is_compared_with_delta_files_too(tmp_path: Path) -> None:
    bases = written(tmp_path)
    noted(bases[0], "000005")
    delta = tmp_path / "d.deltafmt"
    deltafmt.pack(bases[0], bases[1], delta, method=deltafmt.methods.Exact())
    with pytest.raises(UsageError, match="version 000001 cannot be made on version 000005"):
        deltafmt.convert(delta, tmp_path / "weight_v000001", bases[0], "version-folder")
    with pytest.raises(WrongBaseError, match=r"was made on version 000007, and the checkpoint .* is version 000005"):
        deltafmt.convert(delta, tmp_path / "v", bases[0], "version-folder", version="9", base_version="000007")
    result = deltafmt.convert(delta, tmp_path / "v", bases[0], "version-folder", version="9")
    assert (result.version, result.base_version) == ("000009", "000005")
    converted = tmp_path / "1.deltafmt"
    deltafmt.convert(write_version_folder(tmp_path / "w", *STATES[1:]), converted, bases[1])
    noted(bases[1], "3")
    with pytest.raises(WrongBaseError, match=r"was made on version 000000, and the checkpoint .* is version 3"):
        deltafmt.convert(converted, tmp_path / "x", bases[1], "version-folder")


@pytest.mark.parametrize("version", ["3", "1", "0"])
@pytest.mark.parametrize("others", [{}, {"prev_model_version": "-1"}])
def test_patches_without_a_base_version_follow_their_parent(
    tmp_path: Path, version: str, others: dict[str, str]
) -> None:
    bases = written(tmp_path)
    one = tmp_path / "1.deltafmt"
    deltafmt.convert(write_sparse_file(tmp_path / "1.safetensors", *STATES[:2]), one, bases[0])
    patch = write_sparse_file(tmp_path / "2.safetensors", *STATES[1:], model_version=version, **others)
    with pytest.raises(WrongBaseError, match=r"wrong base version: .* is version 1"):
        deltafmt.convert(patch, tmp_path / "2.deltafmt", bases[1], parent=one)
    patch = write_sparse_file(tmp_path / "2.safetensors", *STATES[1:], model_version="2", **others)
    assert deltafmt.convert(patch, tmp_path / "2.deltafmt", bases[1], parent=one).parent


WORDS = ("\ud800", "x" * 201, "a b", "", "1\n")


@pytest.mark.parametrize("pair", [("3", "3"), ("3", "7"), ("2", "02"), *((word, "v0") for word in WORDS)])
def test_versions_of_strangers(tmp_path: Path, pair: tuple[str, str]) -> None:
    (base, *_), out = written(tmp_path), tmp_path / "d.deltafmt"
    words = "not one word of at most 200|cannot be made on version|not a short text"
    folder = write_version_folder(tmp_path / "v", *STATES[:2])
    index = json.loads((folder / INDEX).read_text())
    index["metadata"].update(version=pair[0], base_version=pair[1])
    (folder / INDEX).write_text(json.dumps(index))
    sparse = write_sparse_file(
        tmp_path / "p.safetensors", *STATES[:2], model_version=pair[0], prev_model_version=pair[1]
    )
    for patch in (folder, sparse):
        with pytest.raises(InvalidFileError, match=words):
            deltafmt.convert(patch, out, base)
    assert not out.exists()
