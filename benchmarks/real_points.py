"""What ``accuracy_real.py`` packs: the settings of each size, in order of worth, and their packing in other processes.

Runs without torch, unless a calibration reads a text.
"""

from __future__ import annotations

import functools
import shutil
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ladders import KEPT, LADDERS, TARGET, Ladder, falling
from points import Pair, _opened, _weights, first_true, foretold, method_of

import deltafmt
from deltafmt.errors import DeltafmtError, UsageError
from deltafmt.methods import Method
from deltafmt.methods.deltadq import DeltaDQ
from deltafmt.pipeline.alternatives import Alternatives
from deltafmt.pipeline.budget import candidates_for
from deltafmt.pipeline.calibrate import Calibration
from deltafmt.pipeline.pack_options import PackOptions
from deltafmt.pipeline.plan import Plan, Rule, file_metadata, make_plan
from deltafmt.pipeline.sizes import file_size, tensor_size

SPREAD = "deltadq by spread"
DROPOUT = "deltadq"
# Heads of few vectors on dropout: what the ladder of ``residual`` has no rung for where rows are wide.
SMALL_HEADS = tuple(
    f"rank={rank},head_bits=4,nm={nm},bits=2,share=1"
    for rank in (4, 2, 1)
    for nm in ("16:32", "12:32", "8:32", "5:32", "4:32", "3:32", "5:64", "3:64", "3:128", "1:64", "1:128")
)


def _dropout(bits: int, share: int, more: str = "") -> tuple[str, ...]:
    return tuple(f"nm={nm},bits={bits},share={share}{more}" for nm in KEPT)


MORE = (
    Ladder(DROPOUT, "deltadq", _dropout(2, 1)),
    Ladder("deltadq, 1 bit", "deltadq", _dropout(1, 1)),
    Ladder("deltadq, 1 bit, gain", "deltadq", _dropout(1, 1, ",gain=1.5")),
    Ladder("deltadq, gain", "deltadq", _dropout(2, 1, ",gain=1.15")),
    Ladder("deltadq, 3 bits", "deltadq", _dropout(3, 1)),
    Ladder("deltadq, 4 bits", "deltadq", _dropout(4, 1)),
    Ladder("bitdelta, unbiased", "bitdelta", ("mean=matrix,scale=unbiased",)),
    Ladder("deltadq, 4 rows share", "deltadq", _dropout(2, 4)),
    Ladder("residual, few vectors", "residual", SMALL_HEADS),
)
ALL = {ladder.label: ladder for ladder in (*LADDERS, *MORE)}
# The labels that are packed, the most telling first; a target's plan is begun before all of them.
FIRST = (TARGET, "deltadq, 4 bits", "deltadq, 3 bits", "deltadq, gain", "residual, few vectors", DROPOUT, "residual")
SECOND = (
    *("svd, 4 bits", "svd, 3 bits", "delta-come", "deltadq, 1 bit, gain", "bitdelta", "bitdelta, unbiased", "rtn"),
    *("deltadq, 1 bit", "deltadq, 4 rows share", SPREAD),
)
THIRD = ("delta-come, calibrated", "bitdelta, calibrated", "gptq", "magnitude, N:M", "sparsegpt")
LAST = ("dare", "svd, 16 bits", "magnitude", "deltadq-sq")
RATIOS = (64.0, 128.0, 32.0, 16.0, 256.0, 8.0)
SEEDS = (1, 2)  # further seeds of plain dropout, which show what chance alone does


@dataclass(frozen=True, slots=True)
class Point:
    """What is packed: a method's setting for a size, or a plan that was made for it.

    Attributes:
        label: names a row of the table.
        ratio: times smaller the file shall be at least.
        seed: of random positions.
        calibrated: whether the fine-tune reads the text first.
    """

    label: str
    ratio: float
    seed: int = 0
    calibrated: bool = False

    @property
    def name(self) -> str:
        """A name for files."""
        return f"{self.label.replace(' ', '-').replace(',', '').replace(':', '-')}-{self.ratio:g}-{self.seed}"


def points_of(labels: Iterable[str], ratios: Iterable[float]) -> list[Point]:
    """Return the points of some methods and sizes, the most telling first."""
    wanted, sizes = set(labels), [ratio for ratio in RATIOS if ratio in set(ratios)]
    sizes += sorted(set(ratios) - set(sizes))
    found: list[Point] = []
    for group in (FIRST, SECOND, THIRD, LAST):
        for ratio in sizes:
            named = [label for label in group if label in wanted]
            found += [Point(label, ratio, calibrated=label in ALL and ALL[label].calibrated) for label in named]
        if group is SECOND and DROPOUT in wanted:
            found += [Point(DROPOUT, ratio, seed) for ratio in sizes for seed in SEEDS if ratio >= 32]
    return found


