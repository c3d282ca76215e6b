"""What is read beside delta files: safetensors files, weight maps, adapters, patches, and rules in words.

Each target has a function that reads an input in every way, seeds, and a mutation that knows its form. Only errors of
deltafmt may leave the functions. ``fuzz/fuzz_inputs.py`` runs them under atheris, and the tests a short while without.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import xxhash
import zstandard
from make_corpus import weights
from mutate import Plain, mutate_node, nodes

import deltafmt
from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.checkpoint.renames import Renames
from deltafmt.checkpoint.safetensors_file import SafetensorsFile
from deltafmt.errors import InvalidFileError, StorageError, UsageError, WrongBaseError
from deltafmt.format.constants import DELTA_DTYPES, DTYPE_BITS
from deltafmt.methods import METHODS, parse
from deltafmt.methods.spelling import spelling

MEMORY = Path("/dev/shm")
NAMES = ("model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight", "lm_head.weight", "a.b", "w")
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
PATCH_SHARD = "model-00000-of-00001.safetensors"
WORDS = (
    *NAMES, *SHARDS, *DTYPE_BITS, "../w.safetensors", "/etc/passwd", "a/b", "\0", "\ud800", "", "x" * 2000, "dtype",
    "__metadata__", "shape", "data_offsets", "LORA", "lora_A", "q", "all-linear", ".*", "(a+)+$", "^(a|a)*$", "[",
    "\\1", "a{9999}", "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight",
    "base_model.model.q.lora_magnitude_vector", "base_model.model.q.base_layer.weight",
    "base_model.model.q.token_adapter.trainable_tokens_delta", PATCH_SHARD, "xor", "overwrite", "zstd", "adler32",
    "delta_encoding", "q.weight.indices", "q.weight.values", "sparse", "True", "1",
)  # fmt: skip


class Folder:
    """The folder in which the inputs lie, in memory where it can be."""

    def __init__(self) -> None:
        self._path: Path | None = None

    def __call__(self) -> Path:
        """Return the folder, empty."""
        if self._path is None:
            self._path = Path(tempfile.mkdtemp(prefix="inputs-", dir=MEMORY if MEMORY.is_dir() else None))
        shutil.rmtree(self._path)
        self._path.mkdir()
        return self._path

    def remove(self) -> None:
        """Remove it."""
        if self._path is not None:
            shutil.rmtree(self._path, ignore_errors=True)
            self._path = None


folder = Folder()


def read_safetensors(data: bytes) -> None:
    """Read a safetensors file; what the library reads too must have the same tensors."""
    path = folder() / "model.safetensors"
    path.write_bytes(data)
    try:
        file = SafetensorsFile(path)
    except (InvalidFileError, StorageError):
        return
    try:
        for tensor in file.tensors.values():
            tensor.fingerprint()
            tensor.equals(next(iter(file.tensors.values())))
            if tensor.dtype in DELTA_DTYPES:
                with tensor.row_range(0, min(tensor.rows, 3)) as rows:
                    rows.sum()
        with contextlib.suppress(safetensors.SafetensorError):
            theirs = dict(safetensors.deserialize(data))
            if {name: (each["dtype"], list(each["shape"]), bytes(each["data"])) for name, each in theirs.items()} != {
                each.name: (each.dtype, list(each.shape), each.head(each.nbytes)) for each in file.tensors.values()
            }:
                raise AssertionError("the safetensors library reads other tensors")
    finally:
        file.close()


def read_weight_map(data: bytes) -> None:
    """Read a folder of two shards with this index; no other file may be read."""
    place = folder()
    for shard, held in shards().items():
        (place / shard).write_bytes(held)
    (place / "model.safetensors.index.json").write_bytes(data)
    try:
        with Checkpoint(place) as checkpoint:
            for path, _, _ in checkpoint.identity():
                if not Path(path).resolve().is_relative_to(place.resolve()):
                    raise AssertionError(f"{path} was read")
            checkpoint.decide_travelling()
    except (InvalidFileError, StorageError):
        pass


def read_adapter(data: bytes) -> None:
    """Import an adapter: the length of its configuration, the configuration, its weights. What is made is verified."""
    place = folder()
    (length,) = struct.unpack("<I", data[:4].ljust(4, b"\0"))
    (place / "adapter").mkdir()
    (place / "adapter" / "adapter_config.json").write_bytes(data[4 : 4 + length])
    (place / "adapter" / "adapter_model.safetensors").write_bytes(data[4 + length :])
    (place / "base.safetensors").write_bytes(base_file())
    try:
        deltafmt.import_lora(place / "base.safetensors", place / "adapter", place / "d.deltafmt", threads=1)
    except (InvalidFileError, StorageError, UsageError, WrongBaseError):
        if (place / "d.deltafmt").exists():
            raise AssertionError("a refused adapter left a file") from None
        return
    deltafmt.verify(place / "d.deltafmt", place / "base.safetensors", threads=1)


def read_patch(data: bytes) -> None:
    """Convert a patch of another program: the length of an index, the index, a shard; or 0, and a sparse file."""
    place = folder()
    (length,) = struct.unpack("<I", data[:4].ljust(4, b"\0"))
    source = place / "v" if length else place / "p.safetensors"
    if length:
        source.mkdir()
        (source / "model.safetensors.index.json").write_bytes(data[4 : 4 + length])
    (source / PATCH_SHARD if length else source).write_bytes(data[4 + length :])
    (place / "base.safetensors").write_bytes(base_file())
    try:
        deltafmt.convert(source, place / "d.deltafmt", place / "base.safetensors", threads=1)
    except (InvalidFileError, StorageError, WrongBaseError):
        if {path.name for path in place.iterdir()} != {"base.safetensors", source.name}:
            raise AssertionError("a refused patch left a file") from None
        return
    deltafmt.verify(place / "d.deltafmt", place / "base.safetensors", threads=1)


def read_rules(data: bytes) -> None:
    """Read lines as spellings of methods and as renames; a method that is read is written and read again."""
    for line in data.decode("utf-8", "surrogateescape").split("\n"):
        for like in (None, METHODS["deltadq"]()):
            with contextlib.suppress(UsageError):
                method = parse(line, like)
                if parse(spelling(method)) != method:
                    raise AssertionError(f"{spelling(method)} is another method than {line!r}")
        with contextlib.suppress(UsageError):
            renames = Renames.parse([line], [line[:3]] if line else [])
            for name in (*NAMES, line):
                renames.apply(name)
            renames.unused(NAMES)
            renames.stripped(NAMES)


def shards() -> dict[str, bytes]:
    """Return the two shards of the folder of :func:`read_weight_map`."""
    return {
        shard: safetensors_bytes({name: weights(rng_of(1), 4, 4)}) for shard, name in zip(SHARDS, NAMES, strict=False)
    }


def rng_of(seed: int) -> np.random.Generator:
    """Return a source of random weights."""
    return np.random.default_rng(seed)


def safetensors_bytes(tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> bytes:
    """Return a safetensors file."""
    header: dict[str, Any] = {"__metadata__": metadata or {"format": "pt"}}
    body = b""
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    return join_safetensors(header, body)


def join_safetensors(header: Any, body: bytes) -> bytes:
    """Return a safetensors file with a header of the right length."""
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def base_file() -> bytes:
    """Return the base of the adapters."""
    rng = rng_of(2)
    return safetensors_bytes(
        {"q.weight": weights(rng, 12, 10), "v.weight": weights(rng, 12, 10), "embed.weight": weights(rng, 8, 10)}
    )


def mutate_safetensors(data: bytes, rng: random.Random, plain: Plain) -> bytes:
    """Change the header as JSON, its length, or any bytes."""
    try:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
    except (ValueError, struct.error, RecursionError):
        return plain(data, len(data) + 64)
    kind = rng.random()
    if kind < 0.1:
        return plain(data, len(data) + 64)
    if kind < 0.2:
        return struct.pack("<Q", rng.choice((0, 1, length + 1, length - 1, 2**32, 2**63, 2**64 - 1)) % 2**64) + data[8:]
    return join_safetensors(changed(header, rng), data[8 + length :])


def mutate_json(data: bytes, rng: random.Random, plain: Plain) -> bytes:
    """Change a JSON text as an object, or any bytes of it."""
    try:
        obj = json.loads(data)
    except (ValueError, RecursionError):
        return plain(data, len(data) + 64)
    if rng.random() < 0.15:
        return plain(data, len(data) + 64)
    return json.dumps(changed(obj, rng)).encode("utf-8", "surrogatepass")


def mutate_adapter(data: bytes, rng: random.Random, plain: Plain) -> bytes:
    """Change the configuration, or the weights."""
    (length,) = struct.unpack("<I", data[:4].ljust(4, b"\0"))
    config, held = data[4 : 4 + length], data[4 + length :]
    if rng.random() < 0.5:
        config = mutate_json(config, rng, plain)
    else:
        held = mutate_safetensors(held, rng, plain)
    return struct.pack("<I", len(config)) + config + held


def mutate_lines(data: bytes, rng: random.Random, plain: Plain) -> bytes:
    """Put words of the spellings together, or change any bytes."""
    if rng.random() < 0.3:
        return plain(data, len(data) + 64)
    words = [
        *METHODS,
        ":",
        ",",
        "=",
        "*",
        "nm=2:16",
        "bits=3",
        "rank=4",
        "share=1",
        "yes",
        "1e9",
        "-1",
        "model.",
        "\u0663",
        "0x1",
    ]
    return "".join(rng.choice((*words, "\n")) for _ in range(rng.randrange(1, 12))).encode()


def changed(obj: Any, rng: random.Random) -> Any:
    """Return an object of JSON with some nodes changed."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        places = nodes(obj)
        if places and rng.random() < 0.4:
            held, key = rng.choice(places)
            held[key] = rng.choice(
                (rng.choice(WORDS), rng.choice(WORDS), 2**64, -1, 0.5, 1e308, None, True, [], {}, [0, 0])
            )
            if isinstance(held, dict) and rng.random() < 0.4:
                held[rng.choice(WORDS)] = held.pop(key)
        else:
            mutate_node(obj, rng)
    return without_bytes(obj)


