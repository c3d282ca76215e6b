"""The first pass of a calibrated pack: the fine-tune reads the text before any tensor is packed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from blake3 import blake3

from deltafmt._version import __version__
from deltafmt.container import canonical
from deltafmt.pipeline.calibrate import Calibration, calibrated_names
from deltafmt.pipeline.file_writer import write_tensors
from deltafmt.pipeline.job import Delivery, PackJob
from deltafmt.pipeline.moments import MomentFolder
from deltafmt.pipeline.outputs import kept_if_interrupted
from deltafmt.pipeline.plan import Plan
from deltafmt.pipeline.sequential import Stages


@contextlib.contextmanager
def calibrated(job: PackJob, calibration: Calibration | None, delivery: Delivery) -> Iterator[PackJob]:
    """Gather moments and give the job with them; without a calibration, give the job as it is.

    The folder with the moments outlives an interrupt. Success and every other error remove it.

    Args:
        job: what will be packed.
        calibration: the text. With a sequential calibration, the folder is named ``.NAME.sequential``.
        delivery: where the file goes; its ``progress`` is called without a name, for all steps of the pass together
            with as many bytes as the fine-tune has.

    Raises:
        UsageError, NonFiniteError, StorageError, InvalidFileError: as
            :func:`deltafmt.pipeline.calibrate.calibrated_names` and
            :meth:`deltafmt.pipeline.moments.MomentFolder.gather` raise them.
    """
    finetuned, progress = job.finetuned, delivery.progress
    wanted = calibrated_names(job.plans, calibration)
    if calibration is None:
        yield job
        return
    described = calibration.describe()
    digest = _digest(job, calibration, described, wanted)
    suffix = "sequential" if calibration.sequential else "calibration"
    folder = MomentFolder(delivery.path, described, digest, suffix)
    ready = replace(job, moments=folder)
    on_stage = _stages(ready, folder.path, delivery.threads) if calibration.sequential else None
    told = 0

    def step(done: int, total: int) -> None:
        nonlocal told
        if progress:
            progress("", finetuned.nbytes * done // total - told)
        told = finetuned.nbytes * done // total

    with kept_if_interrupted(folder.keep, folder.remove):
        folder.gather(finetuned.path, wanted, calibration, step, on_stage)
        yield ready
    folder.remove()


def _digest(job: PackJob, calibration: Calibration, described: dict[str, str], wanted: dict[str, int]) -> bytes:
    """Return a digest of everything that the moments depend on: the whole job if the calibration is sequential."""
    files = [[os.fsencode(path), size, time] for path, size, time in job.finetuned.identity()]
    parts: dict[str, Any] = {"calibration": described, "files": files, "version": __version__, "wanted": wanted}
    if calibration.sequential:
        parts["packing"] = job.digest()
    return blake3(canonical.encode(parts)).digest()


def _stages(job: PackJob, folder: Path, threads: int) -> Stages:
    """Return a callback that packs the tensors of a stage with the moments gathered by then."""

    def write(plans: Sequence[Plan], path: Path) -> None:
        write_tensors(replace(job, plans=plans), path, threads)

    return Stages({plan.tensor.name: plan for plan in job.plans}, write, folder / "stage.deltafmt")
