"""What several test files share: raw tensors, checkpoints written and read by hand, and two ways to run the commands.

Nothing here uses deltafmt's own reader, writer or rounding, so that a fault there cannot hide behind its twin.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A process a processor runs the tests (pytest -n auto). More threads in each would only wait for one another. The
# libraries read this when they are imported, numpy below; processes that tests start inherit it.
if "PYTEST_XDIST_WORKER" in os.environ:
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")

import numpy as np
import pytest
from numpy.typing import NDArray

import deltafmt
from containers import write_safetensors

# Where there is no GPU, Triton kernels are interpreted. Triton reads this when it is imported, and nothing imports it
# before; what needs the compiler runs in a process of its own.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_xdist_auto_num_workers() -> int:
    """Return how many processes ``pytest -n auto`` starts: one for each processor that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out all but a share of the sweeps over all families, if DELTAFMT_SAMPLE asks for it."""
    share = int(os.environ.get("DELTAFMT_SAMPLE", "1"))
    left_out = [one for one in items if one.get_closest_marker("sampled") and zlib.crc32(one.name.encode()) % share]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        kept = set(map(id, items)) - set(map(id, left_out))
        items[:] = [one for one in items if id(one) in kept]


NANO = Path(__file__).resolve().parent.parent / "examples" / "nano"

_NATIVE = {"F32": "<f4", "F16": "<f2"}
_NAMES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
}


@dataclass(frozen=True)
class Raw:
    """A tensor as a safetensors file holds it: the dtype's name, the shape, the little-endian bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def floats(self) -> NDArray[np.float32]:
        """Return the values of a BF16, F16 or F32 tensor, as a matrix of rows."""
        if self.dtype == "BF16":
            bits = np.frombuffer(self.data, "<u2").astype(np.uint32) << np.uint32(16)
            values = bits.view(np.float32)
        else:
            values = np.frombuffer(self.data, _NATIVE[self.dtype]).astype(np.float32)
        return values.reshape(self.rows, -1) if values.size else values.reshape(0, 0)

    @property
    def rows(self) -> int:
        """Product of all dimensions but the last."""
        return int(np.prod(self.shape[:-1], dtype=np.int64))

    def __repr__(self) -> str:
        """Stay short, for hypothesis prints whole checkpoints."""
        return f"Raw({self.dtype}, {self.shape})"


Tensors = dict[str, Raw]