def without_bytes(obj: Any) -> Any:
    """Return an object without what JSON cannot hold."""
    if isinstance(obj, dict):
        return {str(key): without_bytes(value) for key, value in obj.items()}
    if isinstance(obj, list):
        return [without_bytes(value) for value in obj]
    return obj.hex() if isinstance(obj, bytes) else obj


def safetensors_seeds() -> list[bytes]:
    """Return files with tensors of several dtypes and shapes."""
    rng = rng_of(3)
    odd = {
        "0d": weights(rng),
        "empty": ("F32", (0, 4), b""),
        "f4": ("F4", (4,), b"ab"),
        "ids": ("I64", (2,), bytes(16)),
    }
    return [base_file(), safetensors_bytes(odd), safetensors_bytes({})]


def weight_map_seeds() -> list[bytes]:
    """Return an index of the two shards, and one that names a tensor too many."""
    right = dict(zip(NAMES, SHARDS, strict=False))
    maps: list[Any] = [right, {**right, "more": SHARDS[0]}, {}]
    return [json.dumps({"metadata": {"total_size": 64}, "weight_map": each}).encode() for each in maps]


def adapter_seeds() -> list[bytes]:
    """Return plain adapters, and ones with DoRA, trained rows, modules stored whole, patterns."""
    rng = rng_of(4)
    prefix = "base_model.model."
    pair = {f"{prefix}q.lora_A.weight": weights(rng, 2, 10), f"{prefix}q.lora_B.weight": weights(rng, 12, 2)}
    dora = {**pair, f"{prefix}q.lora_magnitude_vector": weights(rng, 12)}
    rows = {**pair, f"{prefix}embed.token_adapter.trainable_tokens_delta": weights(rng, 2, 10)}
    whole = {**pair, f"{prefix}v.weight": weights(rng, 12, 10)}
    plain: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "bias": "none"}
    cases = [
        (plain, pair),
        ({**plain, "use_dora": True}, dora),
        ({**plain, "trainable_token_indices": {"embed": [1, 5]}}, rows),
        ({**plain, "modules_to_save": ["v"], "use_rslora": True}, whole),
        ({**plain, "rank_pattern": {"q": 2, ".*v": 3}, "alpha_pattern": {"^q$": 1.5}}, pair),
    ]
    found = []
    for config, tensors in cases:
        text = json.dumps(config).encode()
        found.append(struct.pack("<I", len(text)) + text + safetensors_bytes(tensors))
    return found


