"""Checkpoints and adapters of very many small tensors: whole commands, whose time goes to names.

    python benchmarks/many.py [--tensors 60000] [--modules 1600]

The checkpoint is one of experts: matrices of 4 rows and 16 columns, and two numbers beside each. The adapter names the
rank and the scaling of each of its modules, as PEFT writes patterns.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from common import Child, Figure, deltafmt_child, report
from synthetic import write_pair

from deltafmt.checkpoint.folder_writer import TensorSpec


def experts(count: int) -> list[TensorSpec]:
    """Return the tensors of experts, three for each projection."""
    specs = []
    for number in range(count // 3):
        name = f"model.layers.{number // 2000}.mlp.experts.{number % 2000}.gate_proj"
        specs.append(TensorSpec(f"{name}.weight", "BF16", (4, 16)))
        specs += [TensorSpec(f"{name}.{end}", "BF16", (1,)) for end in ("low", "high")]
    return specs


def write_adapter(folder: Path, modules: int) -> tuple[Path, Path]:
    """Write a base of linear modules and an adapter of all of them; return their folders."""
    names = [f"model.layers.{number}.self_attn.q_proj" for number in range(modules)]
    base, _ = pair(folder / "plain", [TensorSpec(f"{name}.weight", "BF16", (64, 64)) for name in names])
    factors = []
    for name in names:
        factors.append(TensorSpec(f"base_model.model.{name}.lora_A.weight", "BF16", (8, 64)))
        factors.append(TensorSpec(f"base_model.model.{name}.lora_B.weight", "BF16", (64, 8)))
    adapter, _ = pair(folder / "adapter", factors)
    (weights,) = adapter.glob("*.safetensors")
    weights.rename(adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    patterns = {"rank_pattern": dict.fromkeys(names, 8), "alpha_pattern": dict.fromkeys(names, 16)}
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **patterns}), "utf-8")
    return base, adapter


def pair(folder: Path, specs: list[TensorSpec]) -> tuple[Path, Path]:
    """Write a pair below a new folder."""
    folder.mkdir()
    return write_pair(folder, specs)


def figure(label: str, child: Child, target: float | None = None) -> Figure:
    """Return a command's time, and its memory as a note."""
    return Figure(label, child.seconds, "s", target, True, f"{child.peak_bytes / 1e6:.0f} MB")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=60_000, help="tensors of the checkpoint (60000)")
    parser.add_argument("--modules", type=int, default=1600, help="modules of the adapter (1600)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        base, tuned = pair(folder / "experts", experts(options.tensors))
        delta, restored = folder / "experts.deltafmt", folder / "restored"
        figures = [
            figure("pack", deltafmt_child("pack", base, tuned, "-o", delta, "--nm", "2:2"), 10),
            figure("inspect", deltafmt_child("inspect", delta)),
            figure("verify --base", deltafmt_child("verify", delta, "--base", base)),
            figure("unpack", deltafmt_child("unpack", base, delta, "-o", restored)),
            figure("diff", deltafmt_child("diff", base, tuned)),
        ]
        base, adapter = write_adapter(folder, options.modules)
        imported = deltafmt_child("import-lora", base, adapter, "-o", folder / "adapter.deltafmt")
        figures.append(figure("import-lora", imported, 5))
    report("many", figures, tensors=options.tensors, modules=options.modules)


if __name__ == "__main__":
    main()