def round_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round values to BF16, ties to even, by measuring the distance to both neighbours; NaN and infinity are cut."""
    bits = np.array(values, np.float32, ndmin=1).view(np.uint32).reshape(np.shape(values))
    special = ~np.isfinite(values)
    below = bits & np.uint32(0xFFFF0000)
    above = below + np.uint32(0x10000)
    exact = values.astype(np.float64)
    with np.errstate(invalid="ignore"):
        left = np.abs(exact - below.view(np.float32).astype(np.float64))
        right = np.abs(above.view(np.float32).astype(np.float64) - exact)
    odd = (below >> np.uint32(16)) & np.uint32(1)
    up = ~special & ((right < left) | ((right == left) & (odd == 1)))
    return (np.where(up, above, below) >> np.uint32(16)).astype(np.uint16)


def narrow(values: NDArray[np.float32], dtype: str) -> bytes:
    """Round values to BF16, F16 or F32 and return the bytes."""
    if dtype == "BF16":
        return round_bf16(values).astype("<u2").tobytes()
    return values.astype(_NATIVE[dtype]).tobytes()


def raw(values: Any, dtype: str) -> Raw:
    """Return values rounded to BF16, F16 or F32."""
    array = np.asarray(values, np.float32)
    return Raw(dtype, array.shape, narrow(array, dtype))


def plain(array: NDArray[Any]) -> Raw:
    """Return an array of a dtype that numpy has."""
    return Raw(_NAMES[array.dtype.name], array.shape, np.ascontiguousarray(array).tobytes())


def normal(seed: int, shape: tuple[int, ...], dtype: str = "BF16", scale: float = 1.0) -> Raw:
    """Return reproducible normal values."""
    return raw(np.random.default_rng(seed).normal(0, scale, shape), dtype)


def nudge(tensor: Raw, seed: int, dtype: str | None = None, scale: float = 0.05) -> Raw:
    """Return a tensor with noise on it, as fine-tuning leaves it."""
    noise = np.random.default_rng(seed).normal(0, scale, tensor.shape)
    return raw(tensor.floats().reshape(tensor.shape) + noise, dtype or tensor.dtype)


def safetensors_bytes(tensors: Mapping[str, Raw], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return a ``.safetensors`` file, tensors in the order given."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, tensor in tensors.items():
        offsets = [position, position + len(tensor.data)]
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        position = offsets[1]
    return with_header(json.dumps(header).encode(), b"".join(tensor.data for tensor in tensors.values()))


def with_header(header: bytes, data: bytes = b"") -> bytes:
    """Return a ``.safetensors`` file with any header."""
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data


def write_folder(
    folder: Path,
    tensors: Mapping[str, Raw],
    shards: Sequence[Sequence[str]] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """Write a checkpoint folder: one file, or the given names in each shard with an index."""
    folder.mkdir(parents=True)
    if shards is None:
        (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors, {"format": "pt"}))
    else:
        weight_map = {}
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            (folder / file).write_bytes(safetensors_bytes({name: tensors[name] for name in names}))
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": sum(len(t.data) for t in tensors.values())}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name, data in (files or {}).items():
        (folder / name).write_bytes(data)
    return folder


def read_file(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """Return the tensors and the whole header of a ``.safetensors`` file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    tensors = {}
    for name, info in header.items():
        if name != "__metadata__":
            start, stop = (8 + length + offset for offset in info["data_offsets"])
            tensors[name] = Raw(info["dtype"], tuple(info["shape"]), content[start:stop])
    return tensors, header


def read_folder(folder: Path) -> Tensors:
    """Return the tensors of every ``.safetensors`` file in a folder."""
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(read_file(path)[0])
    return tensors


def expected_sum(base: Raw, delta: NDArray[np.float32], dtype: str) -> bytes:
    """Return what unpacking must give for the rows that base and delta share: round(base + delta).

    Where the decoded delta is zero, the base's own bits.
    """
    rows = delta.shape[0]
    wide = base.floats()[:rows]
    if base.dtype == dtype:
        kept = np.frombuffer(base.data, "<u4" if dtype == "F32" else "<u2")[: delta.size].reshape(delta.shape)
    else:
        kept = _bits(narrow(wide, dtype), dtype).reshape(delta.shape)
    total = _bits(narrow(wide + delta, dtype), dtype).reshape(delta.shape)
    return np.where(delta == 0, kept, total).astype(kept.dtype).tobytes()


def _bits(data: bytes, dtype: str) -> NDArray[np.unsignedinteger]:
    return np.frombuffer(data, "<u4" if dtype == "F32" else "<u2")


@dataclass(frozen=True)
class Pair:
    """A base and its fine-tune, as folders and as the tensors that were written."""

    base: Path
    finetuned: Path
    a: Tensors
    b: Tensors


def small_tensors() -> tuple[Tensors, Tensors]:
    """Return a little of everything that a real pair has: matrices, vectors, a shared tensor, integers."""
    a = {
        "model.embed.weight": normal(1, (70, 48)),
        "model.layers.0.up.weight": normal(2, (96, 48)),
        "model.layers.0.down.weight": normal(3, (48, 100)),
        "model.layers.0.norm.weight": normal(4, (48,)),
        "model.layers.0.frozen.weight": normal(5, (40, 40)),
        "model.layers.10.up.weight": normal(6, (64, 48)),
        "position_ids": plain(np.arange(48, dtype=np.int64)),
    }
    b = {name: nudge(t, 100 + i) if t.dtype == "BF16" else t for i, (name, t) in enumerate(a.items())}
    b["model.layers.0.frozen.weight"] = a["model.layers.0.frozen.weight"]
    return a, b


SMALL_FILES = {
    "config.json": b'{"model_type": "tiny"}\n',
    "tokenizer.json": b"{}",
    "README.md": "# Größe\n".encode(),
    "empty.txt": b"",
}


