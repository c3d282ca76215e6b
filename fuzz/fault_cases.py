"""The commands that write something, with small inputs for each, and what their outputs are made of."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from make_corpus import Tensors, moved, weights, write_checkpoint

import deltafmt
from deltafmt.methods import RTN, SVD, Exact

FILES = {
    "config.json": b'{"model_type": "toy", "hidden_size": 64}',
    "generation_config.json": b'{"max_length": 20}',
    "tokenizer/vocab.txt": b"\n".join(b"word%d" % number for number in range(500)),
}
LAYERS = 6
Snapshot = dict[str, bytes] | None


@dataclass(frozen=True)
class Case:
    """A command that writes one file or folder.

    Attributes:
        name: what it is called in reports.
        arguments: of the command line; ``{inputs}`` and ``{out}`` stand for folders.
        output: the name of what it writes in ``{out}``.
        old: makes another output of the same kind under a path, which ``--force`` replaces.
        stands: True if the output always stands there before, and is changed in place without ``--force``.
    """

    name: str
    arguments: tuple[str, ...]
    output: str
    old: Callable[[Path, Path], None]
    stands: bool = False

    def spelled(self, inputs: Path, out: Path, *, force: bool) -> list[str]:
        """Return the arguments with the folders in them."""
        words = [word.format(inputs=inputs, out=out) for word in self.arguments]
        return [*words, "--force"] if force and not self.stands else words

    def prepare(self, inputs: Path, out: Path, *, force: bool) -> None:
        """Empty the output's folder; with ``force``, or for what is changed in place, an older output lies there."""
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        if force or self.stands:
            self.old(inputs, out / self.output)


def old_file(inputs: Path, path: Path) -> None:
    """Make an older delta file."""
    shutil.copy(inputs / "old.deltafmt", path)


def old_page(inputs: Path, path: Path) -> None:  # noqa: ARG001 - as the others
    """Make an older page."""
    path.write_text("<!DOCTYPE html>\n")


def old_checkpoint(inputs: Path, path: Path) -> None:
    """Make an older checkpoint folder."""
    shutil.copytree(inputs / "other", path)


def old_adapter(inputs: Path, path: Path) -> None:
    """Make an older adapter folder."""
    shutil.copytree(inputs / "adapter", path)
    (path / "README.md").write_text("an older adapter\n")


def old_version(inputs: Path, path: Path) -> None:
    """Make an older version folder."""
    shutil.copytree(inputs / "version", path)


def old_model(inputs: Path, path: Path) -> None:
    """Make the model that a chain is applied to, with files beside it that stay."""
    shutil.copytree(inputs / "base", path)
    (path / "config.json").write_text("{}\n")
    (path / "runs").mkdir()
    (path / "runs" / "log.txt").write_text("an older run\n")


def case(
    name: str, words: str, output: str, old: Callable[[Path, Path], None] = old_file, *, stands: bool = False
) -> Case:
    """Return a case; the command's words are separated by spaces."""
    return Case(name, tuple(words.split()), output, old, stands)


