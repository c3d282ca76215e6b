"""deltafmt: one container for every kind of compressed fine-tune delta.

::

    with deltafmt.open("math.deltafmt") as d:      # memory-mapped; numpy only
        d.keys(); d["model.layers.0.mlp.up_proj.weight"].shape
        d.buffers(name)                            # zero-copy read-only views of the packed arrays
        d.delta(name)                              # dense float32 array

    deltafmt.pack(base, finetuned, out, method=deltafmt.methods.DeltaDQ(n=4, m=16, bits=4))
    deltafmt.unpack(base, delta, out_folder)
    delta = deltafmt.torch.load("math.deltafmt", device="cuda")
    model = deltafmt.transformers.attach(model, {"math": "math.deltafmt", "code": "code.deltafmt"})

    publisher = deltafmt.sync.Publisher()          # sends what training changes, subscribers follow

``deltafmt.__all__`` is the whole public surface. The names of other modules may change in any release.

Importing this package imports nothing else; every name is loaded when it is first used. ``deltafmt.sync``,
``deltafmt.torch`` and ``deltafmt.transformers`` need an optional package: without it, they raise an ``ImportError``
that names the extra.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from deltafmt._version import __version__

if TYPE_CHECKING:
    from deltafmt import errors, methods, sync, torch, transformers
    from deltafmt.analysis.analyze import analyze
    from deltafmt.analysis.dedup import dedup
    from deltafmt.analysis.evaluation.evaluate import evaluate
    from deltafmt.delta import DeltaFile
    from deltafmt.delta import DeltaFile as open  # noqa: A004, N813 - as safetensors and gzip name theirs
    from deltafmt.format.limits import Limits
    from deltafmt.pipeline.apply import apply
    from deltafmt.pipeline.budget import plan_for_target
    from deltafmt.pipeline.calibrate import Calibration
    from deltafmt.pipeline.convert import convert
    from deltafmt.pipeline.diff import diff
    from deltafmt.pipeline.export_lora import export_lora
    from deltafmt.pipeline.import_lora import import_lora
    from deltafmt.pipeline.pack import pack
    from deltafmt.pipeline.pack_many import pack_many
    from deltafmt.pipeline.repack import repack
    from deltafmt.pipeline.squash import squash
    from deltafmt.pipeline.unpack import unpack
    from deltafmt.pipeline.verify import verify
    from deltafmt.torch import warmup

__all__ = [
    "Calibration",
    "DeltaFile",
    "Limits",
    "__version__",
    "analyze",
    "apply",
    "convert",
    "dedup",
    "diff",
    "errors",
    "evaluate",
    "export_lora",
    "import_lora",
    "methods",
    "open",
    "pack",
    "pack_many",
    "plan_for_target",
    "repack",
    "squash",
    "sync",
    "torch",
    "transformers",
    "unpack",
    "verify",
    "warmup",
]

_HOMES = {
    "Calibration": ("deltafmt.pipeline.calibrate", "Calibration"),
    "DeltaFile": ("deltafmt.delta", "DeltaFile"),
    "Limits": ("deltafmt.format.limits", "Limits"),
    "analyze": ("deltafmt.analysis.analyze", "analyze"),
    "apply": ("deltafmt.pipeline.apply", "apply"),
    "convert": ("deltafmt.pipeline.convert", "convert"),
    "dedup": ("deltafmt.analysis.dedup", "dedup"),
    "diff": ("deltafmt.pipeline.diff", "diff"),
    "errors": ("deltafmt.errors", None),
    "evaluate": ("deltafmt.analysis.evaluation.evaluate", "evaluate"),
    "export_lora": ("deltafmt.pipeline.export_lora", "export_lora"),
    "import_lora": ("deltafmt.pipeline.import_lora", "import_lora"),
    "methods": ("deltafmt.methods", None),
    "open": ("deltafmt.delta", "DeltaFile"),
    "pack": ("deltafmt.pipeline.pack", "pack"),
    "pack_many": ("deltafmt.pipeline.pack_many", "pack_many"),
    "plan_for_target": ("deltafmt.pipeline.budget", "plan_for_target"),
    "repack": ("deltafmt.pipeline.repack", "repack"),
    "squash": ("deltafmt.pipeline.squash", "squash"),
    "sync": ("deltafmt.sync", None),
    "torch": ("deltafmt.torch", None),
    "transformers": ("deltafmt.transformers", None),
    "unpack": ("deltafmt.pipeline.unpack", "unpack"),
    "verify": ("deltafmt.pipeline.verify", "verify"),
    "warmup": ("deltafmt.torch", "warmup"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'deltafmt' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    value = importlib.import_module(module)
    if attribute is not None:
        value = getattr(value, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
