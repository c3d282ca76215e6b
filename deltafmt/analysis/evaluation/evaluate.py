"""``deltafmt.evaluate``: what deltas cost on a text (docs/how-to/evaluate.md)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from deltafmt.analysis.evaluation.figures import Evaluation
from deltafmt.calibration.devices import check_device
from deltafmt.calibration.text import read_documents
from deltafmt.calibration.tokens import check_tokenizer
from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.checkpoint.quantizers import quantizer_of
from deltafmt.checkpoint.renames import Renames
from deltafmt.delta import DeltaFile
from deltafmt.errors import StorageError, UsageError, WrongBaseError
from deltafmt.extras import need
from deltafmt.format.limits import DEFAULT_LIMITS, Limits
from deltafmt.pipeline.bases import BaseTensors, open_base
from deltafmt.pipeline.verify import check_base
from deltafmt.pipeline.workers import thread_count

TOKENS = 16384
LENGTH = 512
CONTINUATIONS = 8
NEW_TOKENS = 32


def evaluate(
    base: str | os.PathLike[str],
    finetuned: str | os.PathLike[str],
    deltas: Sequence[str | os.PathLike[str]],
    text: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    tokens: int = TOKENS,
    length: int = LENGTH,
    continuations: int = CONTINUATIONS,
    new_tokens: int = NEW_TOKENS,
    device: str | None = None,
    rename: Sequence[str] = (),
    strip_prefix: Sequence[str] = (),
    threads: int | None = None,
    limits: Limits = DEFAULT_LIMITS,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Return what a fine-tune, its base and the models that deltas give predict of a text.

    Every delta is unpacked into a temporary folder, one at a time. Models run in float32 on a CPU and in the weights'
    dtype on a GPU, with one block of a model on the device at a time. The host holds one model, and of the fine-tune
    the embedding, the head and the hidden states of all tokens. A model that is not a chain of blocks is on the device
    as a whole.

    Args:
        base, finetuned: checkpoint folders of causal language models.
        deltas: delta files of this base.
        text: a plain text, or a ``.jsonl`` file whose lines have ``text``, ``prompt`` and ``completion``, or
            ``question`` and ``answer``. Of a prompt with its answer, the tokens of the answer count.
        tokenizer: a folder or ``tokenizer.json``, if the fine-tune's folder has no tokenizer.
        tokens: about how many tokens of the text are read, from its beginning.
        length: the number of tokens in the longest sequence.
        continuations: the number of prompts that the fine-tune continues; 0 for none.
        new_tokens: the number of tokens in a continuation.
        device: ``cpu``, ``cuda`` or ``cuda:N``; a GPU if there is one.
        rename, strip_prefix: as :func:`deltafmt.unpack` takes them.
        threads: worker threads for unpacking; one for each processor if not given.
        limits: how much memory, work and output a delta may ask for.
        progress: called with the number of steps done and the number of all steps.

    Raises:
        MissingExtraError: torch or transformers is missing.
        UsageError: an option is out of range, a model cannot be loaded or predicts no next tokens, the text is too
            short, or the tokenizers of base, fine-tune and deltas differ.
        NonFiniteError: a model's activations or predictions are not finite.
        WrongBaseError: a delta was made for another base.
        InvalidFileError, StorageError: a file cannot be read.
    """
    for value, least, what in (
        (tokens, 2, "tokens to read"),
        (length, 2, "tokens of a sequence"),
        (continuations, 0, "continuations"),
        (new_tokens, 1, "new tokens"),
    ):
        if value < least:
            raise UsageError(f"{value} {what}: the least is {least}")
    check_device(device, "evaluation")
    renames, workers = Renames.parse(rename, strip_prefix), thread_count(threads)
    documents = read_documents(Path(text))
    for folder in (base, finetuned):
        if not Path(folder).is_dir():
            raise StorageError(f"no such folder: {folder}; evaluate needs a checkpoint's folder")
    check_tokenizer(Path(tokenizer or finetuned))
    sizes = _bytes_of_floats(base), _bytes_of_floats(finetuned)
    for path in deltas:
        _check_delta(path, base, renames, workers, limits)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    need("evaluate", "torch", "transformers", extra="transformers")
    from deltafmt.analysis.evaluation.run import Plan, Run  # noqa: PLC0415  # torch is optional and slow to import

    plan = Plan(
        Path(base),
        Path(finetuned),
        [Path(path) for path in deltas],
        sizes,
        Path(tokenizer or finetuned),
        tokens,
        length,
        continuations,
        new_tokens,
        device,
        {"rename": rename, "strip_prefix": strip_prefix, "threads": threads, "limits": limits},
    )
    return Run(plan, str(text), documents, progress or (lambda _done, _total: None)).run()


def _bytes_of_floats(folder: str | os.PathLike[str]) -> int:
    """Return the bytes of a checkpoint's weight files.

    Raises:
        UsageError: its weights are quantized.
    """
    with Checkpoint(folder, lenient=True) as checkpoint:
        quantizer = quantizer_of(checkpoint)
        if quantizer is not None:
            raise UsageError(
                f"{folder} is {quantizer.title}, and evaluate runs models in floating point; save it dequantized"
            )
        return checkpoint.file_bytes


def _check_delta(
    path: str | os.PathLike[str], base: str | os.PathLike[str], renames: Renames, threads: int, limits: Limits
) -> None:
    """Check that a delta was made for the base, before a model is loaded.

    Raises:
        WrongBaseError: names the file and the first tensor that differs.
    """
    with DeltaFile(path, limits=limits) as opened, open_base(base, opened.container) as checkpoint:
        entries = list(opened.container.entries())
        try:
            check_base(BaseTensors(checkpoint, entries, opened.container, renames), entries, threads)
        except WrongBaseError as error:
            raise error.located(str(path)) from error
