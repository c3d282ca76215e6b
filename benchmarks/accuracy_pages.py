"""The tables and charts of real pairs in docs/accuracy.md, from what ``accuracy_real.py`` wrote.

    python benchmarks/accuracy_pages.py [RESULTS.jsonl ...]

Every file of results becomes ``docs/accuracy-KIND.json``, without the errors of single matrices. Then the parts of
``docs/accuracy.md`` between the marks of a pair are written anew, and ``docs/accuracy-KIND.svg`` is drawn.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from accuracy import markdown, read_records
from curves import chart
from real_points import ALL, DROPOUT, SPREAD, TARGET

from deltafmt.analysis import svg

DOCS = Path(__file__).parent.parent / "docs"
PAGE = "accuracy.md"
ORDER = (TARGET, DROPOUT, "deltadq, 1 bit", "deltadq, 4 bits", "deltadq, 4 rows share", SPREAD, *ALL)
APART = 1.1  # how many times the ratio of its column a file is smaller before the table says how much
LEFT_OUT = ("tensors", "losses", "model", "matrices")
Record = dict[str, Any]


def condensed(records: Iterable[Record]) -> Record:
    """Return what the page needs of a pair's records: what was measured once, and the points."""
    found: Record = {"points": []}
    for record in records:
        kept = {name: value for name, value in record.items() if name not in LEFT_OUT}
        key = kept.pop("key")
        if key == "pair":
            found |= kept
        elif key == "plan":
            found["plan"] = kept
        elif key == "left out":
            found["left_out"] = kept["points"]
        else:
            found["points"].append(kept)
    found["points"].sort(key=lambda point: (ORDER.index(point["label"]), point["ratio"], point["seed"]))
    return found


def mean_of(tasks: Record, measure: str) -> float:
    """Return the mean of a measure over the tasks."""
    return sum(float(found[measure]) for found in tasks.values()) / len(tasks)


def is_text(pair: Record) -> bool:
    """Return whether the pair is measured on plain text."""
    return list(pair["texts"]) == ["text"]


def gain_kept(pair: Record, tasks: Record) -> float:
    """Return the share of the fine-tune's gain in log-likelihood over the base that is kept; at most about 1."""
    gained = mean_of(pair["finetuned"], "likelihood") - mean_of(pair["base"], "likelihood")
    return 1 - mean_of(tasks, "lost") / gained


def grid(pair: Record, cell: Any, corner: str) -> list[list[str]]:
    """Return a table with a row a method and a column a size."""
    points = [point for point in pair["points"] if not point["seed"]]
    ratios = sorted({point["ratio"] for point in points})
    found = {(point["label"], point["ratio"]): point for point in points}
    rows = [[corner, *(f"{ratio:g}" for ratio in ratios)]]
    for label in dict.fromkeys(point["label"] for point in points):
        cells = []
        for ratio in ratios:
            point = found.get((label, ratio))
            if point is None or "tasks" not in point:
                cells.append("" if point is None else "-")
                continue
            smaller = f" ({point['times']:.0f})" if point["times"] > APART * ratio else ""
            cells.append(cell(point) + smaller)
        if any(cell not in ("", "-") for cell in cells):
            rows.append([f"`{label}`", *cells])
    return rows


def listed(pair: Record) -> list[list[str]]:
    """Return a table with a row a file."""
    tasks = list(pair["texts"])
    measure = "agrees" if is_text(pair) else "solves"
    rows = [["setting", "times smaller", *(f"{measure}, {task}" for task in tasks), "lost a token", "s to pack"]]
    for point in pair["points"]:
        if "tasks" not in point:
            continue
        cells = []
        for task in tasks:
            found = point["tasks"][task]
            low, high = found.get(f"{measure}_95", (None, None))
            cells.append(f"{found[measure]:.3f}" + ("" if low is None else f" ({low:.3f} to {high:.3f})"))
        lost = " / ".join(
            f"{found['lost']:.4f} ({found['lost_95'][0]:.4f} to {found['lost_95'][1]:.4f})"
            for found in point["tasks"].values()
        )
        setting = f"`{point['setting']}`" + (f", seed {point['seed']}" if point["seed"] else "")
        setting += ", calibrated" if ALL.get(point["label"]) and ALL[point["label"]].calibrated else ""
        setting = f"`{SPREAD}`: {point['setting']}" if point["label"] == SPREAD else setting
        rows.append([setting, f"{point['times']:.1f}", *cells, lost, f"{point['seconds']:.1f}"])
    return rows


def scaled(pair: Record) -> list[list[str]]:
    """Return a table of what a factor on the kept delta does: the log-likelihood lost."""
    points = [point for point in pair["points"] if point.get("scaled")]
    factors = sorted({factor for point in points for factor in point["scaled"]}, key=float)
    rows = [["lost a token with the kept delta times", "times smaller", *factors, "1"]]
    for point in points:
        cells = [f"{mean_of(point['scaled'][factor], 'lost'):.4f}" for factor in factors]
        rows.append(
            [f"`{point['setting']}`", f"{point['times']:.1f}", *cells, f"{mean_of(point['tasks'], 'lost'):.4f}"]
        )
    return rows


