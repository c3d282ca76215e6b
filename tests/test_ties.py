"""Heads that are tied to embeddings: copies cost nothing, and an untied head is a delta against the embedding."""

from __future__ import annotations

from pathlib import Path

import pytest

import deltafmt
from conftest import Raw, Tensors, nudge, read_folder, write_folder
from deltafmt.errors import WrongBaseError
from tiny_checkpoints import FINE, language_model, tuned

situation = pytest.mark.situation

EMBEDDING = "model.embed_tokens.weight"


def pack(tmp_path: Path, base: Tensors, finetuned: Tensors, name: str = "d") -> deltafmt.DeltaFile:
    a, b = write_folder(tmp_path / name / "base", base), write_folder(tmp_path / name / "ft", finetuned)
    out = tmp_path / name / "d.deltafmt"
    deltafmt.pack(a, b, out, method=FINE)
    deltafmt.unpack(a, out, tmp_path / name / "out")
    return deltafmt.open(out)


def tied() -> tuple[Tensors, Tensors]:
    base = language_model(head=False)
    return base, tuned(base)


@situation("a fine-tune that carries a copy of its tied head: the copy costs nothing, whichever name comes first")
@pytest.mark.parametrize("name", ["lm_head.weight", "aaa.weight", "zzz.weight"])
def test_a_tied_copy_costs_nothing(tmp_path: Path, name: str) -> None:
    base, ft = tied()
    plain = pack(tmp_path, base, ft, "plain")
    with_copy = pack(tmp_path, base, {**ft, name: ft[EMBEDDING]}, "copy")
    assert abs(with_copy.container.size - plain.container.size) <= plain.container.size / 100
    assert (with_copy[EMBEDDING].action, with_copy[name].action) == ("add", "alias")
    assert with_copy.container.features == 0
    found = read_folder(tmp_path / "copy" / "out")
    assert found[name] == found[EMBEDDING]
    for opened in (plain, with_copy):
        opened.close()


def test_a_copy_that_stands_on_both_sides(tmp_path: Path) -> None:
    base, ft = tied()
    with pack(tmp_path, {**base, "lm_head.weight": base[EMBEDDING]}, {**ft, "lm_head.weight": ft[EMBEDDING]}) as delta:
        assert sorted((delta[EMBEDDING].action, delta["lm_head.weight"].action)) == ["add", "alias"]


@situation("a head that was untied from a tied base: a delta against the base's embedding")
@pytest.mark.parametrize("rows", [0, 5])
def test_an_untied_head(tmp_path: Path, rows: int) -> None:
    base, ft = tied()
    head = nudge(base[EMBEDDING], 77, scale=0.003)
    new = nudge(Raw("BF16", (rows, head.shape[1]), bytes(rows * head.shape[1] * 2)), 78) if rows else None
    if new is not None:
        head = Raw("BF16", (head.shape[0] + rows, head.shape[1]), head.data + new.data)
    with pack(tmp_path, base, {**ft, "lm_head.weight": head}) as delta:
        entry = delta["lm_head.weight"]
        assert entry.action == "add"
        assert entry.base is not None
        assert [part.name for part in entry.base.parts] == [EMBEDDING]
        assert delta.container.features == 1
    found = read_folder(tmp_path / "d" / "out")
    assert abs(found["lm_head.weight"].floats() - head.floats()).max() < 0.003


def test_a_head_that_is_the_bases_embedding(tmp_path: Path) -> None:
    base, ft = tied()
    with pack(tmp_path, base, {**ft, "lm_head.weight": base[EMBEDDING]}) as delta:
        assert delta["lm_head.weight"].action == "same"


def test_a_new_head_is_stored_whole(tmp_path: Path) -> None:
    base, ft = tied()
    head = language_model(seed=800)["lm_head.weight"]
    with pack(tmp_path, base, {**ft, "lm_head.weight": head}) as delta:
        assert delta["lm_head.weight"].action == "replace"
        assert delta.container.features == 0


@situation("a base whose tied head stands in its file, or does not: both are the same base")
@pytest.mark.parametrize("packed_with", ["a copy", "no copy"])
def test_a_base_with_and_without_its_tied_copy(tmp_path: Path, packed_with: str) -> None:
    base, ft = tied()
    with_copy = {**base, "lm_head.weight": base[EMBEDDING]}
    head = nudge(base[EMBEDDING], 77, scale=0.003)
    first, second = (with_copy, base) if packed_with == "a copy" else (base, with_copy)
    pack(tmp_path, first, {**ft, "lm_head.weight": head}).close()
    other = write_folder(tmp_path / "other", second)
    delta = tmp_path / "d" / "d.deltafmt"
    assert deltafmt.verify(delta, other).base_tensors
    deltafmt.unpack(other, delta, tmp_path / "out")
    assert read_folder(tmp_path / "out") == read_folder(tmp_path / "d" / "out")
    untied = write_folder(tmp_path / "untied", {**base, EMBEDDING: head})
    with pytest.raises(WrongBaseError):
        deltafmt.verify(delta, untied)


def test_a_real_model_with_a_tied_copy(tmp_path: Path, models: Path) -> None:
    """The file is as large with the copy as without it, within 1%."""
    folder = models / "wordmath"
    tensors = read_folder(folder / "math")
    assert "lm_head.weight" not in tensors
    small = {path.name: path.read_bytes() for path in (folder / "math").iterdir() if "safetensors" not in path.name}
    copied = write_folder(tmp_path / "copy", {**tensors, "lm_head.weight": tensors[EMBEDDING]}, files=small)
    pairs = enumerate((folder / "math", copied))
    sizes = [deltafmt.pack(folder / "base", ft, tmp_path / f"{number}.deltafmt").size for number, ft in pairs]
    assert abs(sizes[1] - sizes[0]) <= sizes[0] / 100


@situation("a head or an embedding under another name")
def test_tables_under_other_names(tmp_path: Path) -> None:
    base = language_model()
    words = {"lm_head.weight": "output.weight", EMBEDDING: "model.tok_embeddings.weight"}
    ft = {words.get(name, name): tensor for name, tensor in tuned(base).items()}
    with pack(tmp_path, base, ft) as delta:
        for before, after in words.items():
            entry = delta[after]
            assert entry.action == "add"
            assert entry.base is not None
            assert [part.name for part in entry.base.parts] == [before]
        assert delta.container.removed == ()
