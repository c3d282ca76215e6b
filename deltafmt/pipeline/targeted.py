"""Packing for a target: measure what each method loses, choose, write the file, and plan anew if it is too large."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from deltafmt.methods.base import Method
from deltafmt.pipeline.alternatives import Alternatives
from deltafmt.pipeline.calibrate import SEQUENTIAL, Calibration
from deltafmt.pipeline.compress import OverflowingError
from deltafmt.pipeline.file_writer import write_file
from deltafmt.pipeline.first_pass import calibrated
from deltafmt.pipeline.job import Delivery, PackJob
from deltafmt.pipeline.pack_result import PackResult


def pack_for_target(
    job: PackJob, target: int, candidates: Sequence[Method], calibration: Calibration | None, delivery: Delivery
) -> PackResult:
    """Choose a method for every undecided tensor of a job, and write a file of at most so many bytes.

    A tensor whose finite elements would come back as infinity is stored whole, and the rest is chosen anew.

    Args:
        job: what is packed.
        target: bytes that the file may have.
        candidates: the methods to choose from.
        calibration: a text for the fine-tune to read. Losses are then measured with the moments that it gives.
        delivery: where the file goes.

    Raises:
        UsageError: no choice is small enough.
        DeltafmtError: as :func:`deltafmt.pipeline.first_pass.calibrated` and
            :func:`deltafmt.pipeline.file_writer.write_file` raise it.
    """
    sequential = calibration is not None and calibration.sequential
    # A sequential calibration depends on the choice, so losses are measured with one that is not sequential.
    first = replace(calibration, sequential=False) if calibration is not None else None
    with calibrated(job, first, delivery) as measured:
        metadata = measured.metadata() | (SEQUENTIAL if sequential else {})
        alternatives = Alternatives(measured, candidates, metadata)
        alternatives.measure(delivery.threads, delivery.progress, measured.moments)
        limit = target
        while True:
            choice = alternatives.choose(target, limit)
            try:
                if sequential and any(plan.uses_moments for plan in choice.plans):
                    with calibrated(replace(job, plans=choice.plans), calibration, delivery) as again:
                        result = write_file(again, delivery, target)
                else:
                    result = write_file(replace(measured, plans=choice.plans), delivery, target)
            except OverflowingError as error:
                if delivery.path is None:  # a stream does not take back what it has got
                    raise
                alternatives.keep_whole(error.tensor)
                continue
            result.choice = choice
            if result.target_size <= target:
                return result
            limit -= result.target_size - target  # the size was predicted wrongly: plan for less
