"""Make the seed corpus of the fuzz harness: small valid delta files that together use every part of the format.

    python fuzz/make_corpus.py [FOLDER]

The output depends on nothing but this program and deltafmt's version; ``fuzz/corpus`` is its default folder.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

import deltafmt
from deltafmt.checkpoint.folder_writer import CheckpointWriter, TensorSpec
from deltafmt.container.writer import ContainerWriter
from deltafmt.index.entries import BaseRef, TensorEntry, Term
from deltafmt.methods import DARE, RTN, BitDelta, DeltaDQ, Exact, Magnitude, Method
from deltafmt.terms.buffers import blank
from deltafmt.terms.coding import Coding
from deltafmt.terms.floats import narrow
from deltafmt.terms.lowbit.codec import LowbitArrays
from deltafmt.terms.lowrank.codec import LowRankArrays, LowRankCodec
from deltafmt.terms.lowrank.layout import LowRankLayout
from deltafmt.terms.nm import codec as nm
from deltafmt.terms.nm import hashing
from deltafmt.terms.nm.layout import NMLayout

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]
LARGEST = 28_000


def weights(rng: np.random.Generator, *shape: int, dtype: str = "BF16", size: float = 0.02) -> Any:
    """Return dtype, shape and bytes of a random tensor."""
    values = rng.standard_normal(shape, np.float32) * np.float32(size)
    return dtype, shape, narrow(values, dtype).tobytes()


def moved(rng: np.random.Generator, tensor: Any) -> Any:
    """Return a fine-tuned twin of a tensor: the same dtype and shape, values a little off."""
    dtype, shape, data = tensor
    raw = np.frombuffer(data, np.uint32 if dtype == "F32" else np.uint16).reshape(shape)
    step = rng.integers(0, 32, shape, raw.dtype)
    return dtype, shape, (raw ^ step).astype(raw.dtype).tobytes()


def write_checkpoint(folder: Path, tensors: Tensors, files: dict[str, bytes]) -> Path:
    """Write a checkpoint folder."""
    writer = CheckpointWriter(folder, [TensorSpec(name, dtype, shape) for name, (dtype, shape, _) in tensors.items()])
    for name, (_, _, data) in tensors.items():
        writer.write(name, 0, data)
    for name, data in files.items():
        writer.add_file(name, data)
    writer.commit()
    return folder


def layer(rng: np.random.Generator) -> tuple[Tensors, Tensors]:
    """Return the two sides of a small layer: ragged matrices of three dtypes, a vector, an unchanged matrix."""
    base: Tensors = {
        "layer.attn.weight": weights(rng, 33, 40),
        "layer.experts.weight": weights(rng, 2, 9, 20, dtype="F32"),
        "layer.mlp.weight": weights(rng, 40, 21, dtype="F16"),
        "layer.norm.weight": weights(rng, 20),
        "layer.still.weight": weights(rng, 4, 8),
    }
    finetuned = {name: moved(rng, tensor) for name, tensor in base.items()}
    finetuned["layer.still.weight"] = base["layer.still.weight"]
    return base, finetuned


def plain(rng: np.random.Generator) -> tuple[Tensors, Tensors]:
    """Return one ragged matrix, for files in which the index is nearly everything."""
    base = {"w": weights(rng, 35, 27)}
    return base, {"w": moved(rng, base["w"])}


def wide(rng: np.random.Generator) -> tuple[Tensors, Tensors]:
    """Return one ragged matrix that is large enough for a delta in most layouts."""
    base = {"w": weights(rng, 66, 67)}
    return base, {"w": moved(rng, base["w"])}


def grown(rng: np.random.Generator) -> tuple[Tensors, Tensors]:
    """Return an embedding that gained rows, one that lost some, and a tensor that the fine-tune dropped."""
    base: Tensors = {
        "embed.weight": weights(rng, 30, 24),
        "lost.weight": weights(rng, 8, 24),
        "shrunk.weight": weights(rng, 40, 24),
    }
    dtype, _, data = moved(rng, base["embed.weight"])
    _, _, more = weights(rng, 5, 24)
    return base, {
        "embed.weight": (dtype, (35, 24), data + more),
        "shrunk.weight": (dtype, (34, 24), moved(rng, base["shrunk.weight"])[2][: 34 * 24 * 2]),
    }


def tied(rng: np.random.Generator) -> tuple[Tensors, Tensors]:
    """Return an embedding and a head that are the same matrix."""
    base = {"embed.weight": weights(rng, 24, 24)}
    finetuned = {"embed.weight": moved(rng, base["embed.weight"])}
    return {**base, "head.weight": base["embed.weight"]}, {**finetuned, "head.weight": finetuned["embed.weight"]}


def odd(rng: np.random.Generator) -> tuple[Tensors, Tensors]:
    """Return tensors that are stored whole: 0-d, empty, new, another shape, dtypes without deltas."""
    base: Tensors = {
        "bias": weights(rng, 60),
        "codes": ("F8_E4M3", (3, 5), rng.bytes(15)),
        "reshaped": weights(rng, 4, 6),
        "scalar": weights(rng),
    }
    return base, {
        "bias": weights(rng, 60),
        "codes": ("F8_E4M3", (3, 5), rng.bytes(15)),
        "empty": ("F32", (0, 7), b""),
        "flags": ("BOOL", (9,), bytes(9)),
        "ids": ("I64", (3,), rng.bytes(24)),
        "new": weights(rng, 3, 3),
        "reshaped": weights(rng, 6, 4),
        "scalar": weights(rng),
        "waves": ("C64", (2,), rng.bytes(16)),
    }


def unchanged(rng: np.random.Generator) -> tuple[Tensors, Tensors]:
    """Return two equal sides."""
    base = {"a": weights(rng, 4, 4), "b": weights(rng, 4)}
    return base, dict(base)


FILES = {
    "config.json": json.dumps({"model_type": "toy", "hidden_size": 40}).encode(),
    "tokenizer/vocab.txt": b"\n".join(b"word%d" % i for i in range(200)),
}

Pair = Callable[[np.random.Generator], tuple[Tensors, Tensors]]
RECIPES: dict[str, tuple[Pair, str, Method, dict[str, bytes]]] = {
    "hot-seeded": (layer, "hot", DeltaDQ(4, 16, 4), {}),
    "hot-seeded-2bit": (plain, "hot", DeltaDQ(2, 16, 2, share=8), {}),
    "hot-seeded-128": (plain, "hot", DeltaDQ(1, 128, 1, share=1), {}),
    "hot-fixed": (layer, "hot", DeltaDQ(3, 10, 3, index="fixed", share=2, scale_group=5), {}),
    "hot-fixed-all": (wide, "hot", DeltaDQ(4, 4, 6, index="fixed", share=1, scale_dtype="F32"), {}),
    "hot-grown": (grown, "hot", DeltaDQ(4, 8, 5, share=2, scale_group=3), {}),
    "hot-tied": (tied, "hot", DeltaDQ(1, 4, 2), {}),
    "hot-odd": (odd, "hot", DeltaDQ(), FILES),
    "hot-unchanged": (unchanged, "hot", DeltaDQ(), {}),
    "cold-rank": (layer, "cold", DeltaDQ(3, 10, 3, index="rank", share=1), {}),
    "cold-rank-wide": (wide, "cold", DeltaDQ(14, 66, 8, index="rank", share=4), FILES),
    "cold-rank-all": (wide, "cold", DeltaDQ(5, 5, 2, index="rank", share=1, scale_group=2), {}),
    "cold-seeded": (layer, "cold", DeltaDQ(8, 32, 4), FILES),
    "cold-grown": (grown, "cold", DeltaDQ(2, 9, 4, index="fixed"), {}),
    "cold-odd": (odd, "cold", DeltaDQ(), {}),
    "hot-lowbit": (layer, "hot", RTN(3, "asymmetric", scale_group=16), {}),
    "hot-lowbit-column": (plain, "hot", BitDelta("column"), {}),
    "hot-sparse": (plain, "hot", DARE(0.9, 4), {}),
    "hot-exact": (odd, "hot", Exact(), FILES),
    "cold-exact": (layer, "cold", Exact("fast"), {}),
    "cold-sparse": (plain, "cold", Magnitude(0.05), {}),
    "hot-progressive": (grown, "hot", DeltaDQ(4, 8, 5, share=2, scale_group=3), FILES),
    "cold-progressive": (plain, "cold", DARE(0.7, 4), {}),
}


NM_TERMS = NMLayout(2, 8, 4, share=2), NMLayout(1, 6, 1, "fixed", "midrise", scale_group=2)
BANDS = LowRankLayout(2, Coding(8, scale_group=32)), LowRankLayout(3, Coding(3, "asymmetric")), LowRankLayout(1, "F16")


def sum_of_terms(layouts: tuple[NMLayout | LowRankLayout, ...]) -> bytes:
    """Return a file whose one tensor is a sum of terms; pack has no method that makes one."""
    chunks: list[bytes] = []
    rows, columns = 70, 24
    rng = np.random.default_rng(99)

    class Sink:
        def write(self, data: bytes | bytearray | memoryview, /) -> None:
            chunks.append(bytes(data))

    writer = ContainerWriter(Sink())
    digest, terms = blake3(), []
    for layout in layouts:
        seed = 7 if layout.seeded else 0
        packed = blank(layout, rows, columns)
        if isinstance(layout, NMLayout):
            nm.encode(layout, term_arrays(rng, layout, seed, rows, columns), packed)
        else:
            LowRankCodec(layout, rows, columns).encode(band(rng, layout, rows, columns), packed)
        refs = {}
        for name, array in packed.items():
            data = array.tobytes()
            digest.update(data)
            refs[name] = writer.add(data)
        terms.append(Term(writer.layout_number(layout), layout, seed, refs))
    base = BaseRef(bytes(32), "BF16", (rows, columns))
    writer.finish(
        [TensorEntry("sum", "add", "F32", (rows, columns), base, digest.digest(), None, tuple(terms))],
        removed=["gone"],
        metadata={"method": "by hand"},
    )
    return b"".join(chunks)


def term_arrays(rng: np.random.Generator, layout: NMLayout, seed: int, rows: int, columns: int) -> nm.NMArrays:
    """Return random codes and scales at the positions that a layout allows."""
    groups, mask_rows = layout.groups(columns), layout.mask_rows(rows)
    if layout.index == "seeded":
        positions = hashing.seeded(seed, 0, mask_rows, groups, layout.n, layout.m)
    else:
        drawn: NDArray[Any] = rng.permuted(np.tile(np.arange(layout.m), (mask_rows, groups, 1)), axis=2)
        positions = np.sort(drawn[:, :, : layout.n], axis=2).astype(np.uint8)
    codes = rng.integers(0, layout.top + 1, (rows, layout.kept(columns)), np.uint8)
    scales = np.full((rows, layout.scales_per_row(columns)), 0.5, np.float32)
    return nm.NMArrays(positions, codes, scales)


def band(rng: np.random.Generator, layout: LowRankLayout, rows: int, columns: int) -> LowRankArrays:
    """Return random vectors."""
    sides: list[Any] = []
    for length in (rows, columns):
        coding, shape = layout.factors, (layout.rank, length)
        if isinstance(coding, str):
            sides.append(narrow(rng.standard_normal(shape, np.float32), coding))
            continue
        codes = rng.integers(0, coding.top + 1, shape, np.uint8)
        scales = np.full((layout.rank, coding.scales(length)), 0.5, np.float32)
        sides.append(LowbitArrays(codes, scales, np.ones(scales.shape, np.uint8) if coding.has_zero_points else None))
    return LowRankArrays(*sides)


def write_link(out: Path) -> None:
    """Write the second link of a chain, which names its parent."""
    base, finetuned = layer(np.random.default_rng(98))
    later = {name: moved(np.random.default_rng(97), tensor) for name, tensor in finetuned.items()}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        versions = [write_checkpoint(work / str(i), each, {}) for i, each in enumerate((base, finetuned, later))]
        parent = work / "parent.deltafmt"
        deltafmt.pack(*versions[:2], parent, method=Exact(), missing="removed", threads=1)
        deltafmt.pack(*versions[1:], out, method=DeltaDQ(1, 4, 2), parent=parent, force=True, threads=1)


def main(folder: Path) -> None:
    """Write every seed input."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, (pair, profile, method, files)) in enumerate(RECIPES.items()):
        base, finetuned = pair(np.random.default_rng(number))
        out = folder / f"{name}.deltafmt"
        with tempfile.TemporaryDirectory() as temporary:
            work = Path(temporary)
            sides = write_checkpoint(work / "base", base, {}), write_checkpoint(work / "finetuned", finetuned, files)
            options = {"exact": name.endswith("progressive"), "force": True, "missing": "removed", "threads": 1}
            deltafmt.pack(*sides, out, method=method, profile=profile, **options)
    write_link(folder / "hot-parent.deltafmt")
    (folder / "hot-sum.deltafmt").write_bytes(sum_of_terms(NM_TERMS))
    (folder / "hot-bands.deltafmt").write_bytes(sum_of_terms(BANDS))
    for path in sorted(folder.glob("*.deltafmt")):
        result = deltafmt.verify(path)
        size = path.stat().st_size
        if size > LARGEST:
            raise SystemExit(f"{path} has {size} bytes, over {LARGEST}")
        print(f"{path.name}: {size:,} bytes, {result.tensors} tensors, {result.sections} sections")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "corpus")