@dataclass(frozen=True, slots=True)
class Packer:
    """Packs points of a pair.

    Attributes:
        pair: the checkpoints.
        folder: for what is packed and unpacked.
        text: the calibration's text.
        tokens: of it that are read.
        device: where the fine-tune reads it.
    """

    pair: Pair
    folder: Path
    text: Path
    tokens: int
    device: str

    def make(self, point: Point) -> dict[str, Any]:
        """Pack and unpack a point.

        Returns:
            ``setting``, ``size``, ``times`` (smaller), ``seconds`` of the processor to pack it with one thread, and
            ``model``, the unpacked folder; or only ``reason``, why there is no such file; or only ``failed``.
        """
        home = self.folder / point.name
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        start, taken = time.perf_counter(), time.process_time()
        try:
            found = self._packed(point, home)
            if isinstance(found, str):
                return {"reason": found}
            path, setting, seconds = found
            record = self.unpacked(path, setting, home)
        except (DeltafmtError, OSError, ValueError) as error:
            return {"failed": f"{type(error).__name__}: {error}"}
        taking = {"wall": round(time.perf_counter() - start, 2), "processor": round(time.process_time() - taken, 2)}
        return record | {"seconds": round(seconds, 2)} | taking

    def unpacked(self, path: Path, setting: str, home: Path) -> dict[str, Any]:
        """Unpack a delta file, remove it, and return what a record says of it."""
        size = path.stat().st_size
        deltafmt.unpack(self.pair.base, path, home / "model", threads=1)
        path.unlink()
        return {"setting": setting, "size": size, "times": _weights(self.pair) / size, "model": str(home / "model")}

    def pack(self, path: Path, method: Method | None, point: Point, rules: list[Rule] | None = None) -> float:
        """Pack, and return the processor's seconds."""
        calibration = None
        if point.calibrated:
            calibration = Calibration(self.text, self.tokens, device=self.device, tokenizer=self.pair.tokenizer)
        start = time.process_time()
        deltafmt.pack(
            self.pair.base,
            self.pair.finetuned,
            path,
            method=method,
            rules=rules or (),
            calibration=calibration,
            seed=point.seed,
            threads=1,
            force=True,
        )
        return time.process_time() - start

    def _packed(self, point: Point, home: Path) -> tuple[Path, str, float] | str:
        path = home / "delta.deltafmt"
        limit = _weights(self.pair) / point.ratio
        if point.label == SPREAD:
            found = self._spread(limit)
            if isinstance(found, str):
                return found
            setting, rules = found
            return path, setting, self.pack(path, DeltaDQ(), point, rules)
        ladder = ALL[point.label]
        settings = [f"{ladder.method}:{options}" if options else ladder.method for options in ladder.rungs]
        try:
            chosen = fitting(self.pair, settings, limit)
        except UsageError:
            return self._searched(settings, limit, point, path)
        if chosen is None:
            return f"no setting of {len(settings)} is so small"
        return path, chosen, self.pack(path, method_of(chosen), point)

    def _searched(self, settings: list[str], limit: float, point: Point, path: Path) -> tuple[Path, str, float] | str:
        """Pack with the first setting whose file is small enough, where only packing tells; sizes fall."""
        packed: dict[int, tuple[int, float]] = {}
        last = [-1]

        def fits(rung: int) -> bool:
            if rung not in packed:
                spent = self.pack(path, method_of(settings[rung]), point)
                packed[rung] = path.stat().st_size, spent
                last[0] = rung
            return packed[rung][0] <= limit

        rung = first_true(len(settings), fits)
        if rung == len(settings):
            return f"no setting of {len(settings)} is so small"
        if last[0] != rung:
            self.pack(path, method_of(settings[rung]), point)
        return path, settings[rung], packed[rung][1]

    def _spread(self, limit: float) -> tuple[str, list[Rule]] | str:
        """Return rules that keep of every matrix a share in proportion to the spread of its delta's elements."""
        base, finetuned, same, files = _opened(self.pair)
        plans = make_plan(base, finetuned, DeltaDQ())
        spreads = {plan.tensor.name: _spread_of(plan) for plan in plans if plan.method and plan.alias is None}
        options = [method_of(f"deltadq:{rung}") for rung in _dropout(2, 1)]
        shares = [_share(rung) for rung in KEPT]
        removed = sorted(set(base.tensors) - set(finetuned.tensors))
        metadata = file_metadata(DeltaDQ().describe(), 0, finetuned)

        def rules_of(factor: float) -> list[Rule]:
            wanted = {name: factor * spread for name, spread in spreads.items()}
            return [
                (name, options[min(range(len(shares)), key=lambda i: abs(shares[i] / share - 1))])
                for name, share in wanted.items()
                if share
            ]

        def size(factor: float) -> int:
            chosen = make_plan(base, finetuned, DeltaDQ(), rules_of(factor))
            return file_size(chosen, same, removed, files, metadata, profile="hot", seed=0)

        largest = max(spreads.values())
        factors = [share / largest for share in falling(8.0, 0.002, 0.9)]
        rung = first_true(len(factors), lambda i: size(factors[i]) <= limit)
        if rung == len(factors):
            return "no factor is so small"
        return f"kept shares {factors[rung] * largest:.4f} at most, in proportion to spread", rules_of(factors[rung])


