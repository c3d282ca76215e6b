"""Kernels that are compiled ahead: which variants are found, and that a launch finds what was compiled.

Nothing runs, so no GPU is needed: Triton compiles for a target that is named.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import deltafmt
from conftest import Cli
from delta_files import DeltaWriter
from deltafmt.errors import DeltafmtError, StorageError, UsageError
from deltafmt.terms.lowrank.layout import LowRankLayout
from deltafmt.terms.nm.layout import NMLayout
from strategies import examples

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")

from deltafmt.kernels import compiling, devices
from deltafmt.kernels.compiling import compile_variants, parse_target
from deltafmt.kernels.launching import launch_products
from deltafmt.kernels.products import can_fuse, fused_linear
from deltafmt.kernels.segments import FixedSegments, Segments
from deltafmt.kernels.table import OperandTable
from deltafmt.kernels.variants import Variant, collecting
from deltafmt.runtime import warmup as warmup_module
from deltafmt.runtime.warmup import entries_of, needs, variants_of_entries
from operands import random_operand
from term_kinds import CASES

HAS_PTXAS = (Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas").exists()
COLUMNS = 64
SAMPLES = [layout for cases in CASES.values() for layout in (cases.samples[0], cases.samples[-1])]
ROWS = {"q_proj": 96, "k_proj": 32, "v_proj": 32, "o_proj": 64}


def write(path: Path, layout: object, kinds: dict[str, int] | None = None) -> Path:
    made = DeltaWriter(np.random.default_rng(0))
    for name, rows in (kinds or ROWS).items():
        made.add(f"model.layers.0.self_attn.{name}.weight", (rows, COLUMNS), [layout])
    path.write_bytes(made.finish())
    return path


@pytest.mark.parametrize("layout", SAMPLES, ids=lambda layout: f"{layout.kind} {layout.describe()}")
def test_every_launch_was_foreseen(layout: object, tmp_path: Path) -> None:
    """Batches of any deltas in any numbers, of modules that share a launch in any order, need no other variant."""
    if layout.cold_only:
        layout = layout.plain()
    foreseen = set(variants_of_entries(entries_of([write(tmp_path / "d.deltafmt", layout)]), (1, 16, 300)))
    rng = np.random.default_rng(0)
    for names in (["q_proj", "k_proj", "v_proj"], ["o_proj"], ["k_proj", "v_proj"], ["q_proj"]):
        parts = [ROWS[name] for name in names]
        for slots in (4, 8, 32):
            table = OperandTable(slots, parts, COLUMNS, "cpu")
            for slot in range(2):
                table.put(slot, [[random_operand(rng, layout, rows, COLUMNS)] for rows in parts])
            for given_slots in ([0], [1, 0, -1], [0] * 7 + [1] * 9, [1] * 300, [-1] * 40 + [0] * 200 + [1] * 60):
                x = torch.zeros(len(given_slots), COLUMNS, dtype=torch.bfloat16)
                outputs = [torch.zeros(len(x), rows, dtype=torch.bfloat16) for rows in parts]
                with collecting() as found:
                    launch_products(outputs, x, table, Segments.of(given_slots, slots, "cpu"))
                    if set(given_slots) == {1} and can_fuse(table, 1, len(x)):
                        weights = [torch.zeros(rows, COLUMNS, dtype=torch.bfloat16) for rows in parts]
                        fused_linear(x, weights, table, 1)
                assert foreseen >= found.keys()
        for tokens in (1, 16, 300):
            if tokens <= table.token_limit:
                outputs = [torch.zeros(tokens, rows, dtype=torch.bfloat16) for rows in parts]
                with collecting() as found:
                    x = torch.zeros(tokens, COLUMNS, dtype=torch.bfloat16)
                    launch_products(outputs, x, table, FixedSegments(tokens, 64, torch.device("cpu")))
                assert found
                assert foreseen >= found.keys()


def test_nothing_is_launched_while_variants_are_collected() -> None:
    table = OperandTable(1, [32], COLUMNS, "cpu")
    table.put(0, [[random_operand(np.random.default_rng(0), NMLayout(1, 32, 4), 32, COLUMNS)]])
    x, y = torch.ones(1, COLUMNS), torch.zeros(1, 32)
    with collecting() as outer:
        launch_products([y], x, table, Segments.of([0], 1, "cpu"))
        assert devices.usable(x)
        with collecting() as inner:
            pass
    assert (len(outer), len(inner), bool(y.any())) == (1, 0, False)
    assert not devices.usable(x)


@examples(50)
@given(st.integers(-(2**40), 2**40), st.integers(-(2**40), 2**40))
def test_numbers_that_triton_tells_apart(one: int, other: int) -> None:
    from deltafmt.kernels.sparse.kernel import sparse_kernel

    def known(value: int) -> tuple[bool, bool, bool]:
        wide = not -(2**31) <= value < 2**31
        return (wide, not wide and value == 1, not wide and value % 16 == 0)

    same = Variant.of(sparse_kernel, {"columns": one}) == Variant.of(sparse_kernel, {"columns": other})
    assert same == (known(one) == known(other))
    # Which program begins the second part is no constant of a kernel.
    small = [Variant.of(sparse_kernel, {"block1": value % 2**20}) for value in (one, other)]
    assert small[0] == small[1]
    assert Variant.of(sparse_kernel, {"PARTS": 1}) != Variant.of(sparse_kernel, {"PARTS": 2})


def test_only_what_shares_an_input_can_share_a_launch(tmp_path: Path) -> None:
    made = DeltaWriter(np.random.default_rng(0))
    for module, columns in (("a.q", 64), ("a.k", 64), ("a.down", 128), ("b.q", 64), ("emb", 64)):
        made.add(f"{module}.weight", (32, columns), [NMLayout(1, 32, 4)])
    made.same("c.weight")
    path = tmp_path / "d.deltafmt"
    path.write_bytes(made.finish())
    groups, embeddings = needs(entries_of([path])[0])
    assert sorted(len(group) for group in groups) == [1, 1, 2]
    assert [part.columns for part in embeddings] == [64]
    assert {part.dtype for part in needs(entries_of([path])[0], torch.float16)[1]} == {torch.float16}


@pytest.mark.skipif(not HAS_PTXAS, reason="Triton comes without ptxas")
def test_a_launch_finds_what_was_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    """The command compiles for a GPU that is not there; Triton, asked as a launch asks it, then has it in its cache."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    path = write(tmp_path / "d.deltafmt", LowRankLayout(2, "BF16"), {"o_proj": 64})
    arguments = ("warmup", path, "--tokens", "1", "--target", "cuda:90", "--workers", "1")
    first = cli(*arguments, "--json").json()
    assert (first["ok"], first["target"], first["cached"]) == (True, "cuda:90", 0)
    assert first["compiled"] == 4  # two kernels of the layout, two of the checksums
    held = sorted(file.name for file in cache.rglob("*.cubin"))
    assert len(held) == 4
    shutil.rmtree(next(cache.rglob("spread_kernel.cubin")).parent)
    again = cli(*arguments)
    assert again.out.startswith("1 kernels compiled for cuda:90 in ")
    assert again.out.endswith(" s, 3 were compiled before\n")
    assert sorted(file.name for file in cache.rglob("*.cubin")) == held


