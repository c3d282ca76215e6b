"""fuzz/mutate.py and fuzz/repair.py: what is taken apart is put together again; mutations get past the checksums."""

import io
import random
import zlib
from pathlib import Path

import make_corpus
import mutate
import pytest
import repair

import deltafmt
from deltafmt.errors import InvalidFileError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def files():
    found = {path.name: path.read_bytes() for path in sorted((ROOT / "fuzz" / "corpus").glob("*.deltafmt"))}
    for path in sorted((ROOT / "spec" / "vectors").glob("*.vec")):
        head, _, body = path.read_bytes().partition(b"\n\n")
        if head.startswith(b"expect: ok"):
            found[path.name] = zlib.decompress(body)
    return found


def test_a_file_that_is_taken_apart_and_mended_is_the_same_file(files):
    """Checksums, digests, content id and seal are computed here without the reader's code, and must agree with it."""
    for name, data in files.items():
        assert repair.join(repair.split(data)) == data, name


def test_a_seed_names_a_mutation(files):
    data = files["hot-seeded.deltafmt"]
    first, again = ([mutate.mutate(data, random.Random(seed)) for seed in range(50)] for _ in range(2))
    assert first == again
    assert len(set(first)) > 40
    assert all(
        len(changed) <= 9000 for changed in (mutate.mutate(data, random.Random(seed), 9000) for seed in range(50))
    )


def test_mutations_reach_every_part_of_the_reader(files):
    held = list(files.values())
    refused, good = set(), 0
    for seed in range(600):
        try:
            deltafmt.verify(io.BytesIO(mutate.mutate(held[seed % len(held)], random.Random(seed))))
            good += 1
        except InvalidFileError as error:
            refused.add(str(error).split(": ", 1)[1][:8])
    assert good > 30
    places = "tensors[", "layouts[", "sections", "index: e", "the inde", "the trai", "reserved", "the padd", "section "
    assert refused.issuperset(places), refused


def test_any_bytes_can_be_mutated_and_crossed(files):
    rng = random.Random(7)
    for data in (b"", b"\x89DLT\r\n\x1a\n", bytes(5000), rng.randbytes(6000)):
        assert isinstance(mutate.mutate(data, rng), bytes)
        assert mutate.cross(data, files["hot-sum.deltafmt"], rng) == data
    crossed = {
        mutate.cross(files["hot-sum.deltafmt"], files["cold-rank.deltafmt"], random.Random(seed)) for seed in range(20)
    }
    assert len(crossed) > 5


def test_mutations_of_mutations_end(files):
    """A mutated file has indexes that are wrong in every way; mutating it again must not fail, and must end."""
    held = list(files.values())
    for seed in range(2000):
        rng, at = random.Random(seed), seed % len(held)
        changed = mutate.mutate(held[at], rng) if seed % 3 else mutate.cross(held[at], rng.choice(held), rng)
        held[at] = changed if repair.split(changed) else held[at]


def test_the_seed_inputs_can_be_made_anew(tmp_path, capsys):
    """Their bytes follow the version; that they are made, verified, and as many, must hold always."""
    make_corpus.main(tmp_path)
    made, kept = ({path.name for path in folder.glob("*.deltafmt")} for folder in (tmp_path, ROOT / "fuzz" / "corpus"))
    assert made == kept
    assert capsys.readouterr().out.count("tensors") == len(made)
    for name in kept:
        deltafmt.verify(ROOT / "fuzz" / "corpus" / name)
