"""Calibration: a model and texts in, second moments of every linear module's inputs out, in the order of the model.

A block is brought to the device, run over all sequences while its linear modules' inputs are added up, and run again if
a weight was replaced, so that the blocks after it see what the replacement does. Hidden states wait on the host, or
in a file. Nothing is random; the same model, texts and options give the same numbers on the same machine.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from deltafmt.calibration.blockwise import Chain, UnchainedError, without_cache
from deltafmt.calibration.callbacks import CalibrationResult, OnModule, OnProgress, OnStage
from deltafmt.calibration.chain_run import CallOrder, ChainRun
from deltafmt.calibration.load_model import load_model, model_key
from deltafmt.calibration.modules import Linear, find_blocks, linear_modules
from deltafmt.calibration.run_options import RunOptions
from deltafmt.calibration.text import read_documents
from deltafmt.calibration.tokens import LENGTH, TOKENS, Tokens, batches, cut, load_encoder
from deltafmt.calibration.whole import run_whole
from deltafmt.errors import UsageError


def calibrate_folder(
    folder: str | os.PathLike[str],
    text: str | os.PathLike[str],
    on_module: OnModule,
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    tokens: int = TOKENS,
    length: int = LENGTH,
    dtype: torch.dtype | None = None,
    options: RunOptions | None = None,
    on_progress: OnProgress | None = None,
    on_stage: OnStage | None = None,
) -> CalibrationResult:
    """Load a fine-tune with transformers and calibrate it with a text.

    Args:
        folder: the fine-tune.
        text: the calibration text, as :func:`deltafmt.calibration.text.read_documents` reads it.
        on_module: called for every linear module.
        tokenizer: a folder or ``tokenizer.json``, where the fine-tune's folder has none.
        tokens: how many to use; the first ones of the text.
        length: of the longest sequence.
        dtype: in which the model runs: that of its weights if not given, on the CPU float32.
        options: of :func:`calibrate`.
        on_progress: called after each block.
        on_stage: as :func:`calibrate` has it.

    Raises:
        UsageError: transformers is missing or cannot load the model, there is no tokenizer, the text is empty or too
            short, or the activations are not finite.
        StorageError: a file cannot be read or written.
        InvalidFileError: the text is not what its name says.
    """
    options = options or RunOptions()
    documents = read_documents(Path(text))
    model = load_model(Path(folder), dtype or (torch.float32 if options.where().type == "cpu" else None))
    encoder = load_encoder(Path(tokenizer or folder), model.config)
    limit = getattr(model.config, "max_position_embeddings", None)
    sequences = cut(documents, encoder, min(length, limit) if isinstance(limit, int) else length, tokens)
    options = replace(options, key=f"{model_key(Path(folder))} {options.key}")
    return calibrate(model, sequences, on_module, options=options, on_progress=on_progress, on_stage=on_stage)


def calibrate(
    model: Any,
    sequences: Sequence[Tokens],
    on_module: OnModule,
    *,
    options: RunOptions | None = None,
    on_progress: OnProgress | None = None,
    on_stage: OnStage | None = None,
) -> CalibrationResult:
    """Gather the moments of every linear module that the sequences reach.

    ``on_module(name, weight_name, moments)`` is called once for each, in the order in which the model calls them. The
    weight that it returns, if any, takes the place of the module's own, and what follows the block sees it. Modules of
    one block are handed out together: all see their block as it was. Where a model is no chain of blocks, it is run as
    a whole, on the device at once, and is not resumed.

    Args:
        model: a transformers model on the host. Weights that were replaced stay so.
        sequences: token numbers, one array for each.
        on_module: called for every linear module.
        options: device, batches and state.
        on_progress: called with the number of steps done and of all.
        on_stage: called before anything is run with what lies outside the blocks, and for each block once its modules
            are handed out, with the names of its parameters: the values that it gives replace them before the block
            after it is run. A run that goes on asks again for what lies outside.

    Raises:
        UsageError: too few tokens, a token that the model lacks, a replaced weight that does not fit, or stages where
            the model is no chain of blocks.
        NonFiniteError: activations are not finite; names the module.
        StorageError: the state cannot be written.
    """
    options = options or RunOptions()
    linears = linear_modules(model)
    count = sum(sequence.size for sequence in sequences)
    _check(model, linears, sequences, count, options.minimum)
    parts = batches(sequences, options.batch_tokens)
    name, blocks = find_blocks(model)
    progress = on_progress or (lambda _done, _total: None)
    with without_cache(model):
        if blocks and not getattr(model.config, "is_encoder_decoder", False):
            chain = Chain(model, blocks, options.where())
            order = CallOrder(linears, blocks)
            with contextlib.suppress(UnchainedError), order:
                chain.trace(parts[-1][:1])
            if len(chain.extras) == len(blocks):
                result = CalibrationResult(count, len(blocks))
                run = ChainRun(chain, name, linears, parts, on_module, options, result, order, on_stage)
                return run.run(progress)
        if on_stage is not None:
            raise UsageError(
                f"{type(model).__name__} is not run block by block, so no block can see those before it as they are "
                "stored: sequential calibration is not for it"
            )
        return run_whole(model, linears, parts, on_module, options, CalibrationResult(count, 0), progress)


def _check(
    model: Any, linears: dict[str, Linear], sequences: Sequence[Tokens], count: int, minimum: int | None
) -> None:
    if not linears:
        raise UsageError(f"{type(model).__name__} has no linear modules")
    widest = max(linears.values(), key=lambda linear: linear.columns)
    needed = widest.columns if minimum is None else minimum
    if count < max(needed, 1):
        reason = f'"{widest.name}" has {widest.columns} columns' if minimum is None else "as asked for"
        raise UsageError(
            f"the calibration text has {count} tokens where at least {max(needed, 1)} are needed: {reason}"
        )
    embedding = model.get_input_embeddings()
    rows = int(embedding.weight.shape[0])
    largest = max(int(sequence.max()) for sequence in sequences)
    if largest >= rows:
        raise UsageError(f"the calibration text has token {largest} where the model has {rows}: not its tokenizer")
