"""Inputs of linear layers: random vectors, or the vectors that the layers of the fine-tune receive for a text."""

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
    """Input vectors for every layer.

    Attributes:
        source: the origin of the vectors, in words.
        seed: the seed of random vectors.
        taken: the vectors from a calibration text, by weight name; None if all vectors are random.
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
    """Return the inputs that a model's linear layers receive for a text, at VECTORS positions spread over all tokens.

    Args:
        model_folder: the fine-tune's folder, which transformers loads.
        text_file: the text, see :func:`deltafmt.calibration.text.read_documents`; about TOKENS tokens of it are read.
        names: the names of the weights whose inputs are wanted.
        tokenizer: a ``tokenizer.json``, or a folder with a tokenizer; by default the model's folder.

    Raises:
        MissingExtraError: torch or transformers is missing.
        UsageError: transformers cannot load the model, or the text gives no tokens.
        InvalidFileError, StorageError: a file is wrong or missing.
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
        raise UsageError(f"{text_file}: no text in it has two tokens")
    total = sum(sequence.size for sequence in sequences)
    chosen = np.unique(np.linspace(0, total - 1, VECTORS).round().astype(np.int64))
    source = f"{len(chosen)} of {total:,} positions of {Path(text_file).name}"
    return Inputs(source, taken=_run(model, sequences, chosen, set(names)))


def _load(transformers: Any, folder: str | os.PathLike[str]) -> Any:
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model_class = getattr(transformers, (config.architectures or ["AutoModel"])[0])
        return model_class.from_pretrained(folder, dtype="auto", local_files_only=True, trust_remote_code=False).eval()
    except Exception as error:  # the files of a model can make transformers raise anything
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise UsageError(f"{folder}: transformers cannot load the model: {reason}") from error


def _run(
    model: Any, sequences: Sequence[NDArray[np.int64]], chosen: NDArray[np.int64], names: set[str]
) -> dict[str, Floats]:
    """Run the model over the sequences one by one, and keep the layers' inputs at the chosen positions."""
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
