"""Targets: the file is never larger, the plan never worse than one method for all."""

from __future__ import annotations

import contextlib
import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from solve import accuracy

import deltafmt
from conftest import Cli, Pair, normal, nudge, raw, refused
from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.errors import NonFiniteError, UsageError
from deltafmt.methods import RTN, BitDelta, DeltaDQ, Magnitude, Method, Residual, parse
from deltafmt.methods.base import DeltaRows
from deltafmt.methods.factorization import factorize
from deltafmt.methods.measured import Heads
from deltafmt.pipeline import alternatives, sizes
from deltafmt.pipeline.budget import default_candidates, plan_for_target
from deltafmt.pipeline.choice import Choice
from deltafmt.pipeline.losses import SAMPLE_ELEMENTS, SAMPLE_ROWS, Loss, sample_runs
from pairs import check_round_trip, pair_of

FEW: tuple[Method, ...] = (DeltaDQ(4, 16, 4), DeltaDQ(1, 16, 1), Residual(rank=2), RTN(2), BitDelta())


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Give a pair of a few matrices whose deltas are of different form."""
    rng = np.random.default_rng(5)
    a, b = {}, {}
    for number, (rows, columns) in enumerate([(96, 160), (160, 96), (33, 200), (128, 128)]):
        name = f"layers.{number}.weight"
        a[name] = normal(number, (rows, columns))
        low_rank = rng.standard_normal((rows, 3)) @ rng.standard_normal((3, columns))
        noise = rng.standard_normal((rows, columns))
        b[name] = raw(a[name].floats() + 0.05 * (number * low_rank + noise), "BF16")
    a["norm.weight"] = normal(20, (160,))
    b["norm.weight"] = nudge(a["norm.weight"], 21)
    a["same.weight"] = b["same.weight"] = normal(22, (64, 64))
    return pair_of(tmp_path_factory.mktemp("several"), a, b)


def uniform_sizes(pair: Pair, folder: Path, methods: tuple[Method, ...]) -> dict[Method, int]:
    return {
        method: deltafmt.pack(pair.base, pair.finetuned, folder / "uniform", method=method, force=True).size
        for method in methods
    }


def described(choice: Choice) -> list[tuple[str, Method | None, int, float]]:
    return [(each.plan.tensor.name, each.plan.method, each.size, each.loss) for each in choice.tensors]


@pytest.mark.parametrize("profile", ["hot", "cold"])
@pytest.mark.parametrize("ratio", [2, 5])
def test_a_file_of_the_size_that_was_planned(tmp_path: Path, several: Pair, ratio: float, profile: str) -> None:
    out = tmp_path / "d.deltafmt"
    options: dict[str, Any] = {"target_ratio": ratio, "candidates": FEW, "profile": profile}
    choice = plan_for_target(several.base, several.finetuned, **options)
    result = deltafmt.pack(several.base, several.finetuned, out, **options)
    assert result.ratio >= ratio
    assert out.stat().st_size == result.size
    assert result.choice is not None
    assert described(result.choice) == described(choice)
    if profile == "hot":
        assert result.size == choice.size
    else:
        assert result.size <= choice.size
    check_round_trip(several, out, tmp_path / "unpacked")


@given(
    shapes=st.lists(st.tuples(st.integers(1, 70), st.integers(1, 70)), min_size=1, max_size=4),
    grown=st.booleans(),
    share=st.floats(0, 1.2),
    seed=st.integers(0, 3),
)
@settings(max_examples=12, deadline=None)
def test_never_above_the_target(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, int]], grown: bool, share: float, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("pair")
    a = {f"w.{i}": normal(seed + i, shape) for i, shape in enumerate(shapes)}
    b = {name: nudge(tensor, 50 + i) for i, (name, tensor) in enumerate(a.items())}
    if grown:
        rows, columns = shapes[0]
        b["w.0"] = normal(7, (rows + 3, columns))
    pair = pair_of(folder, a, b)
    least = deltafmt.pack(pair.base, pair.finetuned, folder / "least", method=DeltaDQ(1, 16, 1)).size
    exact = deltafmt.pack(pair.base, pair.finetuned, folder / "exact", include=["anchor"], exclude=["anchor"]).size
    target = round(least + share * (exact - least))
    options: dict[str, Any] = {"target_size": target, "candidates": FEW}
    if target < least:
        with contextlib.suppress(UsageError):
            assert deltafmt.pack(pair.base, pair.finetuned, folder / "out", **options).size <= target
        return
    result = deltafmt.pack(pair.base, pair.finetuned, folder / "out", **options)
    assert (folder / "out").stat().st_size == result.size <= target
    assert result.choice is not None
    assert result.choice.size == result.size


def test_not_worse_than_one_method_for_all(tmp_path: Path, several: Pair) -> None:
    for method, size in uniform_sizes(several, tmp_path, FEW).items():
        options: dict[str, Any] = {"target_size": size}
        chosen = plan_for_target(several.base, several.finetuned, candidates=FEW, **options)
        alone = plan_for_target(several.base, several.finetuned, candidates=[method], **options)
        assert chosen.loss <= alone.loss
        assert chosen.size <= size


def test_more_bytes_lose_less(several: Pair) -> None:
    losses = [
        plan_for_target(several.base, several.finetuned, target_ratio=ratio, candidates=FEW).loss
        for ratio in (1.01, 2, 4, 6, 7)
    ]
    assert losses == sorted(losses)


def test_the_same_file_whatever_the_threads_and_to_a_stream(tmp_path: Path, several: Pair) -> None:
    options: dict[str, Any] = {"target_ratio": 5, "candidates": FEW}
    one = deltafmt.pack(several.base, several.finetuned, tmp_path / "one", threads=1, **options)
    stream = io.BytesIO()
    deltafmt.pack(several.base, several.finetuned, stream, threads=3, **options)
    assert stream.getvalue() == (tmp_path / "one").read_bytes()
    with deltafmt.open(tmp_path / "one") as opened:
        assert opened.metadata["method"] == f"target {one.choice.target} bytes"  # type: ignore[union-attr]


def test_rules_hold(tmp_path: Path, several: Pair) -> None:
    rules = [("layers.0.*", RTN(3)), ("layers.1.*", None)]
    choice = plan_for_target(several.base, several.finetuned, target_ratio=2, candidates=FEW, rules=rules)
    methods = {chosen.plan.tensor.name: chosen.plan.method for chosen in choice.tensors}
    assert methods["layers.0.weight"] == RTN(3)
    assert methods["layers.1.weight"] is None


def test_a_size_that_was_foretold_wrongly(tmp_path: Path, several: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    real = sizes.file_size
    monkeypatch.setattr(alternatives, "file_size", lambda *args, **options: real(*args, **options) - 6000)
    with Checkpoint(several.finetuned) as checkpoint:
        target = checkpoint.file_bytes // 5
    result = deltafmt.pack(several.base, several.finetuned, tmp_path / "o", target_size=target, candidates=FEW)
    assert (tmp_path / "o").stat().st_size == result.size <= target
    assert [path.name for path in tmp_path.iterdir()] == ["o"]


def test_what_python_refuses(tmp_path: Path, several: Pair) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"target_ratio": 2, "target_size": 5}, "one of them"),
        ({"target_ratio": 1}, "ratio 1 "),
        ({"target_ratio": float("nan")}, "nan"),
        ({"target_size": 0}, "size 0"),
        ({"target_ratio": 2, "method": DeltaDQ(2, 8)}, "'deltadq:nm=2:8' is given"),
        ({"candidates": FEW}, "no target"),
        ({"target_ratio": 500}, "no plan fits .* least that the candidates reach is"),
        ({"target_ratio": 2, "candidates": [Magnitude(density=0.25)]}, "'magnitude:density=0.25' depend on the delta"),
        ({"target_ratio": 2, "candidates": [DeltaDQ(index="rank")]}, "'deltadq:index=rank' has a rank index"),
    ]
    for options, message in wrong:
        with pytest.raises(UsageError, match=message):
            deltafmt.pack(several.base, several.finetuned, tmp_path / "o", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_delta_that_is_not_finite(tmp_path: Path) -> None:
    values = np.ones((40, 64), np.float32)
    values[3, 5] = np.inf
    pair = pair_of(tmp_path / "pair", {"w[0]": normal(1, (40, 64))}, {"w[0]": raw(values, "BF16")})
    with pytest.raises(NonFiniteError, match=r'^tensor "w\[0\]": the delta has NaN or infinity$') as caught:
        plan_for_target(pair.base, pair.finetuned, target_ratio=2, candidates=FEW)
    assert caught.value.remedy is not None
    assert caught.value.remedy.option == "exclude"
    plan_for_target(pair.base, pair.finetuned, target_ratio=1.1, candidates=FEW, exclude=[caught.value.remedy.value])


# Losses


def rows_of(delta: np.ndarray[Any, np.dtype[np.float32]]) -> DeltaRows:
    bits = np.ascontiguousarray(delta, np.float32).view(np.uint32)
    return DeltaRows(bits, "F32", np.zeros_like(bits), "F32", 0)


def test_approximations_are_what_a_file_decodes_to(tmp_path: Path, several: Pair) -> None:
    name = "layers.3.weight"
    delta = several.b[name].floats() - several.a[name].floats()
    for method in FEW:
        deltafmt.pack(several.base, several.finetuned, tmp_path / "o", method=method, force=True)
        with deltafmt.open(tmp_path / "o") as opened:
            expected = opened.delta(name)
            seed = opened[name].terms[-1].seed
        found = method.approximate(rows_of(delta), seed, Heads(delta, 8))
        np.testing.assert_allclose(found, expected, atol=1e-6, err_msg=method.describe())


def test_common_directions_of_a_vocabulary_do_not_count() -> None:
    rng = np.random.default_rng(0)
    common = np.outer(np.ones(60), rng.standard_normal(40)).astype(np.float32) * 5
    delta = common + rng.standard_normal((60, 40)).astype(np.float32)
    for turned in (delta, np.ascontiguousarray(delta.T)):
        head = factorize(turned, 2).dense()
        assert np.linalg.matrix_rank(head) == 2
        u, s, vt = np.linalg.svd(turned, full_matrices=False)
        np.testing.assert_allclose(head, (u[:, :2] * s[:2]) @ vt[:2], atol=1e-3)
        assert Loss(turned).of(head) < 0.05
        assert Loss(turned, common=2).of(head) == pytest.approx(1, abs=0.01)
        assert Loss(turned, common=2).of(turned) < 1e-9
    # Where there is little else, they are the delta.
    assert Loss(common, common=2).of(np.zeros_like(common)) == pytest.approx(1)


def test_losses_of_nothing_everything_and_too_little() -> None:
    delta = np.random.default_rng(0).standard_normal((50, 80)).astype(np.float32)
    for hessian in (None, np.eye(80)):
        loss = Loss(delta, hessian)
        assert loss.of(delta) < 1e-9
        assert loss.of(np.zeros_like(delta)) == pytest.approx(1)
        assert loss.of(delta * np.float32(0.7)) == pytest.approx(0.09, rel=1e-3)
    assert Loss(np.zeros((3, 4), np.float32)).of(np.zeros((3, 4), np.float32)) == 0


def test_noise_where_there_are_no_inputs_is_free() -> None:
    rng = np.random.default_rng(1)
    delta = rng.standard_normal((50, 80)).astype(np.float32)
    hessian = np.diag(np.repeat([1.0, 0.0], 40))
    error = np.zeros_like(delta)
    error[:, 40:] = rng.standard_normal((50, 40))
    error -= delta * np.float32((error * delta).sum() / (delta * delta).sum())
    assert Loss(delta, hessian).of(delta + error) < 1e-3
    assert Loss(delta).of(delta + error) > 1e-3


@given(st.integers(1, 100_000), st.sampled_from([1, 7, 384, 4096, 11008, 1 << 23]))
def test_sampled_runs(rows: int, columns: int) -> None:
    runs = sample_runs(rows, columns)
    if rows * columns <= SAMPLE_ELEMENTS:
        assert runs == [(0, rows)]
    assert all(start % SAMPLE_ROWS == 0 and start < stop <= rows for start, stop in runs)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(runs))
    sampled = sum(stop - start for start, stop in runs) * columns
    assert sampled <= max(SAMPLE_ELEMENTS + SAMPLE_ROWS * columns, SAMPLE_ROWS * columns)


# The command


USAGE = {
    "both": (("--target-ratio", "4", "--target-size", "1MB"), "one of them decides"),
    "ratio of one": (("--target-ratio", "1"), "'1' is not a number above 1"),
    "ratio below": (("--target-ratio", "-3"), "'-3'"),
    "ratio no number": (("--target-ratio", "many"), "'many'"),
    "ratio nan": (("--target-ratio", "nan"), "'nan'"),
    "size no number": (("--target-size", "5XB"), "'5XB'"),
    "size of zero": (("--target-size", "0"), "'0'"),
    "too small": (("--target-size", "100"), "no plan fits 100 bytes"),
    "method": (("--target-ratio", "4", "--method", "rtn"), "--method rtn and a target"),
    "option": (("--target-ratio", "4", "--bits", "2"), "--bits and a target"),
    "option of two words": (("--target-ratio", "4", "--scale-group", "2"), "--scale-group and a target"),
    "candidate alone": (("--candidate", "rtn"), "--candidate needs"),
    "plan alone": (("--plan",), "--plan needs"),
    "candidate of no method": (("--target-ratio", "4", "--candidate", "zip"), "unknown method 'zip'"),
    "candidate of no name": (("--target-ratio", "4", "--candidate", "bits=2"), "no method is named"),
    "candidate out of range": (("--target-ratio", "4", "--candidate", "deltadq:bits=9"), "k = 9"),
    "candidate of unknown size": (("--target-ratio", "4", "--candidate", "dare"), "depend on the delta"),
}


@pytest.mark.parametrize("what", USAGE)
def test_wrong_targets(tmp_path: Path, cli: Cli, small: Pair, what: str) -> None:
    arguments, word = USAGE[what]
    refused(cli("pack", small.base, small.finetuned, "-o", tmp_path / "o", *arguments), 2, word)
    assert list(tmp_path.iterdir()) == []


def test_plan_and_pack_on_the_command_line(tmp_path: Path, cli: Cli, several: Pair) -> None:
    size = ("--target-size", "40kb")
    candidates = [text for bits in "124" for text in ("--candidate", f"deltadq:nm=4:16,bits={bits}")]
    shown = cli("pack", several.base, several.finetuned, *size, *candidates, "--plan")
    assert (shown.code, shown.err) == (0, "")
    assert "same as the base" in shown.out
    assert "of 40,000, " in shown.out.splitlines()[-1]
    assert "lower is better; not an accuracy" in shown.out
    plan = cli("pack", several.base, several.finetuned, *size, *candidates, "--plan", "--json").json()["plan"]
    assert list(tmp_path.iterdir()) == []
    out = tmp_path / "o"
    packed = cli("pack", several.base, several.finetuned, *size, *candidates, "-o", out, "--json").json()
    assert packed["plan"] == plan
    assert packed["bytes"] == plan["bytes"] == out.stat().st_size <= 40000
    assert plan["tensors"]["same.weight"] == {"method": "same as the base", "bytes": 0, "loss": 0}
    with deltafmt.open(out) as opened:
        for name, chosen in plan["tensors"].items():
            if opened[name].action == "add":
                assert opened[name].terms[0].layout == parse(chosen["method"]).layouts(*opened[name].shape)[0]


@pytest.mark.filterwarnings("default")  # transformers' own
def test_a_wider_model_at_a_target(models: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    home = models / "wordmath"
    result = deltafmt.pack(home / "base", home / "math", tmp_path / "d.deltafmt", target_ratio=32)
    assert 32 <= result.ratio <= 32 / 0.97
    deltafmt.unpack(home / "base", tmp_path / "d.deltafmt", tmp_path / "out")
    assert accuracy(tmp_path / "out", home / "tokenizer.json", home / "eval.jsonl", 100) >= 0.98


@pytest.mark.parametrize("columns", [(), (576,), (1024, 4096), (768, 2048, 3072), (896, 4864), (33,)])
def test_no_candidate_is_tried_twice(columns: tuple[int, ...]) -> None:
    candidates = default_candidates(columns)
    assert len(set(candidates)) == len(candidates)
