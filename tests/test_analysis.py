"""The analysis of a pair: its tensors, its losses and groups, and the command with its tables, JSON and page."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import deltafmt
from conftest import Cli, Pair, Tensors, normal, nudge, raw, refused, run_cli, write_folder, write_pair
from deltafmt.analysis import analyze, svg, tables
from deltafmt.analysis.approximation import OUTLIERS
from deltafmt.analysis.layer_inputs import VECTORS, normal_inputs
from deltafmt.analysis.pairs import find_pairs, layer_kinds
from deltafmt.analysis.report import TensorFigures
from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.methods import RTN, DeltaDQ

UP, DOWN = "model.layers.0.up.weight", "model.layers.0.down.weight"


def figures(name: str, found: list[TensorFigures]) -> TensorFigures:
    return next(one for one in found if one.pair.name == name)


# Parts


def test_kinds_and_depths() -> None:
    names = {
        "model.embed_tokens.weight": ("embed_tokens", None),
        "model.layers.0.self_attn.q_proj.weight": ("q_proj", 0),
        "model.layers.11.self_attn.q_proj.weight": ("q_proj", 11),
        "model.layers.3.mlp.experts.17.up_proj.weight": ("up_proj", 3),
        "model.layers.3.input_layernorm.weight": ("input_layernorm", 3),
        "bert.encoder.layer.2.attention.output.dense.weight": ("attention.output.dense", 2),
        "bert.encoder.layer.2.intermediate.dense.weight": ("intermediate.dense", 2),
        "lm_head.weight": ("lm_head", None),
        "weight": ("weight", None),
        "7": ("*", None),
    }
    assert layer_kinds(list(names)) == names


def test_which_tensors_are_left_out(tmp_path: Path) -> None:
    a: Tensors = {
        UP: normal(0, (64, 64)),
        "grown": normal(1, (4, 8)),
        "other": normal(2, (4, 8)),
        "bias": normal(3, (4,)),
    }
    b = {**a, "new": normal(4, (2, 2)), "grown": normal(5, (6, 8)), "other": normal(6, (4, 9)), "bias": normal(7, (5,))}
    pair = write_pair(tmp_path, a, b)
    pairs, skipped = find_pairs(Checkpoint(pair.base).tensors, Checkpoint(pair.finetuned), exclude=["gr*"])
    assert [one.name for one in pairs] == [UP]
    another = "another shape than the base's"
    assert skipped == {"bias": another, "grown": "excluded", "new": "not in the base", "other": another}
    pairs, _ = find_pairs(Checkpoint(pair.base).tensors, Checkpoint(pair.finetuned), include=["gr*"])
    assert [(one.name, one.rows, one.is_linear) for one in pairs] == [("grown", 4, True)]


# The whole


def test_a_pair_that_is_the_same(small: Pair) -> None:
    report = analyze(small.base, small.base)
    assert report.skipped == {"position_ids": "dtype I64"}
    for one in report.tensors:
        assert (one.norms.relative, one.norms.outlier_columns, one.approximations) == (0, [], [None])
        assert one.spectrum is None or one.spectrum.energy == {}
        assert one.products is None or one.products.to_obj()["delta"]["mean_range"] == 0
    json.dumps(report.to_obj(), allow_nan=False)
    assert all(table.rows for table in tables.tables(report))


def test_losses_are_those_of_the_file(small: Pair, delta: Path) -> None:
    report = analyze(small.base, small.finetuned, deltas=[delta], seed=5)
    with deltafmt.open(delta) as opened:
        for name in (UP, DOWN):
            lost = figures(name, report.tensors).approximations[0]
            assert lost is not None
            base, finetuned = small.a[name].floats(), small.b[name].floats()
            wanted = (finetuned - base).astype(float)
            missed = wanted - opened.delta(name)
            assert lost.squares == pytest.approx((wanted**2).sum())
            assert lost.lost == pytest.approx((missed**2).sum())
            x = normal_inputs(5).of(name, base.shape[1])
            assert x is not None
            outputs, errors = (finetuned @ x.T).reshape(-1), (missed @ x.T).reshape(-1)
            assert lost.output_lost == pytest.approx((errors**2).sum(), rel=1e-4)
            largest = np.argsort(-np.abs(outputs))[: round(OUTLIERS * outputs.size)]
            assert lost.outliers == len(largest)
            assert lost.outlier_lost == pytest.approx((errors[largest] ** 2).sum(), rel=1e-4)
    embedding = figures("model.embed.weight", report.tensors)
    assert (embedding.products, embedding.approximations[0] and embedding.approximations[0].outputs) == (None, 0)


def test_kernels_of_convolutions_have_the_rows_of_the_file(tmp_path: Path) -> None:
    """Analyze took their last dimension for columns, and ended with an internal error."""
    old = {"conv.weight": normal(1, (64, 8, 3, 3)), "experts": normal(2, (2, 64, 48))}
    pair = write_pair(tmp_path, old, {name: nudge(tensor, 3) for name, tensor in old.items()})
    deltafmt.pack(pair.base, pair.finetuned, tmp_path / "d.deltafmt", method=RTN(8))
    report = analyze(pair.base, pair.finetuned, deltas=[tmp_path / "d.deltafmt"])
    assert [(one.pair.rows, one.pair.columns) for one in report.tensors] == [(64, 72), (128, 48)]
    for one in report.tensors:
        (lost,) = one.approximations
        assert lost is not None and 0 < lost.lost < 1e-3 * lost.squares  # noqa: PT018
    assert analyze(pair.base, pair.finetuned, methods=[RTN(8)]).candidates


def test_without_a_file_the_method_is_measured(small: Pair) -> None:
    coarse = analyze(small.base, small.finetuned, quantization=(1, 16, 2), include=["*up*"])
    fine = analyze(small.base, small.finetuned, methods=[DeltaDQ(16, 16, 8)], include=["*up*"])
    assert coarse.candidates[0].label == "deltadq:nm=1:16,bits=2"
    assert fine.candidates[0].label == "deltadq:nm=16:16,bits=8"
    losses = [report.by_kind()[0].to_obj()["approximations"][0]["relative_squared"] for report in (coarse, fine)]
    # Dropout with rescale loses M / N - 1 times the whole, on average; quantization comes on top.
    assert losses[0] > 10
    assert losses[1] < 1e-3


def test_groups(small: Pair) -> None:
    report = analyze(small.base, small.finetuned)
    assert [group.label for group in report.by_kind()] == ["embed", "down", "frozen", "up"]
    assert [group.label for group in report.by_depth()] == ["0", "10"]
    up = report.by_kind()[3]
    assert [len(band.members) for band in report.by_band(up)] == [1, 1, 0]
    squares = [(one.norms.delta, one.norms.base) for one in up.members]
    assert up.relative_norm == pytest.approx(math.sqrt(sum(d for d, _ in squares) / sum(b for _, b in squares)))
    each = [one.spectrum.energy[8] for one in up.members if one.spectrum]
    assert up.energy[8] == pytest.approx(sum(each) / 2)


def test_a_delta_that_is_not_finite(tmp_path: Path) -> None:
    a = {UP: normal(0, (64, 64)), DOWN: normal(1, (64, 64))}
    values = a[DOWN].floats().copy()
    values[3, 3] = np.nan
    pair = write_pair(tmp_path, a, {UP: nudge(a[UP], 1), DOWN: raw(values, "BF16")})
    report = analyze(pair.base, pair.finetuned)
    assert report.skipped == {DOWN: "the delta holds NaN or infinity"}
    assert [one.pair.name for one in report.tensors] == [UP]


def test_inputs_of_a_text(nano: Path) -> None:
    pytest.importorskip("transformers")
    report = analyze(
        nano / "base",
        nano / "math",
        calibration=nano / "eval.jsonl",
        tokenizer=nano / "tokenizer.json",
        include=["*.layers.1.*_proj.weight", "*norm*"],
    )
    assert report.inputs.startswith(f"{VECTORS} of ")
    found = {one.pair.kind: one for one in report.tensors}
    q, k, down = (found[kind].products for kind in ("q_proj", "k_proj", "down_proj"))
    assert q is not None
    assert k is not None
    assert down is not None
    assert np.array_equal(q.inputs, k.inputs)
    assert down.inputs.shape == (VECTORS, 384)
    assert found["input_layernorm"].products is None
    # What a norm lets through has about its own weights' size.
    assert 0.01 < np.square(q.inputs).mean() < 100


# The command


class Page(HTMLParser):
    """Checks that every element is closed where it should be, and collects text and elements."""

    VOID = ("meta", "!doctype")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open an element."""
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take an element that is closed at once."""
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        """Close the element that was opened last."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Collect text."""
        self.text += data


