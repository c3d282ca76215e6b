"""A model that is no chain of blocks, calibrated as a whole: all of it on the device, in one pass or several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deltafmt.calibration.blockwise import placed, run_model
from deltafmt.calibration.callbacks import CalibrationResult, OnModule, OnProgress
from deltafmt.calibration.gatherer import Gatherer, hand_out
from deltafmt.calibration.modules import Linear
from deltafmt.calibration.run_options import RunOptions
from deltafmt.calibration.tokens import Tokens

# Bytes of moments that are added up at a time.
BUDGET = 2**31


def run_whole(
    model: Any,
    linears: dict[str, Linear],
    batches: Sequence[Tokens],
    on_module: OnModule,
    options: RunOptions,
    result: CalibrationResult,
    progress: OnProgress,
) -> CalibrationResult:
    """Run the model over all batches once for as many modules as the budget allows, in the order of their calls.

    Modules of one pass are handed out together: all see the model as the passes before left it.
    """
    device = options.where()
    with placed(model, device):
        with Gatherer(linears.values()) as gatherer:
            run_model(model, batches[-1][:1], device)
        result.uncalled = gatherer.uncalled
        groups = _groups([linears[name] for name in gatherer.called], 8 if options.double else 4)
        for done, group in enumerate(groups, 1):
            with Gatherer(group, double=options.double) as gatherer:
                for tokens in batches:
                    run_model(model, tokens, device)
            result.modules += gatherer.called
            hand_out(gatherer, on_module)
            progress(done, len(groups))
    return result


def _groups(linears: Sequence[Linear], itemsize: int) -> list[list[Linear]]:
    """Cut modules into runs whose moments fit the budget, of one module at least."""
    groups: list[list[Linear]] = []
    room = 0
    for linear in linears:
        size = linear.columns**2 * itemsize
        if size > room:
            groups.append([])
            room = max(BUDGET, size)
        groups[-1].append(linear)
        room -= size
    return groups
