"""What every method keeps of a fine-tune of a real language model, and what its errors are, on one pair.

    python benchmarks/accuracy_real.py DIR KIND [--minutes M] [--ratios 64 128 32 16 256 8] [--methods LABEL ...]

DIR is what ``train_pair.py --from MODEL --out DIR`` wrote, KIND one of its fine-tunes. Files are packed in processes of
one thread each while others are measured on ``--device``. The most telling points come first; when the minutes are
over, the rest is left out, and the results say so.

Teacher forcing: a problem is solved when every token of its answer is the most likely one after the true tokens before
it, which is what greedy decoding solves; both are compared for some problems. Of every file are kept:

- ``tasks``: the share of problems solved and of tokens agreed, and the log-likelihood of a token, with intervals of 95%
  (Wilson's; a bootstrap over problems), and how much likelihood the file loses against the fine-tune on the same
  problems.
- ``tensors``: for every matrix, with D its delta and E what the unpacked model lacks of it: |E|^2 / |D|^2, <D - E, D> /
  |D|^2, |E X|^2 / |D X|^2 for the inputs X of its layer on the measured problems, <G, E> for the gradient G of the mean
  log-likelihood there, and F E^2 for the mean squared gradient F of a batch.
- ``scaled``: the same measures with the kept delta times a factor.

Every point is a line of ``NAME.jsonl``, written as it comes; a later run goes on. Needs torch and transformers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import real_points
import torch
from accuracy import ONE_THREAD, read_records
from common import RESULTS, WORKER_THREADS, machine
from ladders import TARGET
from points import Pair
from real_measure import Measure, Texts, greedy_agrees, read_texts
from real_points import Packer, Point, pack_planned, planned, points_of

Record = dict[str, Any]
FACTORS = (0.7, 0.85)  # of the kept delta, beside 1
SCALED_FROM = 32  # times smaller, from which dropout is also measured with these
GREEDY = 50  # problems a task that are also decoded


def described(record: Record) -> str:
    """Return a measured point in one line."""
    tasks = "  ".join(f"{task} {found['solves']:.3f} {found['lost']:+.4f}" for task, found in record["tasks"].items())
    return f"{record['setting']}  {record['times']:.1f}x  {tasks}  {record['seconds']:.1f} s"


@dataclass(slots=True)
class Queue:
    """The files that are packed in other processes, until the time is over.

    Attributes:
        packer: packs them.
        workers: how many processes.
        deadline: of ``time.monotonic``.
        waiting: points that are not begun, the next one last.
        running: what each process does.
    """

    packer: Packer
    workers: int
    deadline: float
    waiting: list[Point]
    running: dict[Future[Any], Point | None] = field(default_factory=dict)

    def results(self, pool: ProcessPoolExecutor, ratios: list[float]) -> Iterator[tuple[Point | None, Any]]:
        """Give every point with what was packed, as it comes; None with the plans for the ratios' targets."""
        if ratios:
            self.running[pool.submit(planned, self.packer, ratios, max(self.workers // 4, 1))] = None
        while True:
            while self.waiting and len(self.running) < self.workers + 2 and time.monotonic() < self.deadline:
                point = self.waiting.pop()
                self.running[pool.submit(self.packer.make, point)] = point
            left = self.deadline - time.monotonic()
            if not self.running or left <= 0:
                return
            for future in wait(self.running, left if left < math.inf else None, FIRST_COMPLETED).done:
                point = self.running.pop(future)
                try:
                    result = future.result()
                except Exception as error:  # noqa: BLE001 - one that fails shall not end all others
                    result = {"failed": f"{type(error).__name__}: {error}", "plans": []}
                if point is None:
                    for ratio, plan in result["plans"]:
                        target = Point(TARGET, ratio)
                        self.running[pool.submit(pack_planned, self.packer, ratio, plan)] = target
                yield point, result

    def stop(self) -> list[str]:
        """End what runs, and return what was left out."""
        for future in self.running:
            future.cancel()
        if any(not future.done() for future in self.running):
            for process in multiprocessing.active_children():
                process.terminate()
        points = [*reversed(self.waiting), *self.running.values()]
        return ["plan" if point is None else point.name for point in points]


def first_record(measure: Measure, made: Record) -> Record:
    """Return what is measured once a pair."""
    return {
        "key": "pair",
        "made": made,
        "machine": machine(),
        "texts": {task: len(texts) for task, texts in measure.tasks.items()},
        "finetuned": measure.scores(measure.finetuned),
        "greedy": {
            task: greedy_agrees(measure.model, texts[:GREEDY])
            for task, texts in measure.tasks.items()
            if task != "text"
        },
        "base": measure.base_scores(),
        "matrices": measure.described(),
    }


def factors_of(point: Point) -> tuple[float, ...]:
    """Return the factors with which the kept delta of a point is measured too."""
    dropped = point.label.startswith(("deltadq", "residual")) and point.ratio >= SCALED_FROM and not point.seed
    return FACTORS if dropped else ()


def tasks_of(folder: Path, made: Record, limit: int | None) -> dict[str, Texts]:
    """Return the texts that measure a fine-tune, by task."""
    kind = made["kind"]
    config = json.loads((folder / kind / "config.json").read_text("utf-8"))
    ends = config["bos_token_id"], config["eos_token_id"]
    tokenizer = folder / f"{kind}-tokenizer.json"
    return {task: read_texts(tokenizer, folder / f"{kind}-{task}.jsonl", *ends, limit) for task in made["tasks"]}


def first_told(lines: Path, known: dict[str, Record], measure: Measure, made: Record) -> Record | None:
    """Return what is measured once a pair; None if that is known, of as many texts."""
    if "pair" not in known:
        return first_record(measure, made)
    if known["pair"]["texts"] != {task: len(found) for task, found in measure.tasks.items()}:
        raise SystemExit(f"{lines} was measured on other texts; name another folder with --out")
    return None


def run(folder: Path, kind: str, options: argparse.Namespace, lines: Path) -> None:
    """Measure a pair until the minutes are over, and write every point."""
    os.environ.update(ONE_THREAD)
    begun = time.monotonic()
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cpu":
        torch.set_num_threads(max(WORKER_THREADS - options.workers, 1))
    torch.set_float32_matmul_precision("high")
    made = json.loads((folder / f"{kind}.json").read_text("utf-8"))
    pair = Pair(folder / "base", folder / kind, folder / f"{kind}-tokenizer.json", folder / f"{kind}-calibration.jsonl")
    known = read_records(lines)

    def write(record: Record) -> None:
        known[record["key"]] = record
        with lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def say(*words: object) -> None:
        print(f"{time.monotonic() - begun:4.0f} s ", *words, flush=True)

    points = [point for point in points_of(options.methods, options.ratios) if point.name not in known]
    ratios = [point.ratio for point in points if point.label == TARGET]
    waiting = [point for point in reversed(points) if point.label != TARGET]
    # Temporary models of some hundred megabytes: in memory where there is a place for them.
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None, prefix="accuracy-") as temporary:
        packer = Packer(pair, Path(temporary), pair.problems, options.calibration_tokens, device.type)
        queue = Queue(packer, options.workers, begun + 60 * options.minutes, waiting)
        with ProcessPoolExecutor(options.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            try:
                results = queue.results(pool, ratios)
                first = next(results, None)
                measure = Measure(pair.base, pair.finetuned, tasks_of(folder, made, options.limit), device)
                if told := first_told(lines, known, measure, made):
                    write(told)
                    say({name: told[name] for name in ("finetuned", "base", "greedy")})
                for point, result in itertools.chain([first] if first else [], results):
                    if point is None:
                        write({"key": "plan"} | {name: value for name, value in result.items() if name != "plans"})
                        say("plans for targets:", known["plan"])
                        continue
                    record = {name: value for name, value in result.items() if name != "model"}
                    if unpacked := result.get("model"):
                        record |= measure.of(Path(unpacked), factors_of(point))
                    shutil.rmtree(packer.folder / point.name, ignore_errors=True)
                    told = record.get("reason") or record.get("failed") or described(record)
                    say(f"{point.label} {point.ratio:g}: {told}")
                    if "failed" not in record:
                        head = {"key": point.name, "label": point.label, "ratio": point.ratio, "seed": point.seed}
                        write(head | record)
            finally:
                left_out = queue.stop()
        write({"key": "left out", "points": left_out, "minutes": round((time.monotonic() - begun) / 60, 2)})
    say(f"{kind}: {len(left_out)} points are left out: {' '.join(left_out)}")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder that train_pair.py --from wrote")
    parser.add_argument("kind", metavar="KIND", help="the fine-tune: small, large, continued or added")
    labels = [TARGET, real_points.SPREAD, *real_points.ALL]
    labels = list(dict.fromkeys(labels))
    parser.add_argument("--ratios", nargs="+", type=float, default=list(real_points.RATIOS), metavar="R")
    parser.add_argument("--methods", nargs="+", choices=labels, default=labels, metavar="LABEL", help=", ".join(labels))
    parser.add_argument("--limit", type=int, help="measure only so many texts a task, for a quick look")
    parser.add_argument("--calibration-tokens", type=int, default=16384, help="tokens of the text (16384)")
    parser.add_argument("--device", help="where models are measured (cuda where there is one)")
    parser.add_argument("--workers", type=int, default=WORKER_THREADS, help="processes that pack, one thread each")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this time (no limit)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="where to (benchmarks/results)")
    options = parser.parse_args()
    if any(ratio <= 1 for ratio in options.ratios):
        parser.error("a ratio is not above 1")
    options.out.mkdir(parents=True, exist_ok=True)
    run(options.folder, options.kind, options, options.out / f"accuracy-{options.kind}.jsonl")


if __name__ == "__main__":
    main()