def fitting(pair: Pair, settings: list[str], limit: float) -> str | None:
    """Return the setting of the largest file within a limit, or None; sizes are exact where it matters.

    Raises:
        UsageError: the delta decides the sizes.
    """
    sizes = _rough(pair, tuple(settings))
    for number in sorted(range(len(settings)), key=lambda i: (-sizes[i], i)):
        if sizes[number] <= 1.02 * limit and foretold(pair, settings[number]) <= limit:
            return settings[number]
    return None


@functools.cache
def _rough(pair: Pair, settings: tuple[str, ...]) -> list[int]:
    """Return about the bytes of each setting's file: those of its matrices, one of each shape, and what is beside."""
    base, finetuned, same, _ = _opened(pair)
    plans = [plan for plan in make_plan(base, finetuned, DeltaDQ()) if plan.tensor.name not in same and not plan.alias]
    kinds: dict[tuple[Any, ...], Plan] = {}
    counts: Counter[tuple[Any, ...]] = Counter()
    for plan in plans:
        key = (plan.tensor.shape, plan.tensor.dtype, plan.shared_rows, plan.method is None)
        kinds.setdefault(key, plan)
        counts[key] += 1

    def sized(setting: str) -> int:
        method = method_of(setting)
        total = 0
        for key, plan in kinds.items():
            chosen = plan if plan.method is None else plan.decided(method)
            total += counts[key] * min(tensor_size(chosen, 0), plan.tensor.nbytes)
        return total

    shift = foretold(pair, settings[-1]) - sized(settings[-1])
    return [sized(setting) + shift for setting in settings]


def _spread_of(plan: Plan) -> float:
    from deltafmt.pipeline.losses import read_sample

    return float(read_sample(plan).dense().std())


def _share(nm: str) -> float:
    kept, group = nm.split(":")
    return int(kept) / int(group)


def planned(packer: Packer, ratios: list[float], threads: int) -> dict[str, Any]:
    """Choose methods for targets: the losses are found once, the choice is made for every ratio.

    Returns:
        ``plans``: for every ratio its rules with the foretold loss of the file and of every matrix, or why there is no
        plan. ``wall`` and ``processor``: the seconds that the losses took.
    """
    options = PackOptions.read()
    found: list[tuple[float, Any]] = []
    start, taken = time.perf_counter(), time.process_time()
    with options.open(packer.pair.base, packer.pair.finetuned) as (before, after):
        weights = after.file_bytes
        job = options.job(before, after, int(weights / 64))
        alternatives = Alternatives(job, candidates_for(job.plans))
        alternatives.measure(threads)
        spent = time.perf_counter() - start, time.process_time() - taken
        for ratio in ratios:
            try:
                choice = alternatives.choose(int(weights / ratio))
            except UsageError as error:
                found.append((ratio, str(error)))
                continue
            rules = [
                (chosen.plan.tensor.name, chosen.plan.method.spelling() if chosen.plan.method else None)
                for chosen in choice.tensors
                if chosen.plan.base is not None and len(chosen.plan.tensor.shape) > 1
            ]
            each = {chosen.plan.tensor.name: chosen.loss for chosen in choice.tensors if chosen.loss}
            found.append((ratio, (rules, choice.loss, each)))
    return {"plans": found, "wall": round(spent[0], 1), "processor": round(spent[1], 1)}


def pack_planned(packer: Packer, ratio: float, plan: Any) -> dict[str, Any]:
    """Pack and unpack what was chosen for a target, as :meth:`Packer.make` does it."""
    if isinstance(plan, str):
        return {"reason": plan}
    rules, loss, losses = plan
    point = Point(TARGET, ratio)
    home = packer.folder / point.name
    home.mkdir()
    path = home / "delta.deltafmt"
    methods = {spelling: method_of(spelling) for _, spelling in rules if spelling}
    chosen = [(name, methods[spelling] if spelling else None) for name, spelling in rules]
    try:
        spent = packer.pack(path, DeltaDQ(), point, chosen)
        record = packer.unpacked(path, f"--target-ratio {ratio:g}", home)
    except (DeltafmtError, OSError, ValueError) as error:
        return {"failed": f"{type(error).__name__}: {error}"}
    counts = Counter(spelling or "whole" for _, spelling in rules)
    return record | {"seconds": round(spent, 2), "loss": loss, "losses": losses, "chosen": dict(counts.most_common())}
