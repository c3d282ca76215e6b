"""What every method keeps of a fine-tune's accuracy at equal sizes of the whole file.

    python benchmarks/accuracy.py PAIR_FOLDER [--task NAME] [--ratios 8 16 32 64 128] [--methods LABEL ...]
    python benchmarks/accuracy.py PAIR_FOLDER --settings deltadq:nm=2:16,bits=2 residual ...

PAIR_FOLDER holds ``base``, the fine-tune's folder, ``tokenizer.json`` and problems: ``math`` with ``eval.jsonl``, or
what ``train_pair.py`` writes, such as ``lists`` with ``eval-lists.jsonl``. ``--base``, ``--finetuned``, ``--tokenizer``
and ``--eval`` name them one by one.

For every ratio each method of ``ladders.py`` has the setting of the largest file that is at most the fine-tune's bytes
over the ratio. The first half of the problems is measured; the second half is the text that calibrated methods read.
A second table keeps the same share of entries, chosen and scaled in different ways. ``--settings`` measures settings as
they are: a method's name, with options after a colon as a rule has them.

Every point is written to ``NAME.jsonl`` as it comes, and a later run takes it from there; remove the file to begin
again. ``NAME.json``, ``NAME.md`` and ``NAME.svg`` are written at the end. Needs torch and transformers.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from common import RESULTS, WORKER_THREADS, Figure, report
from curves import chart
from ladders import DROPPED, FRACTIONS, LADDERS, TARGET
from points import Job, Pair, Workplace, method_of
from solve import Problem, batches, load, read_problems, scores_of

from deltafmt.checkpoint.folder import Checkpoint

# Of the linear algebra in the processes that pack, which take it from here as they start.
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1") | {
    "TOKENIZERS_PARALLELISM": "false"
}
RATIOS = (8.0, 16.0, 32.0, 64.0, 128.0)
TASKS = (("math", "eval.jsonl"), ("lists", "eval-lists.jsonl"))
Record = dict[str, Any]


def find_pair(options: argparse.Namespace) -> Pair:
    """Return the pair that the command line names.

    Raises:
        SystemExit: a part of it is not there.
    """
    folder: Path = options.pair or Path()
    tasks = dict(TASKS)
    task = options.task or next((name for name, file in TASKS if (folder / file).is_file()), "math")
    names = (tasks.get(task, ""), f"eval-{task}.jsonl", "eval.jsonl")
    problems = next((folder / name for name in names if name and (folder / name).is_file()), folder / names[1])
    pair = Pair(
        options.base or folder / "base",
        options.finetuned or folder / task,
        options.tokenizer or folder / "tokenizer.json",
        options.eval or problems,
    )
    for path in (pair.base, pair.finetuned, pair.tokenizer, pair.problems):
        if not path.exists():
            sys.exit(f"{path} does not exist")
    return pair


def identity(pair: Pair) -> str:
    """Return a digest of a pair's weights, tokenizer and problems."""
    digest = blake3()
    for folder in (pair.base, pair.finetuned):
        with Checkpoint(folder) as checkpoint:
            for path, _, _ in checkpoint.identity():
                digest.update(Path(os.fsdecode(path)).read_bytes())
    for path in (pair.tokenizer, pair.problems):
        digest.update(path.read_bytes())
    return digest.hexdigest(8)


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """Return the points that are asked for; those that take longest first, so that none is waited for alone."""
    if options.settings:
        found = []
        for setting in options.settings:
            name, _, texts = setting.partition(":")
            tokens = options.calibration_tokens if method_of(setting).calibration == "required" else 0
            found.append(Job("settings", setting, None, name, (texts,), tokens))
        return found
    jobs = [
        Job("sizes", ladder.label, ratio, ladder.method, ladder.rungs, ladder.calibrated * options.calibration_tokens)
        for ratio in options.ratios
        for ladder in LADDERS
        if ladder.label in options.methods
    ]
    for label, setting_of in DROPPED if options.dropped else ():
        for part in FRACTIONS:
            name, _, texts = setting_of(part).partition(":")
            jobs.append(Job("dropped", label, part, name, (texts,)))
    return sorted(jobs, key=lambda job: (not job.tokens, job.method != TARGET))


