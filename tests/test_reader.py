"""The second reader, spec/reader: it runs all vectors under sanitizers, and agrees with the library on every file."""

from __future__ import annotations

import hashlib
import os
import pty
import random
import re
import runpy
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xxhash
from blake3 import blake3

import c_reader
import deltafmt
from both_readers import compare
from conftest import Pair, normal, nudge, read_folder, write_folder
from deltafmt.methods import METHODS, Exact
from test_every_kind import CASES, file_of, packed_codec
from test_exact_files import everything

ROOT = Path(__file__).resolve().parent.parent
VECTORS = sorted((ROOT / "spec" / "vectors").glob("*.vec"))

pytestmark = pytest.mark.skipif(c_reader.COMPILER is None, reason="there is no C compiler")


def vector(path: Path) -> tuple[dict[str, str], bytes]:
    head, _, body = path.read_bytes().partition(b"\n\n")
    return dict(line.split(": ", 1) for line in head.decode().splitlines()), zlib.decompress(body)


NAMES = ("driver", "apply", "check", "hashes", "hashes-1", "hashes-2", "deltafmt-c")


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the reader's programs, built under the sanitizers."""
    out = tmp_path_factory.mktemp("reader")
    c_reader.build(out, *(f"checked/{name}" for name in NAMES))
    return out / "checked"


@pytest.fixture(scope="module")
def driver(programs: Path) -> Iterator[c_reader.Driver]:
    running = c_reader.Driver(programs / "driver")
    yield running
    running.close()


@pytest.fixture(scope="module")
def command(programs: Path) -> Path:
    return programs / "deltafmt-c"