def test_a_kernel_that_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    broken = Variant("deltafmt.kernels.sparse.kernel", "sparse_kernel", '{"PARTS": 1}')
    seen = []
    (found,) = compile_variants([broken], "cuda:90", 1, seen.append)
    assert seen == [found]
    assert found.error.startswith("TypeError: ")
    monkeypatch.setattr(warmup_module, "compile_variants", lambda *_: [found])
    with pytest.raises(UsageError, match=r"^sparse_kernel cannot be compiled for cuda:90: TypeError: "):
        warmup_module.compile_all([broken], "cuda:90", None, None)


def test_a_process_that_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    variant = Variant("deltafmt.kernels.sparse.kernel", "sparse_kernel", "{}")
    script = "import sys; sys.exit('no memory left')"
    original = subprocess.Popen
    monkeypatch.setattr(
        compiling.subprocess, "Popen", lambda _, **options: original([sys.executable, "-c", script], **options)
    )
    with pytest.raises(DeltafmtError, match="a process that compiles kernels failed: no memory left"):
        compile_variants([variant], "cuda:90", 2)


@pytest.mark.parametrize("target", ["cuda", "cuda:", "cuda:9.0", "hip:90", "90", "cuda:1", "cuda:x"])
def test_targets_that_are_none(target: str) -> None:
    with pytest.raises(UsageError, match="is not like cuda:90"):
        parse_target(target)


def test_a_machine_without_a_gpu(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = write(tmp_path / "d.deltafmt", NMLayout(1, 32, 4))
    assert deltafmt.warmup([path]).target == ""
    with pytest.raises(UsageError, match="0 tokens are not a number"):
        deltafmt.warmup([path], tokens=[16, 0])
    with pytest.raises(UsageError, match="0 processes compile nothing"):
        deltafmt.warmup([path], workers=0)
    with pytest.raises(StorageError):
        deltafmt.warmup([tmp_path / "missing.deltafmt"])
    found = cli("warmup", path)
    assert found.out == "no GPU here, so there is nothing to compile; --target cuda:90 compiles for another machine's\n"
    assert cli("warmup", path, "--tokens", "1,two").err.startswith(
        "deltafmt: --tokens '1,two' is not a list of numbers"
    )


def test_the_processes_do_not_interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    assert os.environ.get("TRITON_INTERPRET") == "1"
    variant = Variant("deltafmt.kernels.sparse.kernel", "sparse_kernel", "{}")
    environments = []

    def popen(_: object, **options: object) -> None:
        environments.append(options["env"])
        raise OSError("no processes")

    monkeypatch.setattr(compiling.subprocess, "Popen", popen)
    with pytest.raises(OSError, match="no processes"):
        compile_variants([variant], "cuda:90", 1)
    assert "TRITON_INTERPRET" not in environments[0]


def test_a_warmed_up_device_knows_its_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All steps in their order, with stand-ins for those that need a GPU."""
    steps: list[object] = []
    device = torch.device("cuda", 0)
    monkeypatch.setattr(warmup_module, "target_of", lambda _: "cuda:90")
    monkeypatch.setattr(warmup_module, "compile_variants", lambda found, *_: steps.append(("compile", found)) or [])
    monkeypatch.setattr(warmup_module, "load_variants", lambda found, at: steps.append(("load", found, at)))
    monkeypatch.setattr(warmup_module, "warmed", lambda at, found: steps.append(("known", found, at)))
    monkeypatch.setattr(warmup_module, "prepare", lambda at: steps.append(("prepare", at)))
    entries = entries_of([write(tmp_path / "d.deltafmt", NMLayout(1, 32, 4))])
    found = variants_of_entries(entries, (1,), torch.float16)
    warmup_module.warm_up(device, entries, torch.float16, (1,), None)
    assert steps == [("compile", found), ("load", found, device), ("known", found, device), ("prepare", device)]
    assert warmup_module.warm_up(torch.device("cpu"), entries, None, (1,), None).target == ""
    assert warmup_module.dtype_of(torch.nn.Linear(2, 2).half()) == torch.float16
