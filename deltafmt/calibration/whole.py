"""The calibration of a model that is not a chain of blocks: all of it is on the device, in one pass or several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deltafmt.calibration.blockwise import placed, run_model
from deltafmt.calibration.callbacks import CalibrationResult, OnModule, OnProgress
from deltafmt.calibration.gatherer import Gatherer, hand_out
from deltafmt.calibration.modules import Linear
from deltafmt.calibration.run_options import RunOptions
from deltafmt.calibration.tokens import Tokens

# The bytes of all moments that are added up in one pass.
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
    """Run the model over all batches, once for each group of modules whose moments fit the budget.

    The modules of one pass are handed out together. Their moments come from the model with the weights that earlier
    passes have replaced.
    """
    device = options.where()
    with placed(model, device):
        with Gatherer(linears.values()) as gatherer:
            run_model(model, batches[-1][:1], device)
        result.uncalled = gatherer.uncalled
        groups = _groups([linears[name] for name in gatherer.called])
        for done, group in enumerate(groups, 1):
            with Gatherer(group) as gatherer:
                for tokens in batches:
                    run_model(model, tokens, device)
            result.modules += gatherer.called
            hand_out(gatherer, on_module)
            progress(done, len(groups))
    return result


def _groups(linears: Sequence[Linear]) -> list[list[Linear]]:
    """Cut the modules into groups whose moments fit the budget; a group has at least one module."""
    groups: list[list[Linear]] = []
    room = 0
    for linear in linears:
        size = linear.columns**2 * 4
        if size > room:
            groups.append([])
            room = max(BUDGET, size)
        groups[-1].append(linear)
        room -= size
    return groups
