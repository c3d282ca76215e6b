"""The analysis of a pair of checkpoints: it reads the tensors one by one, in blocks of rows, and collects figures."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from deltafmt.analysis.approximation import approximation_of, packed
from deltafmt.analysis.intermediate_results import Products
from deltafmt.analysis.layer_inputs import Inputs, calibrated_inputs, normal_inputs
from deltafmt.analysis.norms import Norms
from deltafmt.analysis.pairs import TensorPair, find_pairs
from deltafmt.analysis.quantized import histogram_of
from deltafmt.analysis.report import Candidate, Report, TensorFigures
from deltafmt.analysis.spectrum import spectrum_of
from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.checkpoint.fp8 import read_as_values
from deltafmt.checkpoint.renames import Renames
from deltafmt.delta import DeltaFile
from deltafmt.errors import NonFiniteError, UsageError, WrongBaseError
from deltafmt.methods.base import Method
from deltafmt.methods.deltadq import DeltaDQ
from deltafmt.pipeline.bases import BaseTensors
from deltafmt.pipeline.pairing import PairOptions, pair_up
from deltafmt.pipeline.verify import check_base
from deltafmt.pipeline.workers import thread_count


def analyze(
    base: str | os.PathLike[str],
    finetuned: str | os.PathLike[str],
    *,
    deltas: Sequence[str | os.PathLike[str]] = (),
    methods: Sequence[Method] = (),
    quantization: tuple[int, int, int] = (4, 16, 4),
    calibration: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rename: Sequence[str] = (),
    strip_prefix: Sequence[str] = (),
    allow_architecture: bool = False,
    variant: str | None = None,
    seed: int = 0,
    progress: Callable[[str, int], None] | None = None,
) -> Report:
    """Return figures of a fine-tune's delta, and of the losses when it is compressed.

    Args:
        base, finetuned: checkpoint folders or ``.safetensors`` files.
        deltas: delta files of this pair, whose losses are measured.
        methods: methods whose losses are measured; each makes a temporary delta file. Without files and methods, the
            losses of DeltaDQ with ``quantization`` are measured.
        quantization: N, M and k of the histograms of values before and after quantization; k is at least 2.
        calibration: a text file that gives the inputs of the layers; without it the inputs are standard normal.
        tokenizer: a ``tokenizer.json``, if the fine-tune's folder has no tokenizer.
        include: patterns; if given, only tensors whose names match one of them are analyzed.
        exclude: patterns; tensors whose names match one of them are left out.
        rename, strip_prefix, allow_architecture, variant: as :func:`deltafmt.pack` takes them. 8-bit floats with scales
            are read as the values that they mean.
        seed: the seed for random inputs, positions and projections.
        progress: a function that is called with a tensor's name and bytes: once when the tensor's figures are done, and
            once more for every delta file.

    Raises:
        UsageError: an option is out of range, a pattern matches nothing, or the calibration cannot be run.
        WrongBaseError: base and fine-tune, or a delta file and the pair, do not belong together.
        InvalidFileError, StorageError: a file cannot be read.
    """
    n, m, bits = quantization
    options = PairOptions.parse(rename, strip_prefix, allow_architecture)
    if bits < 2:
        raise UsageError(f"bits k = {bits}: a histogram after min-max quantization needs at least 2 bits")
    own = DeltaDQ(n, m, bits, index="seeded" if m & (m - 1) == 0 and m <= 128 else "fixed")
    if calibration is not None and variant is not None:
        raise UsageError(f"variant {variant!r} and a calibration: a text is read with weights that have no variant")
    with Checkpoint(base, variant=variant, lenient=True) as before, Checkpoint(finetuned, variant=variant) as after:
        for side in (before, after):
            read_as_values(side, exact=False)
        if calibration is not None and after.dequantized:
            raise UsageError(f"{finetuned} is FP8, and a calibration runs the fine-tune in BF16; save it dequantized")
        pairing = pair_up(before, after, options)
        pairs, skipped = find_pairs(pairing.tensors, after, include, exclude)
        if not pairs:
            raise UsageError(f"no tensor of {finetuned} is left to analyze")
        inputs = normal_inputs(seed)
        if calibration is not None:
            linear = [pair.name for pair in pairs if pair.is_linear]
            inputs = calibrated_inputs(finetuned, calibration, linear, tokenizer)
        report = Report(str(base), str(finetuned), inputs.source, after.file_bytes, quantization, skipped=skipped)
        report.names = pairing.changes()
        for pair in pairs:
            try:
                report.tensors.append(figures_of(pair, inputs, quantization, seed))
            except NonFiniteError:
                skipped[pair.name] = "the delta holds NaN or infinity"
            if progress:
                progress(pair.name, pair.finetuned.nbytes)
        for path in deltas:
            _check_base(before, path, report, options.renames)
            _measure(report, str(path), path, inputs, progress)
        names = {"rename": rename, "strip_prefix": strip_prefix, "allow_architecture": allow_architecture}
        for method in methods or (() if deltas else (own,)):
            with packed(base, finetuned, method, [*skipped], **names, variant=variant) as path:
                _measure(report, method.spelling(), path, inputs, progress)
    return report


def _check_base(base: Checkpoint, path: str | os.PathLike[str], report: Report, renames: Renames) -> None:
    """Check that a delta file was made for the base, as far as its tensors are analyzed.

    Raises:
        WrongBaseError: names the file and the first tensor that differs.
    """
    analyzed = {one.pair.name for one in report.tensors}
    with DeltaFile(path) as opened:
        entries = [entry for entry in opened.container.entries() if entry.name in analyzed]
        try:
            check_base(BaseTensors(base, entries, opened.container, renames), entries, thread_count(None))
        except WrongBaseError as error:
            raise error.located(str(path)) from error


def _measure(
    report: Report,
    label: str,
    path: str | os.PathLike[str],
    inputs: Inputs,
    progress: Callable[[str, int], None] | None,
) -> None:
    """Add a delta file to a report, and its loss to the figures of every tensor."""
    with DeltaFile(path) as opened:
        report.candidates.append(Candidate(label, opened.container.size))
        for one in report.tensors:
            vectors = inputs.of(one.pair.name, one.pair.columns) if one.pair.is_linear else None
            one.approximations.append(approximation_of(one.pair, opened, vectors))
            if progress:
                progress(one.pair.name, one.pair.finetuned.nbytes)


def figures_of(pair: TensorPair, inputs: Inputs, quantization: tuple[int, int, int], seed: int = 0) -> TensorFigures:
    """Return the figures of one tensor, still without the losses of delta files.

    Raises:
        NonFiniteError: the delta holds NaN or infinity.
    """
    figures = TensorFigures(pair, Norms())
    vectors = inputs.of(pair.name, pair.columns) if pair.is_linear else None
    if vectors is not None:
        figures.products = Products(vectors, pair.rows)
    for block in pair.blocks():
        figures.norms.add(block)
        if figures.products:
            figures.products.add(block)
    if pair.is_matrix:
        figures.spectrum = spectrum_of(pair, figures.norms.delta, seed)
        figures.histogram = histogram_of(pair, figures.norms.rms, *quantization, seed)
    return figures