def read_page(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text("utf-8"))
    page.close()
    assert page.open == []
    return page


def test_the_tables(cli: Cli, small: Pair, delta: Path) -> None:
    result = cli("analyze", small.base, small.finetuned, "--delta", delta)
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    titles = ("The delta", "Balanced Intermediate Results", f"What {delta}", "By depth", "What to try first")
    assert [line.partition(" (")[0] for line in lines if line.startswith(titles)] == list(titles)
    assert f"({delta.stat().st_size:,} bytes, " in result.out
    header = next(i for i, line in enumerate(lines) if line.startswith("kind of layer"))
    rows = [line.split() for line in lines[header + 1 : header + 5]]
    assert [row[0] for row in rows] == ["embed", "down", "frozen", "up"]
    assert rows[2][2] == "0"
    assert "left out: position_ids (dtype I64)" in lines
    listed = cli("analyze", small.base, small.finetuned, "--delta", delta, "--tensors").out.splitlines()
    assert listed[0] == "Every tensor"
    assert len([line for line in listed if line.startswith("model.")]) == len(small.b) - 1


def test_json(cli: Cli, small: Pair) -> None:
    obj = cli("analyze", small.base, small.finetuned, "--nm", "8:16", "--json").json()
    assert (obj["schema"], obj["ok"], obj["report"]) == (1, True, None)
    assert {one["name"] for one in obj["tensors"]} == set(small.b) - {"position_ids"}
    assert obj["histogram"]["n"] == 8
    assert sum(obj["histogram"]["kept"]) == pytest.approx(sum(obj["histogram"]["all"]) / 2, rel=0.05)
    assert obj["candidates"][0]["label"] == "deltadq:nm=8:16"
    assert [one["label"] for one in obj["kinds"]] == ["embed", "down", "frozen", "up"]
    again = cli("analyze", small.base, small.finetuned, "--nm", "8:16", "--json").json()
    assert again == obj