def patch_seeds() -> list[bytes]:
    """Return version folders of both encodings, and a sparse file, that change the base of the adapters."""
    _, _, old = weights(rng_of(2), 12, 10)
    places = np.array([3, 50, 119], "<u4")
    new = np.frombuffer(old, np.uint16).copy()
    new[places] ^= 1
    difference = (np.frombuffer(old, np.uint8) ^ new.view(np.uint8)).tobytes()
    overwrite = b"\x03\0\0\0" + (2 * places).tobytes() + new.view(np.uint8)[2 * places].tobytes()
    found = []
    for encoding, raw in (("xor", difference), ("overwrite", overwrite)):
        frame = zstandard.ZstdCompressor(level=1).compress(raw)
        metadata = {"version": "1", "base_version": "0", "delta_encoding": encoding, "compression_format": "zstd"}
        index = {"metadata": metadata | {"checksum_format": "xxh3-128"}, "weight_map": {"q.weight": PATCH_SHARD}}
        sums = {"q.weight": xxhash.xxh3_128_hexdigest(new.tobytes())}
        text = json.dumps(index).encode()
        shard = safetensors_bytes({"q.weight": ("U8", (len(frame),), frame)}, sums)
        found.append(struct.pack("<I", len(text)) + text + shard)
    values = {
        "q.weight.indices": ("I32", (3,), places.tobytes()),
        "q.weight.values": ("BF16", (3,), new[places].tobytes()),
    }
    return [*found, bytes(4) + safetensors_bytes(values, {"sparse": "True", "changed_params": '["q.weight"]'})]


def rule_seeds() -> list[bytes]:
    """Return spellings and renames."""
    lines = [spelling(kind()) for kind in METHODS.values()]
    return ["\n".join(lines).encode(), b"deltadq:nm=2:16,bits=2\nmodel.*=text.*\nbits=3", b"rtn:bits=3,grid=asymmetric"]


@dataclass(frozen=True)
class Target:
    """One of what is read: the function, its seeds, its mutation."""

    read: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    mutate: Callable[[bytes, random.Random, Plain], bytes]


TARGETS = {
    "safetensors": Target(read_safetensors, safetensors_seeds, mutate_safetensors),
    "weight-map": Target(read_weight_map, weight_map_seeds, mutate_json),
    "adapter": Target(read_adapter, adapter_seeds, mutate_adapter),
    "patch": Target(read_patch, patch_seeds, mutate_adapter),
    "rules": Target(read_rules, rule_seeds, mutate_lines),
}