def write_pair(folder: Path, a: Tensors, b: Tensors) -> Pair:
    """Write a pair of single-file folders under ``folder``; only the fine-tune has small files beside it."""
    return Pair(write_folder(folder / "base", a), write_folder(folder / "ft", b, files=SMALL_FILES), a, b)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Give the small pair; read-only by convention."""
    return write_pair(tmp_path_factory.mktemp("small"), *small_tensors())


@dataclass(frozen=True)
class Result:
    """What a command gave."""

    code: int
    out: str
    err: str

    def json(self) -> dict[str, Any]:
        """Return standard output as one JSON object, strictly: no NaN, no Infinity."""

        def refuse(constant: str) -> Any:
            raise AssertionError(f"{constant} is not JSON")

        obj = json.loads(self.out, parse_constant=refuse)
        assert type(obj) is dict
        return obj


Cli = Callable[..., Result]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    """Give a function that runs one command in this process."""
    from deltafmt.tools.main import main

    def run(*arguments: str | Path) -> Result:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code if type(stop.code) is int else 0
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)}
    yield run
    for each, handler in before.items():
        signal.signal(each, handler)


def run_cli(
    *arguments: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run ``python -m deltafmt`` as a process of its own."""
    command = [sys.executable, "-W", "error", "-m", "deltafmt", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, env={**os.environ, **(env or {})}, cwd=cwd, check=False)


@pytest.fixture(scope="session")
def models() -> Path:
    """Give the folder with the real models, from the environment variable DELTAFMT_MODELS."""
    folder = os.environ.get("DELTAFMT_MODELS")
    if not folder:
        pytest.skip("DELTAFMT_MODELS names no folder with the real models")
    return Path(folder)


@pytest.fixture(scope="session")
def nano() -> Path:
    """Give the repository's own pair of tiny models: ``base``, ``math``, ``tokenizer.json``, ``eval.jsonl``."""
    return NANO


def refused(result: Result, code: int, *parts: str) -> str:
    """Check an error as a user sees it: the code, nothing printed, one line that names what is wrong."""
    assert result.code == code, result
    assert result.out == ""
    assert result.err.startswith("deltafmt: ")
    assert result.err.endswith("\n")
    assert result.err.count("\n") == 1, result.err
    assert "Traceback" not in result.err
    assert "internal error" not in result.err
    message = result.err.removeprefix("deltafmt: ").rstrip("\n")
    assert message == message.strip()
    assert not message.endswith(".")
    for part in parts:
        assert part in message
    return message


@pytest.fixture(scope="module")
def delta(tmp_path_factory: pytest.TempPathFactory, small: Pair) -> Path:
    """Give the delta of the small pair."""
    out = tmp_path_factory.mktemp("delta") / "small.deltafmt"
    deltafmt.pack(small.base, small.finetuned, out)
    return out


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and a fine-tune of one matrix, one vector and one matrix that grew, with an attached file."""
    folder = tmp_path_factory.mktemp("pair")
    rng = np.random.default_rng(0)
    for number, side in enumerate(("base", "finetuned")):
        (folder / side).mkdir()
        tensors = {
            "embed.weight": rng.standard_normal((33 + number, 50)),
            "norm.weight": rng.standard_normal(50),
            "proj.weight": rng.standard_normal((40, 50)),
        }
        write_safetensors(folder / side / "model.safetensors", tensors)
    (folder / "finetuned" / "config.json").write_text('{"model_type": "tiny"}')
    return folder / "base", folder / "finetuned"


@pytest.fixture(scope="module", params=["hot", "cold"])
def packed(request: pytest.FixtureRequest, pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small packed file of either profile."""
    path = tmp_path_factory.mktemp(request.param) / "small.deltafmt"
    method = deltafmt.methods.DeltaDQ(4, 16, 4, "fixed" if request.param == "hot" else "rank", scale_group=8)
    deltafmt.pack(*pair, path, method=method, profile=request.param, threads=1)
    assert deltafmt.verify(path, threads=1).tensors == 3
    return path
