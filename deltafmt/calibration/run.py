"""Calibration: from a model and texts to the second moments of every linear module's inputs, in the model's order.

One block after the other is brought to the device and run over all sequences, while the second moments of its linear
modules' inputs are added up. If a weight was replaced, the block runs again, so that the blocks after it receive the
outputs of the replaced weight. Hidden states wait on the host or in a file. Nothing is random: the same model, texts
and options give the same numbers on the same machine.
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
from deltafmt.calibration.tokens import LENGTH, TOKENS, Tokens, batches, check_tokenizer, cut, load_encoder
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
    options: RunOptions | None = None,
    on_progress: OnProgress | None = None,
    on_stage: OnStage | None = None,
) -> CalibrationResult:
    """Load a fine-tune with transformers and calibrate it with a text.

    Args:
        folder: the fine-tune's folder. The model runs in float32 on a CPU and in the weights' dtype on a GPU.
        text: the calibration text, as :func:`deltafmt.calibration.text.read_documents` reads it.
        on_module: a function that is called for every linear module.
        tokenizer: a folder or ``tokenizer.json``, if the fine-tune's folder has no tokenizer.
        tokens: the number of tokens to use, from the beginning of the text.
        length: the number of tokens in the longest sequence.
        options: device, batches and state.
        on_progress: a function that is called after each block.
        on_stage: a function that may replace parameters between blocks; see :func:`calibrate`.

    Raises:
        UsageError: transformers is missing or cannot load the model, there is no tokenizer, the text is empty or too
            short, or the activations are not finite.
        StorageError: a file cannot be read or written.
        InvalidFileError: the text's content is not what its file name says.
    """
    options = options or RunOptions()
    documents = read_documents(Path(text))
    check_tokenizer(Path(tokenizer or folder))
    model = load_model(Path(folder), torch.float32 if options.where().type == "cpu" else None)
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

    ``on_module(name, weight_name, moments)`` is called once for each module, in the order in which the model calls
    them. If it returns a weight, that weight replaces the module's own for all later blocks. The modules of one block
    are handed out together, so the moments of all of them come from the block's old weights. A model that is not a
    chain of blocks is run as a whole, with all of it on the device; such a run cannot be resumed.

    Args:
        model: a transformers model on the host. Replaced weights stay in it.
        sequences: the token numbers, one array for each sequence.
        on_module: a function that is called for every linear module.
        options: device, batches and state.
        on_progress: a function that is called with the number of finished steps and the number of all steps.
        on_stage: a function that may replace parameters. It is called before the first block with the names of the
            parameters outside the blocks, and after each block with the names of the block's parameters. The values
            that it returns are set before the next block runs. A resumed run calls it again for the parameters
            outside the blocks.

    Raises:
        UsageError: there are too few tokens, the model lacks a token, a new weight does not fit, or ``on_stage`` is
            given for a model that is not a chain of blocks.
        NonFiniteError: activations are not finite; the message names the module.
        StorageError: the state cannot be written.
    """
    options = options or RunOptions()
    linears = linear_modules(model)
    count = sum(sequence.size for sequence in sequences)
    _check(model, linears, sequences, count)
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
                f"{type(model).__name__} cannot be run block by block, which sequential calibration needs; "
                "calibrate without it"
            )
        return run_whole(model, linears, parts, on_module, options, CalibrationResult(count, 0), progress)


def _check(model: Any, linears: dict[str, Linear], sequences: Sequence[Tokens], count: int) -> None:
    if not linears:
        raise UsageError(f"{type(model).__name__} has no linear modules")
    widest = max(linears.values(), key=lambda linear: linear.columns)
    if count < widest.columns:  # fewer tokens than columns give singular moments
        raise UsageError(
            f"the calibration text has {count} tokens where at least {widest.columns} are needed: "
            f'"{widest.name}" has {widest.columns} columns'
        )
    embedding = model.get_input_embeddings()
    rows = int(embedding.weight.shape[0])
    largest = max(int(sequence.max()) for sequence in sequences)
    if largest >= rows:
        raise UsageError(
            f"the calibration text has token {largest}, but the model has {rows} tokens; use the model's own tokenizer"
        )
