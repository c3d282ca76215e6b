"""One point of ``accuracy.py``: a setting is chosen for a size, packed and unpacked, and its errors are measured.

Runs in processes of their own, without torch unless a calibration reads a text.
"""

from __future__ import annotations

import functools
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from ladders import TARGET

import deltafmt
from deltafmt.analysis.pairs import TensorPair
from deltafmt.checkpoint.folder import Checkpoint, read_file
from deltafmt.errors import DeltafmtError, UsageError
from deltafmt.methods import Method, parse
from deltafmt.pipeline.calibrate import Calibration
from deltafmt.pipeline.plan import file_metadata, make_plan
from deltafmt.pipeline.sizes import file_size


@dataclass(frozen=True, slots=True)
class Pair:
    """Where a pair and its problems lie."""

    base: Path
    finetuned: Path
    tokenizer: Path
    problems: Path


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be measured.

    Attributes:
        table: ``sizes``, ``dropped`` or ``settings``: where the point belongs.
        label: row of the table.
        column: times smaller the file shall be at least, or the part that is kept; None for one setting as it is.
        method: name of a method, or TARGET.
        rungs: options to choose from; for a table other than ``sizes``, one.
        tokens: of the calibration's text; 0 for no calibration.
    """

    table: str
    label: str
    column: float | None
    method: str
    rungs: tuple[str, ...]
    tokens: int = 0

    def key(self, pair: str, problems: int) -> str:
        """Return what identifies the point among others of a file of records."""
        return blake3(json.dumps([asdict(self), pair, problems, deltafmt.__version__]).encode()).hexdigest(8)


def method_of(setting: str) -> Method:
    """Return the method of a setting, which is its spelling."""
    return parse(setting)


@dataclass(frozen=True, slots=True)
class Workplace:
    """What all points of a run share.

    Attributes:
        pair: the checkpoints.
        folder: for what is packed and unpacked.
        text: the calibration's text.
        moments: folder with the second moments of every matrix's inputs, ``NAME.npy``.
    """

    pair: Pair
    folder: Path
    text: Path
    moments: Path

    def make(self, job: Job, key: str) -> dict[str, Any]:
        """Pack and unpack a point.

        Returns:
            ``setting``, ``size`` (bytes of the whole file), ``times`` (smaller), ``seconds`` (of its pack),
            ``layer_error``, ``output_error`` and ``model``, the unpacked folder; or only ``reason``, why the method
            has no such file; or only ``failed``, an error.
        """
        home = self.folder / key
        home.mkdir()
        try:
            found = self._fitting(job, home)
            if isinstance(found, str):
                return {"reason": found}
            path, setting, seconds = found
            deltafmt.unpack(self.pair.base, path, home / "model", threads=1)
            layer, output = errors(self.pair, path, self.moments)
            size = path.stat().st_size
            path.unlink()
        except DeltafmtError as error:
            return {"failed": str(error)}
        return {
            "setting": setting,
            "size": size,
            "times": _weights(self.pair) / size,
            "seconds": seconds,
            "layer_error": layer,
            "output_error": output,
            "model": str(home / "model"),
        }

    def clean(self, key: str) -> None:
        """Remove what a point has left."""
        shutil.rmtree(self.folder / key, ignore_errors=True)

    def _fitting(self, job: Job, home: Path) -> tuple[Path, str, float] | str:
        """Return the delta file of a job, its setting and the seconds of its pack; or why there is none."""
        if job.method == TARGET:
            start = time.perf_counter()
            path = home / "target.deltafmt"
            try:
                deltafmt.pack(self.pair.base, self.pair.finetuned, path, target_ratio=job.column, threads=1)
            except UsageError as error:
                if "no plan fits" in str(error):
                    return str(error)
                raise
            return path, f"--target-ratio {job.column:g}", time.perf_counter() - start
        settings = [f"{job.method}:{options}" if options else job.method for options in job.rungs]

        @functools.cache
        def packed(rung: int) -> tuple[Path, str, float]:
            start = time.perf_counter()
            path = home / f"{rung}.deltafmt"
            calibration = None
            if job.tokens:
                calibration = Calibration(self.text, job.tokens, device="cpu", tokenizer=self.pair.tokenizer)
            method = method_of(settings[rung])
            deltafmt.pack(self.pair.base, self.pair.finetuned, path, method=method, calibration=calibration, threads=1)
            return path, settings[rung], time.perf_counter() - start

        if job.table != "sizes" or job.column is None:
            return packed(0)
        weights = _weights(self.pair)
        limit = weights / job.column

        def fits(rung: int) -> bool:
            return packed(rung)[0].stat().st_size <= limit

        try:
            sizes = [foretold(self.pair, setting) for setting in settings]
        except UsageError:
            # The delta decides the sizes, which fall from rung to rung.
            rung = first_true(len(settings), fits)
            if rung < len(settings):
                return packed(rung)
            least, size = settings[-1], packed(len(settings) - 1)[0].stat().st_size
        else:
            for rung in sorted((i for i, size in enumerate(sizes) if size <= limit), key=lambda i: (-sizes[i], i)):
                if fits(rung):
                    return packed(rung)
            size = min(sizes)
            least = settings[sizes.index(size)]
        return f"at least {size:,} bytes, {weights / size:.1f} times smaller ({least})"


def first_true(count: int, holds: Any) -> int:
    """Return the first number below a count for which something holds that holds for all later ones; or the count."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low