def write_moments(model: Any, problems: list[Problem], folder: Path) -> None:
    """Write the second moments of the inputs of every linear layer, by the name of its weight."""
    import torch

    names = {id(weight): name for name, weight in model.named_parameters()}
    sums: dict[str, Any] = {}
    kept: list[Any] = []

    def add(name: str, _: Any, inputs: tuple[Any, ...]) -> None:
        rows = inputs[0].flatten(0, -2)[kept[-1]].float()
        sums[name] = sums.get(name, 0) + rows.T @ rows

    hooks = [
        module.register_forward_pre_hook(functools.partial(add, names[id(module.weight)]))
        for module in model.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with torch.no_grad():
        for tokens, wanted in batches(problems):
            last = wanted.shape[1] - (wanted != -1).flip(1).int().argmax(1)  # the answer's end
            kept.append((torch.arange(tokens.shape[1]) < last[:, None]).flatten().to(model.device))
            model(input_ids=tokens.to(model.device))
    for hook in hooks:
        hook.remove()
    folder.mkdir()
    for name, moments in sums.items():
        np.save(folder / f"{name}.npy", moments.cpu().numpy())


def packed_points(
    place: Workplace, jobs: Sequence[tuple[str, Job]], workers: int, deadline: float
) -> Iterator[tuple[str, Job, Record]]:
    """Pack points in processes and give each as it comes, until the deadline of ``time.monotonic``.

    No more points wait to be measured than there are processes, and two.
    """
    context = multiprocessing.get_context("spawn")
    waiting = list(reversed(jobs))
    running: dict[Future[Record], tuple[str, Job]] = {}
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        try:
            while waiting or running:
                while waiting and len(running) < workers + 2:
                    key, job = waiting.pop()
                    running[pool.submit(place.make, job, key)] = key, job
                left = deadline - time.monotonic()
                done = wait(running, left if left < math.inf else None, FIRST_COMPLETED).done if left > 0 else None
                if not done:
                    return
                future = done.pop()
                key, job = running.pop(future)
                yield key, job, future.result()
        finally:
            for future in running:
                future.cancel()
            if any(not future.done() for future in running):
                for process in multiprocessing.active_children():
                    process.terminate()


def scores(model: Any, problems: list[Problem]) -> Record:
    """Return what a model solves, 0 to 1, and the mean log-likelihood of the answers' tokens."""
    return dict(zip(("solves", "likelihood"), scores_of(model, problems), strict=True))


def run(
    pair: Pair, jobs: Sequence[Job], options: argparse.Namespace, records_file: Path
) -> tuple[list[tuple[Job, Record]], Record]:
    """Measure what the file of records lacks, and return all that is known, with what base and fine-tune solve."""
    import torch

    os.environ.update(ONE_THREAD)
    start = time.monotonic()
    deadline = start + 60 * options.minutes
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu":
        torch.set_num_threads(max(WORKER_THREADS - options.workers, 1))
    lines = [line for line in pair.problems.read_text("utf-8").splitlines() if line.strip()]
    half = len(lines) // 2
    measured = read_problems(pair.tokenizer, pair.problems, min(half, options.limit or half))
    known = read_records(records_file)
    who = identity(pair)
    keys = [job.key(who, len(measured)) for job in jobs]
    ends_key = f"{who}-{len(measured)}"

    def write(record: Record) -> None:
        known[record["key"]] = record
        with records_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    todo = [(key, job) for key, job in zip(keys, jobs, strict=True) if key not in known]
    with tempfile.TemporaryDirectory(prefix="accuracy-") as temporary:
        folder = Path(temporary)
        place = Workplace(pair, folder, folder / "text.jsonl", folder / "moments")
        place.text.write_text("\n".join(lines[half:]) + "\n", "utf-8")
        if todo or ends_key not in known:
            ends: Record = {"key": ends_key, "problems": len(measured)}
            for name, path in (("base", pair.base), ("finetuned", pair.finetuned)):
                model = load(path).to(device)
                ends[name] = scores(model, measured)
                print(f"{name} solves {ends[name]['solves']:.3f} of {len(measured)} problems", flush=True)
            write_moments(model, measured, place.moments)
            write(ends)
        for key, job, packed in packed_points(place, todo, options.workers, deadline):
            record = {name: value for name, value in packed.items() if name != "model"}
            if unpacked := packed.get("model"):
                record |= scores(load(Path(unpacked)).to(device), measured)
            place.clean(key)
            if "failed" not in record:
                write({"key": key, "table": job.table, "label": job.label, "column": job.column, **record})
            said = record.get("reason") or record.get("failed") or described(record)
            column = "" if job.column is None else f" {job.column:g}"
            print(f"{time.monotonic() - start:5.0f} s  {job.label}{column}: {said}", flush=True)
    if missing := sum(key not in known for key in keys):
        print(f"{missing} points are missing; the same command goes on with them")
    points = [(job, known[key]) for key, job in zip(keys, jobs, strict=True) if key in known]
    return points, known[ends_key]


def described(record: Record) -> str:
    """Return a measured point in one line."""
    return (
        f"{record['setting']}  {record['size']:,} bytes  {record['times']:.2f}x  solves {record['solves']:.3f}  "
        f"log-likelihood {record['likelihood']:.4f}"
    )


def read_records(path: Path) -> dict[str, Record]:
    """Return the records of a file by their keys; a last line that was cut off is left out."""
    found = {}
    if path.is_file():
        for line in path.read_text("utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            found[record["key"]] = record
    return found


Points = Sequence[tuple[Job, Record]]


def grid(points: Points, corner: str, heading: Callable[[float], str]) -> list[list[str]]:
    """Return a table of what is solved: a row a label, a column a ratio or part; a dash where no file is so small."""
    columns = sorted({job.column for job, _ in points if job.column is not None})
    found = {(job.label, job.column): record for job, record in points}
    rows = [[corner, *map(heading, columns)]]
    for label in dict.fromkeys(job.label for job, _ in points):
        row = [label]
        for column in columns:
            record = found.get((label, column), {"solves": None})
            row.append("-" if "solves" not in record else "" if record["solves"] is None else f"{record['solves']:.3f}")
        rows.append(row)
    return rows


def list_of(points: Points) -> list[list[str]]:
    """Return a table with a row for every file."""
    rows = [["setting", "times smaller", "file, bytes", "solves", "log-likelihood", "layer error", "output error"]]
    for job, record in points:
        if "solves" in record:
            output = "" if record["output_error"] is None else f"{record['output_error']:.3f}"
            setting = record["setting"]
            if job.tokens and job.table == "sizes":
                setting += " (calibrated)"
            rows.append(
                [
                    setting,
                    f"{record['times']:.2f}",
                    f"{record['size']:,}",
                    f"{record['solves']:.3f}",
                    f"{record['likelihood']:.4f}",
                    f"{record['layer_error']:.3f}",
                    output,
                ]
            )
    return rows


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a table in markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


def ordered(points: Points) -> list[tuple[Job, Record]]:
    """Return points as the tables have them: by method, then by column."""
    labels = [*(ladder.label for ladder in LADDERS), *(label for label, _ in DROPPED)]
    if all(job.label in labels for job, _ in points):
        return sorted(points, key=lambda point: (labels.index(point[0].label), point[0].column or 0))
    return list(points)


def pages(name: str, points: Points, ends: Record, weights: int) -> tuple[str, str | None]:
    """Return the tables in markdown, and the chart; None where there is nothing to draw."""
    sizes = [point for point in points if point[0].table == "sizes"]
    dropped = [point for point in points if point[0].table == "dropped"]
    after, before = ends["finetuned"], ends["base"]
    opening = (
        f"{name}: {weights:,} bytes of weights, {ends['problems']} problems; the fine-tune solves "
        f"{after['solves']:.3f} (log-likelihood {after['likelihood']:.4f}), the base {before['solves']:.3f} "
        f"({before['likelihood']:.4f}).\n"
    )
    parts = [opening]
    if sizes:
        parts.append(markdown(grid(sizes, "solves, at least so many times smaller", lambda ratio: f"{ratio:g}")))
        reasons = [
            f"- `{job.label}`, {job.column:g} times: {record['reason']}" for job, record in sizes if "reason" in record
        ]
        parts += ["\n".join(reasons) + "\n"] if reasons else []
    if dropped:
        parts.append(markdown(grid(dropped, "solves, kept of the entries", lambda part: f"1/{part:g}")))
    parts.append(markdown(list_of(points)))
    lines: dict[str, dict[float, float]] = {}
    for job, record in sizes:
        if "solves" in record:
            lines.setdefault(job.label, {})[record["size"] / 1024] = record["solves"]
    if not lines:
        return "\n".join(parts), None
    curves = [(label, sorted(points.items())) for label, points in lines.items()]
    title = f"{name}: accuracy over the size of the delta file (weights: {weights / 1024:,.0f} KiB)"
    return "\n".join(parts), chart(title, "delta file, KiB", "problems solved", curves)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", nargs="?", type=Path, metavar="PAIR_FOLDER", help="folder of base, fine-tune, problems")
    parser.add_argument("--task", help="name of the fine-tune's folder (math or lists)")
    for part in ("base", "finetuned", "tokenizer", "eval"):
        parser.add_argument(f"--{part}", type=Path, metavar="PATH", help=f"the {part}, in place of PAIR_FOLDER's")
    labels = [ladder.label for ladder in LADDERS]
    parser.add_argument("--ratios", nargs="+", type=float, default=list(RATIOS), metavar="R", help="(8 16 32 64 128)")
    parser.add_argument("--methods", nargs="+", choices=labels, default=labels, metavar="LABEL", help=", ".join(labels))
    parser.add_argument("--settings", nargs="+", metavar="METHOD", help="measure these, such as rtn:bits=3")
    parser.add_argument("--dropped", action=argparse.BooleanOptionalAction, help="the table of equal shares (with all)")
    parser.add_argument("--limit", type=int, help="measure only so many problems, for a quick look")
    parser.add_argument("--calibration-tokens", type=int, default=16384, help="tokens of the text (16384)")
    parser.add_argument("--device", help="where models are measured (cuda where there is one)")
    parser.add_argument("--workers", type=int, help="processes that pack, one thread each (as many as processors)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this time (no limit)")
    parser.add_argument("--name", help="of the files that are written (accuracy-PAIR)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="where to (benchmarks/results)")
    options = parser.parse_args()
    if any(ratio <= 1 for ratio in options.ratios):
        parser.error("a ratio is not above 1")
    pair = find_pair(options)
    if options.dropped is None:
        options.dropped = options.methods == labels
    options.workers = options.workers or WORKER_THREADS
    home = pair.finetuned.resolve()
    name = options.name or f"accuracy-{home.parent.name}-{home.name}{'-settings' if options.settings else ''}"
    options.out.mkdir(parents=True, exist_ok=True)
    points, ends = run(pair, jobs_of(options), options, options.out / f"{name}.jsonl")
    points = ordered(points)
    with Checkpoint(pair.finetuned) as finetuned:
        weights = finetuned.file_bytes
    page, drawn = pages(name.removeprefix("accuracy-"), points, ends, weights)
    (options.out / f"{name}.md").write_text(page, "utf-8")
    if drawn is not None:
        (options.out / f"{name}.svg").write_text(drawn, "utf-8")
    figures = [Figure("base solves", ends["base"]["solves"], "of 1")]
    figures.append(Figure("fine-tune solves", ends["finetuned"]["solves"], "of 1"))
    for job, record in points:
        if "solves" in record:
            note = f"{record['setting']}; {record['size']:,} bytes"
            figures.append(Figure(f"{job.label} {job.column or ''}".strip(), record["solves"], "of 1", note=note))
    records = [record for _, record in points]
    rows = list_of(points)
    report(name, figures, rows, options.out, weights=weights, problems=ends["problems"], ends=ends, points=records)


if __name__ == "__main__":
    main()
