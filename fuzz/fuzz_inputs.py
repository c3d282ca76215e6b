"""Fuzz what is read beside delta files, see ``fuzz/inputs.py``: safetensors files, weight maps, adapters, rules.

python fuzz/fuzz_inputs.py safetensors NEW_INPUTS -max_total_time=60
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["deltafmt"]):
    import inputs

import mutate
import numpy as np
from budget import bounded_time, limit_memory


def main() -> None:
    """Run libFuzzer with the target that the first argument names."""
    name, *rest = sys.argv[1:] or [""]
    if name not in inputs.TARGETS:
        raise SystemExit(f"the targets are {', '.join(inputs.TARGETS)}")
    target = inputs.TARGETS[name]

    def test_one_input(data: bytes) -> None:
        with bounded_time():
            target.read(data)

    def mutated(data: bytes, size: int, seed: int) -> bytes:
        changed = target.mutate(data, random.Random(seed), atheris.Mutate)
        return changed if len(changed) <= size else atheris.Mutate(data, size)

    with tempfile.TemporaryDirectory() as seeds:
        for number, data in enumerate(target.seeds()):
            (Path(seeds) / f"seed-{number}").write_bytes(data)
            test_one_input(data)
        if not any(argument.startswith("-max_len") for argument in rest):
            rest.append(f"-max_len={mutate.MAX_LENGTH}")
        # libFuzzer ends its process at once, so that another has to clean up.
        child = os.fork()
        if child == 0:
            np.seterr(all="ignore")  # weights may be any bits
            limit_memory()
            atheris.Setup([sys.argv[0], *rest, seeds], test_one_input, custom_mutator=mutated)
            atheris.Fuzz()
        _, status = os.waitpid(child, 0)
        inputs.folder.remove()
    raise SystemExit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
