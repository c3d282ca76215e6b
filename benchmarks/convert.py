"""Size and time of one training step in each format of ``deltafmt convert``.

    python benchmarks/convert.py MODELS [--lr 1.5e-6] [--repeats 5]

``MODELS`` holds ``wordmath/``, a Llama of 14.6 million parameters. It is trained in float32 by AdamW, as
``benchmarks/sync.py`` does it; the step is the second one, in bfloat16. Sizes are those of whole files and folders.
Times are seconds of a processor, all threads together, the least of some repetitions: reading inputs that are in
memory, and writing outputs to disk.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from common import report
from safetensors.torch import save_file
from sync import State, bits, steps

import deltafmt

# Label, format, and encoding of a version folder.
FORMATS = (
    ("version folder, xor", "version-folder", "xor"),
    ("version folder, overwrite", "version-folder", "overwrite"),
    ("TRL", "trl", None),
)


def saved(folder: Path, state: State) -> Path:
    """Write a state as a checkpoint, and return the folder."""
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    return folder


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of the files in a folder."""
    return sum(each.stat().st_size for each in ([path] if path.is_file() else path.iterdir()))


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Return the least processor time of a call."""
    found = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return min(found)


def measured(folder: Path, before: State, after: State, repeats: int) -> list[list[str]]:
    """Convert one step to every format and back, check that nothing is lost, and return rows of a table."""
    base, step = saved(folder / "before", before), saved(folder / "after", after)
    delta, again = folder / "step.deltafmt", folder / "again.deltafmt"

    def pack() -> None:
        deltafmt.pack(base, step, delta, method=deltafmt.methods.Exact(), force=True)

    packed = seconds(pack, repeats)
    rows = [["deltafmt", f"{delta.stat().st_size:,}", f"packed in {packed:.2f} s", ""]]
    for label, target, encoding in FORMATS:
        out = folder / ("patch.safetensors" if target == "trl" else "patch")

        def there(out: Path = out, target: str = target, encoding: str | None = encoding) -> None:
            deltafmt.convert(delta, out, base, target, version="2", encoding=encoding, force=True)

        def back(out: Path = out) -> None:
            deltafmt.convert(out, again, base, force=True)

        made, read = seconds(there, repeats), seconds(back, repeats)
        deltafmt.unpack(base, again, folder / "restored", force=True)
        if (folder / "restored/model.safetensors").read_bytes() != (step / "model.safetensors").read_bytes():
            raise AssertionError(label)
        rows.append([label, f"{size_of(out):,}", f"from the delta file in {made:.2f} s", f"to one in {read:.2f} s"])
    return rows


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", type=Path)
    parser.add_argument("--lr", type=float, default=1.5e-6)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    _, before, after = (dict(state) for state in steps(options.models, options.lr, 2))
    changed = sum(int((bits(before[name]) != bits(after[name])).sum()) for name in before)
    elements = sum(tensor.numel() for tensor in before.values())
    print(f"{changed:,} of {elements:,} elements change, {100 * changed / elements:.2f}%")
    with tempfile.TemporaryDirectory() as name:
        rows = measured(Path(name), before, after, options.repeats)
    report("convert", [], [["format", "bytes", "", ""], *rows], elements=elements, changed=changed, formats=rows)


if __name__ == "__main__":
    main()
