"""Inputs of linear layers: drawn at random, or taken from the fine-tune as it reads a text."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltafmt.analysis.pairs import Floats
from deltafmt.calibration.text import read_documents
from deltafmt.errors import StorageError, UsageError
from deltafmt.extras import need

VECTORS = 16
SEQUENCE = 512  # tokens
TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Inputs:
    """Vectors for every layer.

    Attributes:
        source: in words, where they come from.
        seed: of the drawn ones.
        taken: for calibrated inputs, vectors by the weight's name; None to draw all of them.
    """

    source: str
    seed: int = 0
    taken: dict[str, Floats] | None = field(default=None, repr=False)

    def of(self, name: str, columns: int) -> Floats | None:
        """Return float32 vectors, shape (vectors, columns); None if a calibration text never reached the layer."""
        if self.taken is not None:
            found = self.taken.get(name)
            return found if found is not None and found.shape[1] == columns else None
        return np.random.default_rng([self.seed, columns]).standard_normal((VECTORS, columns), np.float32)


def normal_inputs(seed: int = 0) -> Inputs:
    """Return standard normal inputs."""
    return Inputs(f"{VECTORS} standard normal vectors, seed {seed}", seed)


def calibrated_inputs(
    model_folder: str | os.PathLike[str],
    text_file: str | os.PathLike[str],
    names: Sequence[str],
    tokenizer: str | os.PathLike[str] | None = None,
) -> Inputs:
    """Return what a model's linear layers receive as it reads texts: VECTORS positions, evenly spaced over all tokens.

    Args:
        model_folder: the fine-tune, a folder that transformers loads.
        text_file: see :func:`deltafmt.calibration.text.read_documents`; its first TOKENS tokens or so are read.
        names: of the weights whose inputs are wanted.
        tokenizer: a ``tokenizer.json``, or a folder with a tokenizer; the model folder if None.

    Raises:
        MissingExtraError: torch or transformers is missing.
        UsageError: the text gives no token, or the folder is no model that it loads.
        InvalidFileError, StorageError: a file is not as it should be, or missing.
    """
    documents = read_documents(Path(text_file))
    where = Path(tokenizer or model_folder)
    if not where.exists():
        raise StorageError(f"no such file or folder: {where}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    need("calibration", "torch", "transformers", extra="transformers")
    import transformers  # noqa: PLC0415 - only calibration needs it

    from deltafmt.calibration.tokens import cut, load_encoder  # noqa: PLC0415 - only calibration needs it

    model = _load(transformers, model_folder)
    sequences = cut(documents, load_encoder(where, model.config), SEQUENCE, TOKENS)
    if not sequences:
        raise UsageError(f"{text_file}: its texts have no two tokens in a row")
    total = sum(sequence.size for sequence in sequences)
    chosen = np.unique(np.linspace(0, total - 1, VECTORS).round().astype(np.int64))
    source = f"{len(chosen)} of {total:,} positions of {Path(text_file).name}"
    return Inputs(source, taken=_run(model, sequences, chosen, set(names)))


def _load(transformers: Any, folder: str | os.PathLike[str]) -> Any:
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        kind = getattr(transformers, (config.architectures or ["AutoModel"])[0])
        return kind.from_pretrained(folder, dtype="auto", local_files_only=True).eval()
    except Exception as error:  # whatever a model's files make transformers raise
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise UsageError(f"{folder}: transformers cannot load the model: {reason}") from error


def _run(
    model: Any, sequences: Sequence[NDArray[np.int64]], chosen: NDArray[np.int64], names: set[str]
) -> dict[str, Floats]:
    """Read the sequences one by one, and keep what the layers receive at the chosen positions."""
    import torch  # noqa: PLC0415 - only calibration needs it

    from deltafmt.calibration.modules import linear_modules  # noqa: PLC0415 - only calibration needs it

    kept: dict[str, list[Floats]] = {}
    at = torch.zeros(0, dtype=torch.int64)

    def keeps(name: str) -> Any:
        def hook(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            inputs = arguments[0] if arguments else named["input"]
            if inputs.ndim == 3 and inputs.shape[1] > int(at.max()):
                kept.setdefault(name, []).append(inputs[0, at].float().numpy())

        return hook

    for linear in linear_modules(model).values():
        if linear.weight_name in names and linear.axis == 1:
            linear.module.register_forward_pre_hook(keeps(linear.weight_name), with_kwargs=True)
    first = 0
    with torch.no_grad():
        for sequence in sequences:
            inside = chosen[(chosen >= first) & (chosen < first + sequence.size)] - first
            first += sequence.size
            if inside.size:
                at = torch.from_numpy(inside)
                model(input_ids=torch.from_numpy(sequence)[None])
    return {name: np.concatenate(parts) for name, parts in kept.items()}
