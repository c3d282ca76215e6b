"""Base and fine-tune to a delta file: ``deltafmt.pack``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from deltafmt import core
from deltafmt.container.partial import check_output_file
from deltafmt.delta import DeltaFile
from deltafmt.errors import Remedy, UsageError
from deltafmt.methods.base import Method
from deltafmt.pipeline.calibrate import Calibration, calibrated_names, check_calibration
from deltafmt.pipeline.file_writer import write_file
from deltafmt.pipeline.gives import check_gives
from deltafmt.pipeline.job import Delivery, PackJob
from deltafmt.pipeline.outputs import refuse_input_file
from deltafmt.pipeline.pack_options import PackOptions
from deltafmt.pipeline.pack_result import PackResult
from deltafmt.pipeline.plan import Rule
from deltafmt.pipeline.target import target_bytes
from deltafmt.pipeline.workers import Progress, thread_count


def pack(
    base: str | os.PathLike[str],
    finetuned: str | os.PathLike[str],
    out: str | os.PathLike[str] | BinaryIO,
    *,
    method: Method | None = None,
    target_ratio: float | None = None,
    target_size: int | None = None,
    candidates: Sequence[Method] = (),
    rules: Sequence[Rule] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    missing: str | None = None,
    variant: str | None = None,
    attach: Sequence[str] = (),
    no_attach: Sequence[str] = (),
    quantized: str | None = None,
    rename: Sequence[str] = (),
    strip_prefix: Sequence[str] = (),
    allow_architecture: bool = False,
    base_name: str | None = None,
    parent: str | os.PathLike[str] | None = None,
    calibration: Calibration | None = None,
    profile: str = "hot",
    seed: int = 0,
    exact: bool = False,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> PackResult:
    """Pack the difference of two checkpoints into a delta file.

    The work is streamed and takes bounded memory. A pack that was interrupted goes on where it stopped when it is
    called again with the same arguments.

    Args:
        base, finetuned: a checkpoint folder or a ``.safetensors`` file.
        out: the file to make, or a binary file object to write to. Writing to a file object cannot be resumed.
        method: compresses the matrices; DeltaDQ() if not given.
        target_ratio: choose a method for each tensor, so that the file is at least so many times smaller than the
            fine-tune.
        target_size: choose a method for each tensor, so that the file has at most so many bytes.
        candidates: the methods to choose from; if empty, those of
            :func:`deltafmt.pipeline.budget.candidates_for`.
        rules: (pattern, method or None) pairs; the last one that matches a name decides, and None stores the tensor
            whole.
        include: if given, only names that match one of these patterns are compressed.
        exclude: names that match one of these patterns are stored whole.
        missing: what is done with tensors that the fine-tune lacks and its model needs: ``same`` takes them from the
            base, ``removed`` leaves them out. If not given, such a fine-tune is refused, unless the method is Exact.
        variant: read the weights of this variant, such as ``fp16`` in ``model.fp16.safetensors``.
        attach: patterns of paths of files beside the weights that travel although they would not by themselves.
        no_attach: patterns of paths of files that do not travel; they win over ``attach``.
        quantized: how weights are read that are 8-bit floats with scales: ``values``, as if not given, reads the
            BF16 values that they mean; ``exact`` packs all bytes as they are stored, also those of other quantizers,
            as if not given where the method is Exact.
        rename: rules FROM=TO that say what a name of the fine-tune is in the base. FROM is how the name begins, or a
            pattern with ``*``. Names that differ in a known way are matched without rules.
        strip_prefix: beginnings of names that do not count, on either side.
        allow_architecture: True to pack two types of model whose tensors are the same.
        base_name: the name of the base that the file records, for messages. If not given, the name that the base's
            configuration has for the hub, or else the name of its folder. An empty text records none.
        parent: a delta file whose result is ``base``. The file that is made is the next link of a chain
            (:func:`deltafmt.apply`), and names it by its content id.
        calibration: a text for the fine-tune to read. The methods gptq and sparsegpt need one; others can use one.
        profile: ``hot`` or ``cold``.
        seed: the file's seed, 64 bits. Every tensor's own seed is derived from it and the tensor's name.
        exact: True for a progressive file: what is served comes first, as it is without ``exact``, and is a delta
            file by itself. Behind it lie exact parts, with which ``unpack`` restores the fine-tune's files byte for
            byte. A target is one for what is served.
        force: True to replace ``out`` if it exists.
        threads: worker threads; one for each processor if not given. The bytes do not depend on their number.
        progress: called with a tensor's name and bytes as each is done. With a target, it is also called as each is
            measured; with a calibration, also for the steps of the fine-tune's reading.

    Returns:
        What was done with the tensors, and the size and content id of the file.

    Raises:
        UsageError: an option is wrong, a pattern matches nothing, the output exists or is an input, or no plan meets
            the target.
        NonFiniteError: a delta has NaN or infinity and its tensor is to be compressed.
        InvalidFileError: an input is not a valid checkpoint, the fine-tune is not whole, or a link leaves its folder.
        WrongBaseError: base and fine-tune are of different architecture, or their names do not say what belongs
            together; or the base is not what the parent gives.
        StorageError: reading or writing failed.
    """
    core.warn_if_missing()
    targeted = target_ratio is not None or target_size is not None
    if targeted and method is not None:
        raise UsageError(f"a target chooses the methods itself, and {method.spelling()!r} is given")
    if candidates and not targeted:
        raise UsageError("candidates are given, and no target to choose them for")
    check_calibration(candidates, calibration)
    options = PackOptions.read(
        method=method,
        rules=rules,
        include=include,
        exclude=exclude,
        missing=missing,
        variant=variant,
        attach=attach,
        no_attach=no_attach,
        quantized=quantized,
        rename=rename,
        strip_prefix=strip_prefix,
        allow_architecture=allow_architecture,
        base_name=base_name,
        profile=profile,
        seed=seed,
        exact=exact,
    )
    place = Path(out) if isinstance(out, str | os.PathLike) else out
    if exact and not isinstance(place, Path):
        raise UsageError("exact parts are made from what is in the file already, which a stream does not give back")
    delivery = Delivery(place, force, thread_count(threads), progress)
    if calibration is not None and variant is not None:
        raise UsageError(f"variant {variant!r} and a calibration: a text is read with weights that have no variant")
    with options.open(base, finetuned) as (before, after):
        if calibration is not None and after.dequantized:
            raise UsageError(
                f"{after.path} is FP8, and a calibration runs the fine-tune in BF16; save it dequantized, and pack that"
            )
        target = target_bytes(target_ratio, target_size, after.file_bytes)
        job = options.job(before, after, target)
        check_output(job, delivery)
        if parent is not None:
            job = replace(job, parent=_parent_id(parent, base, delivery))
        if target is not None:
            from deltafmt.pipeline.budget import candidates_for
            from deltafmt.pipeline.targeted import pack_for_target

            return pack_for_target(job, target, candidates or candidates_for(job.plans), calibration, delivery)
        if calibration is None:
            calibrated_names(job.plans, None)
            return write_file(job, delivery)
        from deltafmt.pipeline.first_pass import calibrated

        with calibrated(job, calibration, delivery) as ready:
            return write_file(ready, delivery)


def _parent_id(parent: str | os.PathLike[str], base: str | os.PathLike[str], delivery: Delivery) -> bytes:
    """Return the content id of the delta file that gives the base.

    Raises:
        UsageError: the output is that file.
        WrongBaseError: it gives another base.
    """
    path = delivery.path
    if path is not None and path.exists() and os.path.samefile(path, parent):
        raise UsageError(f"the output {path} is itself an input")
    with DeltaFile(parent) as opened:
        return check_gives(opened, base, delivery.threads)


def check_output(job: PackJob, delivery: Delivery) -> None:
    """Refuse an output that cannot be made, before any work is done.

    Raises:
        UsageError: it exists, is an input, or is a device or pipe.
        StorageError: its folder is missing.
    """
    path = delivery.path
    if path is None:
        return
    refuse_input_file(path, (job.base, job.finetuned))
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UsageError(f"{path} is not a regular file", Remedy("out", None))
    check_output_file(path, force=delivery.force)