@functools.cache
def _weights(pair: Pair) -> int:
    with Checkpoint(pair.finetuned) as finetuned:
        return finetuned.file_bytes


@functools.cache
def _opened(pair: Pair) -> tuple[Checkpoint, Checkpoint, frozenset[str], dict[str, bytes]]:
    """Open a pair; return also the names of tensors that are the same in both, and the files to be attached."""
    base, finetuned = Checkpoint(pair.base), Checkpoint(pair.finetuned)
    same = {name for name, tensor in finetuned.tensors.items() if name in base.tensors}
    same = {name for name in same if finetuned.tensors[name].equals(base.tensors[name])}
    return base, finetuned, frozenset(same), {name: read_file(path) for name, path in finetuned.files.items()}


@functools.cache
def foretold(pair: Pair, setting: str) -> int:
    """Return the bytes of the file that a setting gives, a calibration's note in its metadata left out.

    Raises:
        UsageError: the delta decides them.
    """
    base, finetuned, same, files = _opened(pair)
    method = method_of(setting)
    plans = make_plan(base, finetuned, method)
    aliases = {plan.tensor.name for plan in plans if plan.alias is not None}
    removed = sorted(set(base.tensors) - set(finetuned.tensors))
    metadata = file_metadata(method.describe(), 0, finetuned)
    return file_size(plans, same - aliases, removed, files, metadata, profile="hot", seed=0)


def errors(pair: Pair, path: Path, moments: Path) -> tuple[float, float | None]:
    """Return what a delta file loses of its matrices, and of their outputs on the problems that are measured.

    Means over the matrices that differ from the base's, of |D - D'| / |D| in the Frobenius norm, and of
    |(D - D') X| / |D X| over those whose inputs X are known, by their second moments; None where none are.
    """
    base, finetuned, _, _ = _opened(pair)
    layers: list[float] = []
    outputs: list[float] = []
    with deltafmt.open(path) as delta:
        for name, tensor in finetuned.tensors.items():
            entry = delta[name]
            if entry.target is not None or len(tensor.shape) != 2 or name not in base.tensors:
                continue
            both = TensorPair(name, "", None, base.tensors[name], tensor)
            true = both.rows_of(0, both.rows).delta
            if not true.any():
                continue
            lost = np.zeros_like(true) if entry.action == "replace" else true - delta.delta(name)[: both.rows]
            layers.append(float(np.linalg.norm(lost) / np.linalg.norm(true)))
            known = moments / f"{name}.npy"
            if known.is_file():
                inputs = np.load(known)
                squares = [np.vdot(side @ inputs, side) for side in (lost, true)]
                outputs.append(float(np.sqrt(max(squares[0], 0) / squares[1])))
    return _mean(layers), _mean(outputs) if outputs else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)