def test_a_comparison(tmp_path: Path, cli: Cli, small: Pair, delta: Path) -> None:
    arguments = ("--delta", delta, "--method", "deltadq:nm=1:2,bits=8", "--method", "rtn:bits=4")
    result = cli("analyze", small.base, small.finetuned, *arguments, "--html", tmp_path / "r.html")
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    header = lines.index("Comparison") + 2
    assert lines[header].split() == ["delta", "bytes", "times", "smaller", "down", "frozen", "up"]
    rows = lines[header + 1 : header + 4]
    assert rows[0].startswith(f"{delta}  ")
    assert [row.partition(" ")[0] for row in rows[1:]] == ["deltadq:nm=1:2,bits=8", "rtn"]
    assert f"{delta.stat().st_size:,}" in rows[0]
    losses = [float(row.split()[-1].rstrip("%")) for row in rows]
    assert losses[0] > losses[1] > losses[2]  # 4:16 loses three times the whole, 1:2 once, rounding nearly nothing
    read_page(tmp_path / "r.html")
    obj = cli("analyze", small.base, small.finetuned, *arguments, "--json").json()
    assert obj["candidates"][0]["bytes"] == delta.stat().st_size
    assert {len(one["approximations"]) for one in obj["tensors"]} == {3}


def test_the_page(tmp_path: Path, cli: Cli, small: Pair) -> None:
    out = tmp_path / "report.html"
    assert f"plots: {out}" in cli("analyze", small.base, small.finetuned, "--html", out).out
    page = read_page(out)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("svg") == 7
    assert tags.count("table") == 6
    assert not {"script", "link", "img", "iframe"} & set(tags)
    content = out.read_text("utf-8")
    assert "http" not in content
    assert "url(" not in content
    assert "nan" not in content.replace("fine-tune", "")
    for words in ("Energy in the first singular values", "share of the sum of squares", "kept, 4 bits", "variance"):
        assert words in page.text
    refused(cli("analyze", small.base, small.finetuned, "--html", out), 2, "exists")
    assert cli("analyze", small.base, small.finetuned, "--html", out, "--force", "--json").json()["report"] == str(out)