def told(pair: Record) -> str:
    """Return what a pair is, in a paragraph."""
    made, tasks = pair["made"], list(pair["texts"])
    measure = "agrees" if is_text(pair) else "solves"
    sides = []
    for name, side in (("fine-tune", pair["finetuned"]), ("base", pair["base"])):
        each = ", ".join(f"{side[task][measure]:.3f} ({side[task]['likelihood']:.4f})" for task in tasks)
        sides.append(f"{name} {each}")
    opening = (
        f"{made['parameters']:,} parameters; {made['steps']} steps of {made['batch']} texts at a rate of "
        f"{made['rate']:g} in {made['seconds']:.0f} s. The relative norm of the delta is {made['relative_norm']:.4f}; "
        f"{100 * made['changed']:.0f}% of the BF16 elements changed. On {' and '.join(tasks)} "
        f"({', '.join(str(count) for count in pair['texts'].values())} texts), {measure} (log-likelihood a token): "
        f"{'; '.join(sides)}."
    )
    lines = [opening]
    if pair.get("greedy"):
        pairs = [f"{found['agree']} of {found['texts']}" for found in pair["greedy"].values()]
        lines.append(f"Greedy decoding and teacher forcing agree on {' and '.join(pairs)} problems.")
    if pair.get("plan"):
        lines.append(f"The plans of all targets took {pair['plan']['processor']:.0f} s of a processor.")
    if pair.get("left_out"):
        names = dict.fromkeys(re.sub(r"-[0-9]+-0$", "", name) for name in pair["left_out"])
        lines.append(f"Some files were left out for lack of time, of {', '.join(f'`{name}`' for name in names)}.")
    return " ".join(lines) + "\n"


def section(pair: Record, kind: str) -> str:
    """Return a pair's part of the page."""

    def solves(point: Record) -> str:
        measure = "agrees" if is_text(pair) else "solves"
        return " / ".join(f"{found[measure]:.3f}" for found in point["tasks"].values())

    def lost(point: Record) -> str:
        return f"{mean_of(point['tasks'], 'lost'):.4f}"

    words = "agrees" if is_text(pair) else " / ".join(f"{task}" for task in pair["texts"]) + " solved"
    parts = [
        told(pair),
        markdown(grid(pair, solves, f"{words}, at least so many times smaller")),
        markdown(grid(pair, lost, "log-likelihood lost a token")),
        f"![Accuracy over bytes](accuracy-{kind}.svg)\n",
    ]
    return "\n".join(parts)


def points_section(pair: Record) -> str:
    """Return a pair's lists of single files."""
    parts = [markdown(listed(pair))]
    if any(point.get("scaled") for point in pair["points"]):
        parts.append(markdown(scaled(pair)))
    return "\n".join(parts)


def drawn(pair: Record, kind: str) -> str:
    """Return the chart of a pair: problems solved, or the gain that is kept, over the size of the file."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for point in pair["points"]:
        if "tasks" in point and not point["seed"] and not point["label"].endswith(("calibrated", "share", "16 bits")):
            value = gain_kept(pair, point["tasks"]) if is_text(pair) else mean_of(point["tasks"], "solves")
            lines.setdefault(point["label"], []).append((point["size"] / 1024, min(max(value, 0.0), 1.0)))
    what = "gain in log-likelihood kept" if is_text(pair) else "problems solved, mean of the tasks"
    curves = [(label, sorted(values)) for label, values in lines.items()]
    curves.sort(key=lambda curve: len(curve[1]) == 1)  # single dots come last
    return chart(f"{kind}: over the size of the delta file", "delta file, KiB", what, curves[: svg.COLORS])


def replaced(page: str, mark: str, text: str) -> str:
    """Return a page whose part between two marks is a text.

    Raises:
        SystemExit: the page has no such marks.
    """
    begin, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    if begin not in page or end not in page:
        raise SystemExit(f"{PAGE} has no part between {begin} and {end}")
    return re.sub(
        f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}\n\n{text}\n{end}", page, flags=re.DOTALL
    )


def pages(folder: Path, page: str) -> str:
    """Return the page with every pair that the folder has results of."""
    for path in sorted(folder.glob("accuracy-*.json")):
        kind = path.stem.removeprefix("accuracy-")
        pair = json.loads(path.read_text("utf-8"))
        page = replaced(page, kind, section(pair, kind))
        page = replaced(page, f"points of {kind}", points_section(pair))
    return page


def main(paths: Sequence[str]) -> None:
    """Write the page."""
    for text in paths:
        path = Path(text)
        pair = condensed(read_records(path).values())
        kind = pair["made"]["kind"]
        (DOCS / f"accuracy-{kind}.json").write_text(json.dumps(pair, separators=(",", ":")) + "\n", "utf-8")
        (DOCS / f"accuracy-{kind}.svg").write_text(drawn(pair, kind), "utf-8")
    page = DOCS / PAGE
    page.write_text(pages(DOCS, page.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