CASES = (
    case("pack", "pack {inputs}/base {inputs}/finetuned -o {out}/d.deltafmt --threads 1", "d.deltafmt"),
    case(
        "pack cold",
        "pack {inputs}/base {inputs}/finetuned -o {out}/d.deltafmt --profile cold --method rtn --bits 3 --threads 1",
        "d.deltafmt",
    ),
    case(
        "pack to a target",
        "pack {inputs}/base {inputs}/finetuned -o {out}/d.deltafmt --target-ratio 1.5 --threads 1 "
        "--candidate rtn:bits=4 --candidate rtn:bits=8",
        "d.deltafmt",
    ),
    case(
        "pack a link, progressive",
        "pack {inputs}/finetuned {inputs}/later -o {out}/d.deltafmt --exact --parent {inputs}/one.deltafmt --threads 1",
        "d.deltafmt",
    ),
    case("repack a served part", "repack {inputs}/progressive.deltafmt -o {out}/d.deltafmt --drop exact", "d.deltafmt"),
    case("repack cold", "repack {inputs}/hot.deltafmt -o {out}/d.deltafmt --profile cold", "d.deltafmt"),
    case("repack hot", "repack {inputs}/cold.deltafmt -o {out}/d.deltafmt --profile hot", "d.deltafmt"),
    case("import-lora", "import-lora {inputs}/base {inputs}/adapter -o {out}/d.deltafmt --threads 1", "d.deltafmt"),
    case("unpack", "unpack {inputs}/base {inputs}/hot.deltafmt -o {out}/m --threads 1", "m", old_checkpoint),
    case(
        "unpack in shards",
        "unpack {inputs}/base {inputs}/cold.deltafmt -o {out}/m --max-shard-size 20KB --threads 1",
        "m",
        old_checkpoint,
    ),
    case("restore", "unpack {inputs}/base {inputs}/progressive.deltafmt -o {out}/m --threads 1", "m", old_checkpoint),
    case(
        "apply",
        "apply {inputs}/base {inputs}/one.deltafmt {inputs}/two.deltafmt -o {out}/m --threads 1",
        "m",
        old_checkpoint,
    ),
    case(
        "apply in place",
        "apply {out}/m {inputs}/one.deltafmt {inputs}/two.deltafmt --in-place --threads 1",
        "m",
        old_model,
        stands=True,
    ),
    case(
        "squash",
        "squash {inputs}/one.deltafmt {inputs}/two.deltafmt -o {out}/d.deltafmt --base {inputs}/base --threads 1",
        "d.deltafmt",
    ),
    case(
        "convert to a version folder",
        "convert {inputs}/low.deltafmt -o {out}/v --base {inputs}/base --threads 1 "
        "--to version-folder --model-version 2",
        "v",
        old_version,
    ),
    case(
        "convert to a sparse file",
        "convert {inputs}/low.deltafmt -o {out}/p.safetensors --base {inputs}/base --to trl --threads 1",
        "p.safetensors",
    ),
    case(
        "convert to a delta file",
        "convert {inputs}/version -o {out}/d.deltafmt --base {inputs}/base --threads 1",
        "d.deltafmt",
    ),
    case("export-lora", "export-lora {inputs}/lora.deltafmt -o {out}/a --base {inputs}/base", "a", old_adapter),
    case("analyze", "analyze {inputs}/base {inputs}/finetuned --html {out}/r.html", "r.html", old_page),
)


def make_inputs(folder: Path) -> None:
    """Write the inputs of all cases."""
    rng = np.random.default_rng(1)
    base: Tensors = {"embed.weight": weights(rng, 60, 64), "norm.weight": weights(rng, 64)}
    for number in range(LAYERS):
        base[f"layers.{number}.attn.weight"] = weights(rng, 64, 64)
        base[f"layers.{number}.mlp.weight"] = weights(rng, 70, 64)
        base[f"layers.{number}.norm.weight"] = weights(rng, 64, dtype="F32")
    finetuned = {name: moved(rng, tensor) for name, tensor in base.items()}
    finetuned["layers.0.attn.weight"] = base["layers.0.attn.weight"]
    finetuned["new.weight"] = weights(rng, 40, 40)
    sides = write_checkpoint(folder / "base", base, {}), write_checkpoint(folder / "finetuned", finetuned, FILES)
    other: Any = {name: moved(rng, tensor) for name, tensor in base.items()}
    write_checkpoint(folder / "other", other, {})
    deltafmt.pack(*sides, folder / "hot.deltafmt", threads=1)
    deltafmt.pack(*sides, folder / "cold.deltafmt", method=RTN(4), profile="cold", threads=1)
    deltafmt.pack(*sides, folder / "old.deltafmt", method=RTN(2), threads=1)
    later = write_checkpoint(folder / "later", {name: moved(rng, tensor) for name, tensor in finetuned.items()}, FILES)
    deltafmt.pack(*sides, folder / "progressive.deltafmt", exact=True, threads=1)
    deltafmt.pack(*sides, folder / "one.deltafmt", method=Exact(), threads=1)
    deltafmt.pack(sides[1], later, folder / "two.deltafmt", method=Exact(), parent=folder / "one.deltafmt", threads=1)
    low = write_checkpoint(folder / "low", low_rank(rng, base), {})
    deltafmt.pack(sides[0], low, folder / "lora.deltafmt", method=SVD(4), threads=1)
    deltafmt.pack(sides[0], low, folder / "low.deltafmt", method=Exact(), threads=1)
    deltafmt.convert(folder / "low.deltafmt", folder / "version", sides[0], "version-folder", version="1", threads=1)
    deltafmt.export_lora(folder / "lora.deltafmt", folder / "adapter", base=sides[0])


def low_rank(rng: np.random.Generator, base: Tensors) -> Tensors:
    """Return a fine-tune whose matrices of the layers alone have moved."""
    return {name: moved(rng, tensor) if "attn" in name or "mlp" in name else tensor for name, tensor in base.items()}


def snapshot(path: Path) -> Snapshot:
    """Return the digest of each file below a path, by its name; None if there is nothing."""
    if not path.exists():
        return None
    if path.is_file():
        return {"": blake3(path.read_bytes()).digest()}
    return {
        str(found.relative_to(path)): blake3(found.read_bytes()).digest() if found.is_file() else b""
        for found in sorted(path.rglob("*"))
    }