def test_names_are_only_text(tmp_path: Path, cli: Cli) -> None:
    name = "layers.0.<script>alert(1)</script>&\x1b[31m\u202e.weight"
    a = {name: normal(1, (64, 64)), "other.<b>": normal(2, (8,))}
    pair = write_pair(tmp_path, a, {name: nudge(a[name], 1)} | {"<i>new": normal(3, (4,))})
    out = tmp_path / "report.html"
    result = cli("analyze", pair.base, pair.finetuned, "--html", out)
    assert result.code == 0
    assert result.out.replace("\n", "").isprintable()
    page = read_page(out)
    assert not {"script", "b", "i"} & {tag for tag, _ in page.elements}
    assert "<script>alert(1)</script>" in page.text
    assert "\x1b" not in page.text


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (("--bits", "1"), 2, "bits k = 1"),
        (("--bits", "9"), 2, "k = 9"),
        (("--nm", "5:4"), 2, "N = 5"),
        (("--nm", "4"), 2, "'4'"),
        (("--seed", "-1"), 2, "seed -1"),
        (("--method", "none"), 2, "unknown method 'none'"),
        (("--method", "rtn:nm=4:16"), 2, "--method 'rtn:nm=4:16': "),
        (("--method", "rtn:bits"), 2, "'bits'"),
        (("--method", "rtn", "--bits", "4"), 2, "for histograms"),
        (("--force",), 2, "--force needs --html REPORT"),
        (("--include", "*.mlp.*"), 2, "'*.mlp.*' matches no tensor"),
        (("--tokenizer", "here"), 2, "--calibration"),
        (("--calibration", "nowhere.txt"), 5, "nowhere.txt"),
        (("--delta", "nowhere.deltafmt"), 5, "nowhere.deltafmt"),
        (("--html", "no/folder/report.html"), 5, "report.html"),
    ],
)
def test_wrong_options(cli: Cli, small: Pair, arguments: tuple[str, ...], code: int, word: str) -> None:
    refused(cli("analyze", small.base, small.finetuned, *arguments), code, word)


def test_wrong_files(tmp_path: Path, cli: Cli, small: Pair, delta: Path) -> None:
    refused(cli("analyze", tmp_path / "nowhere", small.finetuned), 5, "nowhere")
    refused(cli("analyze", small.base, delta), 3, "not a checkpoint")
    damaged = tmp_path / "damaged.deltafmt"
    damaged.write_bytes(delta.read_bytes()[:-1])
    refused(cli("analyze", small.base, small.finetuned, "--delta", damaged), 3, "damaged.deltafmt")
    a = {f"other.{name}": tensor for name, tensor in small.a.items()}
    other = write_pair(tmp_path / "other", a, {name: tensor for name, tensor in a.items() if len(tensor.shape) > 1})
    refused(cli("analyze", other.base, other.finetuned, "--delta", delta), 4, "other.model")
    wider = write_folder(tmp_path / "wider", {name: normal(7, (9, 7)) for name in small.b})
    refused(cli("analyze", small.base, wider), 4, "different architecture", "[9, 7]")
    reverse = tmp_path / "reverse.deltafmt"
    deltafmt.pack(small.finetuned, small.base, reverse)
    refused(cli("analyze", small.base, small.finetuned, "--delta", reverse), 4, f"{reverse}: wrong base {small.base}")


def test_nothing_left_to_analyze(cli: Cli, small: Pair) -> None:
    refused(cli("analyze", small.base, small.finetuned, "--exclude", "*"), 2, "no tensor", "is left to analyze")


def test_only_calibration_needs_torch(small: Pair) -> None:
    done = run_cli("analyze", small.base, small.finetuned, "--json", env={"DELTAFMT_CORE": "0"})
    assert (done.returncode, done.stderr) == (0, b"")
    code = (
        "import sys; from deltafmt.tools.main import main; code = main(sys.argv[1:]);"
        "assert not {'torch', 'transformers'} & set(sys.modules); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "analyze", str(small.base), str(small.finetuned)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


# Charts


def test_ticks_are_round_and_inside() -> None:
    assert svg.Axis("", 0, 1).ticks() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert svg.Axis("", 1e-5, 1e-2, log=True).ticks() == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2])
    for values in ([0.0], [3.0, 3.0], [-5.0, 17.0], [1e-9, 2e-9]):
        axis = svg.axis_over("", values)
        assert all(axis.low < value < axis.high for value in values)
        assert 2 <= len(axis.ticks()) <= 8
    empty = svg.axis_over("", [math.nan, -1.0], log=True)
    assert (empty.low, empty.high) == (1, 10)


def test_what_is_no_number_is_not_drawn() -> None:
    axis = svg.Axis("", 1, 10, log=True)
    chart = svg.line_chart("t", axis, axis, [("a", [(1, 1), (2, math.nan), (0, 3), (10, 10)])])
    assert "nan" not in chart
    assert chart.count("L") == 1