def run_vectors(*arguments: str | Path) -> None:
    script = ROOT / "spec" / "reader" / "run_vectors.py"
    done = subprocess.run([sys.executable, script, *arguments], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_vectors(programs: Path, tmp_path: Path) -> None:
    """Every vector gives what its header says, and the interface refuses what its header says."""
    run_vectors(programs, ROOT / "spec" / "vectors")
    run_vectors("--unpack", tmp_path, ROOT / "spec" / "vectors")
    done = subprocess.run([programs / "check", tmp_path], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_both_readers_agree_on_vectors(driver: c_reader.Driver, tmp_path: Path) -> None:
    found = {path.stem: compare(vector(path)[1], driver, tmp_path / "x.deltafmt").difference for path in VECTORS}
    assert not {name: difference for name, difference in found.items() if difference}


def test_both_readers_agree_on_every_kind(driver: c_reader.Driver, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    for kind, cases in CASES.items():
        for layout in cases.samples:
            for shape in ((70, 90), (1, 1), (33, 257)):
                try:
                    packed = packed_codec(rng, layout, *shape)
                except ValueError:
                    continue  # the sample does not fit the shape
                data = file_of(*packed, "cold" if layout.cold_only else "hot")
                found = compare(data, driver, tmp_path / "x.deltafmt")
                assert (found.verified, found.difference) == ("ok", ""), (kind, layout, shape)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    a = {
        "w": normal(1, (75, 203)),
        "half": normal(2, (40, 64), "F16"),
        "grown": normal(3, (20, 64)),
        "norm": normal(4, (64,)),
    }
    b = {name: nudge(tensor, seed) for seed, (name, tensor) in enumerate(a.items(), 7)}
    b["grown"] = normal(5, (23, 64))
    return Pair(write_folder(folder / "base", a), write_folder(folder / "finetuned", b), a, b)


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.calibration != "required"])
def test_both_readers_agree_on_every_method(method: str, pair: Pair, driver: c_reader.Driver, tmp_path: Path) -> None:
    for profile in ("hot", "cold"):
        packed = deltafmt.pack(
            pair.base, pair.finetuned, tmp_path / f"{profile}.deltafmt", method=METHODS[method](), profile=profile
        )
        found = compare(packed.path.read_bytes(), driver, tmp_path / "x.deltafmt")
        assert (found.verified, found.difference) == ("ok", "")


def test_exact_tensors_are_restored(pair: Pair, programs: Path, tmp_path: Path) -> None:
    """Over their own base, of every dtype, in every situation; and over another base, they are refused."""
    applied = runpy.run_path(str(ROOT / "spec" / "reader" / "run_vectors.py"))["applied"]
    a, b = everything()
    for number, (before, after) in enumerate(((a, b), (pair.a, pair.b))):
        base = write_folder(tmp_path / f"base{number}", before)
        finetuned = write_folder(tmp_path / f"finetuned{number}", after)
        delta = tmp_path / f"{number}.deltafmt"
        deltafmt.pack(base, finetuned, delta, method=Exact())
        said = {
            f"base.{name}": f"{tensor.dtype} {','.join(map(str, tensor.shape))} {tensor.data.hex()}"
            for name, tensor in before.items()
        }
        found = applied(programs / "apply", delta.read_bytes(), said)
        assert found == {f"tensor.{name}": hashlib.sha256(tensor.data).hexdigest() for name, tensor in after.items()}
        name = next(iter(before))
        dtype, sizes, data = said[f"base.{name}"].split(" ")
        said[f"base.{name}"] = f"{dtype} {sizes} {bytes(len(data) // 2).hex()}"
        assert applied(programs / "apply", delta.read_bytes(), said) == {"apply": "refuse"}


def test_progressive_files_are_served_and_restored(
    pair: Pair, programs: Path, command: Path, driver: c_reader.Driver, tmp_path: Path
) -> None:
    """What every method leaves is restored bit for bit; the first bytes are the file that is packed without it."""
    applied = runpy.run_path(str(ROOT / "spec" / "reader" / "run_vectors.py"))["applied"]
    said = {
        f"base.{name}": f"{tensor.dtype} {','.join(map(str, tensor.shape))} {tensor.data.hex()}"
        for name, tensor in pair.a.items()
    }
    wanted = {f"tensor.{name}": hashlib.sha256(tensor.data).hexdigest() for name, tensor in pair.b.items()}
    for method in ("bitdelta", "dare", "deltadq", "delta-come", "magnitude"):
        file = tmp_path / f"{method}.deltafmt"
        packed = METHODS[method]()
        deltafmt.pack(pair.base, pair.finetuned, tmp_path / "plain", method=packed, force=True)
        deltafmt.pack(pair.base, pair.finetuned, file, method=packed, exact=True)
        assert applied(programs / "apply", file.read_bytes(), said) == wanted, method
        found = compare(file.read_bytes(), driver, tmp_path / "x")
        assert (found.verified, found.difference) == ("ok", "")
        about = run(command, "inspect", file).stdout.decode()
        size, served = re.search(r"served part (\d+) bytes, content id (\w+)", about).groups()
        assert served == deltafmt.verify(tmp_path / "plain").content_id
        (tmp_path / "cut").write_bytes(file.read_bytes()[: int(size)])
        assert served in run(command, "inspect", tmp_path / "cut").stdout.decode()
        assert run(command, "verify", tmp_path / "cut").returncode == 0
        for name in ("w", "half", "grown"):
            (tmp_path / "base.raw").write_bytes(pair.a[name].data)
            words = name, "--base", tmp_path / "base.raw"
            assert run(command, "restore", file, *words).stdout == pair.b[name].data
            served = run(command, "decode", tmp_path / "plain", *words).stdout
            assert run(command, "decode", file, *words).stdout == served != pair.b[name].data
            done = run(command, "restore", tmp_path / "cut", *words)
            assert (done.returncode, done.stdout) == (2, b"")
            assert b"it has no exact part" in done.stderr


def mutations(count: int, seed: int) -> Iterator[bytes]:
    """Yield mutated files; ``fuzz/fuzz_both.py`` takes the same, and as many as one has time for."""
    sys.path.insert(0, str(ROOT / "fuzz"))
    try:
        import mutate
    finally:
        sys.path.pop(0)
    rng = random.Random(seed)
    files = [path.read_bytes() for path in sorted((ROOT / "fuzz" / "corpus").glob("*.deltafmt"))]
    files += [data for expected, data in map(vector, VECTORS) if expected["expect"] == "ok"]
    for _ in range(count):
        yield mutate.mutate(rng.choice(files), rng)


def test_both_readers_agree_on_mutated_files(driver: c_reader.Driver, tmp_path: Path) -> None:
    found = Counter()
    for data in mutations(250, seed=1):
        comparison = compare(data, driver, tmp_path / "x.deltafmt")
        assert not comparison.difference
        found[comparison.verified] += 1
    assert min(found["ok"], found["invalid"], found["unsupported"]) > 0


def test_every_flipped_bit_is_found(driver: c_reader.Driver) -> None:
    """A sample of the bits; the file is read whole, so none may verify."""
    data = (ROOT / "fuzz" / "corpus" / "cold-rank.deltafmt").read_bytes()
    rng = random.Random(5)
    for bit in rng.sample(range(8 * len(data)), 400):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        assert driver.read(bytes(flipped)).verified != "ok", bit


@pytest.mark.parametrize("name", ["hashes", "hashes-1", "hashes-2"])
def test_hashes_are_those_of_the_libraries(name: str, programs: Path) -> None:
    """BLAKE3 and XXH3 of many lengths, in one piece and in parts: with AVX2, with other vectors, with none."""
    rng = random.Random(1)
    sizes = [*range(260), *(1024 * n + more for n in (1, 2, 3, 8, 16, 17, 64, 129, 300) for more in (-1, 0, 1))]
    inputs = [rng.randbytes(size) for size in sizes]
    sent = b"".join(struct.pack("<Q", len(data)) + data for data in inputs)
    told = subprocess.run([programs / name], input=sent, capture_output=True, check=True).stdout
    for number, data in enumerate(inputs):
        expected = blake3(data).digest() * 2 + xxhash.xxh3_128(data).digest() * 2
        expected += xxhash.xxh3_64(data).digest()
        assert told[104 * number : 104 * number + 104] == expected, len(data)


def run(command: Path, *arguments: str | Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([command, *arguments], capture_output=True, check=False)


def test_the_command(command: Path, pair: Pair, tmp_path: Path) -> None:
    file = tmp_path / "d.deltafmt"
    deltafmt.pack(pair.base, pair.finetuned, file, method=METHODS["rtn"](4))
    shown = run(command, "inspect", file).stdout.decode()
    assert deltafmt.verify(file).content_id in shown
    assert "w  add BF16 75x203  lowbit" in shown
    assert b"file intact, 4 tensors" in run(command, "verify", file).stdout
    with deltafmt.open(file) as delta:
        assert run(command, "decode", file, "w").stdout == delta.delta("w").tobytes()
    deltafmt.unpack(pair.base, file, tmp_path / "out")
    for name in ("w", "half", "grown"):
        (tmp_path / "base.raw").write_bytes(pair.a[name].data)
        done = run(command, "decode", file, name, "--base", tmp_path / "base.raw")
        assert done.stdout == read_folder(tmp_path / "out")[name].data


def test_the_command_refuses_in_one_line(command: Path, pair: Pair, tmp_path: Path) -> None:
    file = tmp_path / "d.deltafmt"
    deltafmt.pack(pair.base, pair.finetuned, file)
    (tmp_path / "bad").write_bytes(file.read_bytes()[:-1])
    (tmp_path / "base.raw").write_bytes(pair.a["half"].data)
    for arguments, code, words in (
        (["verify", tmp_path / "bad"], 3, "truncated"),
        (["verify", tmp_path / "absent"], 5, "No such file"),
        (["verify", tmp_path], 3, "it is a folder, not a delta file"),
        (["decode", file, "absent"], 2, "there is no tensor absent"),
        (["decode", file, "w", "--base", tmp_path / "base.raw"], 4, "another one"),
        (["decode", file, "w", "--base", tmp_path / "absent"], 5, "cannot be read"),
        (["decode", file], 2, "TENSOR is missing"),
    ):
        done = run(command, *arguments)
        assert done.returncode == code
        assert words in done.stderr.decode()
        assert done.stderr.count(b"\n") == 1


def test_the_example_service(programs: Path, pair: Pair, tmp_path: Path) -> None:
    """docs/examples: a service in C gives tensors to a program in Python over a local socket."""
    examples = ROOT / "docs" / "examples"
    flags = ["-std=c11", "-O0", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined", f"-I{c_reader.READER}"]
    objects = [programs / f"{name}.o" for name in ("deltafmt", "blake3", "xxh3")]
    service = tmp_path / "serve_tensors"
    assert c_reader.COMPILER is not None
    command = [c_reader.COMPILER, *flags, "-o", service, examples / "serve_tensors.c", *objects]
    subprocess.run([*command, "-lpthread", "-ldl", "-lm"], check=True)
    file = tmp_path / "d.deltafmt"
    deltafmt.pack(pair.base, pair.finetuned, file, method=METHODS["rtn"](4))
    socket = Path(tempfile.mkdtemp()) / "socket"  # the path of a socket must be short
    with subprocess.Popen([service, file, socket], stdout=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout is not None
            assert running.stdout.readline() == "serving 4 tensors\n"
            sys.path.insert(0, str(examples))
            try:
                from ask_tensor import ask
            finally:
                sys.path.pop(0)
            with deltafmt.open(file) as delta:
                assert ask(str(socket), "w") == ("F32", [75, 203], delta.delta("w").tobytes())
            assert ask(str(socket), "norm") == ("BF16", [1, 64], pair.b["norm"].data)
            with pytest.raises(LookupError, match="there is no tensor absent"):
                ask(str(socket), "absent")
        finally:
            running.terminate()
            shutil.rmtree(socket.parent)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "no command; there are inspect, verify, decode and restore"),
        (("show", "FILE"), "there are the commands inspect, verify, decode and restore, and not show"),
        (("inspect",), "FILE is missing"),
        (("inspect", "FILE", "x"), "one argument too many: x"),
        (("verify",), "FILE is missing"),
        (("decode", "FILE"), "TENSOR is missing"),
        (("decode", "FILE", "w", "x"), "one argument too many: x"),
        (("decode", "FILE", "w", "--base"), "--base needs a file with the raw bytes of the base's tensor"),
        (("decode", "FILE", "w", "--base", "RAW", "x"), "one argument too many: x"),
        (("restore", "FILE"), "TENSOR is missing"),
    ],
)
def test_wrong_arguments_of_the_command_get_one_line(command: Path, words: tuple[str, ...], said: str) -> None:
    done = subprocess.run([command, *words], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"deltafmt-c: {said} (see deltafmt-c --help)\n"


def test_the_command_explains_itself_and_spares_a_terminal(command: Path) -> None:
    done = subprocess.run([command, "--help"], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: deltafmt-c inspect FILE\n")
    terminal, inside = pty.openpty()
    done = subprocess.run([command, "decode", "FILE", "w"], check=False, stdout=inside, stderr=subprocess.PIPE)
    os.close(inside)
    os.close(terminal)
    assert done.returncode == 2
    assert done.stderr == b"deltafmt-c: a tensor is not written to a terminal; add > OUT (see deltafmt-c --help)\n"
