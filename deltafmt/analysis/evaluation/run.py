"""One run of an evaluation: the fine-tune reads the text and continues prompts, then each other model reads both."""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deltafmt.analysis.evaluation.compare import compared
from deltafmt.analysis.evaluation.figures import QUANTILES, Evaluation, ModelFigures, followed, lost_of
from deltafmt.analysis.evaluation.greedy import continued
from deltafmt.analysis.evaluation.readers import Reader, reader_of
from deltafmt.analysis.evaluation.texts import PROMPT, Span, prompts, spans
from deltafmt.calibration.load_model import load_model
from deltafmt.calibration.run_options import find_device
from deltafmt.calibration.text import Document
from deltafmt.calibration.tokens import TOKENIZER_FILES, Encoder, batched, load_encoder
from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.errors import UsageError
from deltafmt.output import storage_error
from deltafmt.pipeline.attached_code import LEAVE
from deltafmt.pipeline.unpack import unpack

CONFIG = "config.json"
# A mean over fewer tokens tells nothing.
LEAST_COUNTED = 32
# The tokens of a batch: so many, if the predictions for them take no more than so many bytes; one sequence at least.
BATCH_TOKENS = 4096
LOGIT_BYTES = 1 << 28


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be evaluated, and how.

    Attributes:
        base, finetuned: the folders.
        deltas: the delta files.
        sizes: the bytes of the base's and of the fine-tune's weight files.
        tokenizer: where the tokenizer is.
        tokens, length, continuations, new_tokens, device: as :func:`deltafmt.evaluate` takes them.
        unpacking: arguments of :func:`deltafmt.unpack`.
    """

    base: Path
    finetuned: Path
    deltas: Sequence[Path]
    sizes: tuple[int, int]
    tokenizer: Path
    tokens: int
    length: int
    continuations: int
    new_tokens: int
    device: str | None
    unpacking: Mapping[str, Any]


class Run:
    """One run of an evaluation.

    Args:
        plan: what is evaluated.
        text: the text's path.
        documents: the text.
        progress: called with the number of steps done and the number of all steps.
    """

    def __init__(
        self, plan: Plan, text: str, documents: Sequence[Document], progress: Callable[[int, int], None]
    ) -> None:
        self._plan = plan
        self._text = text
        self._documents = documents
        self._progress = progress
        self._device = find_device(plan.device, "evaluation")
        self._done = self._total = 0

    def run(self) -> Evaluation:
        """Evaluate all models."""
        plan = self._plan
        model = self._load(plan.finetuned, str(plan.finetuned))
        encoder = load_encoder(plan.tokenizer, model.config)
        longest = getattr(model.config, "max_position_embeddings", None)
        longest = longest if isinstance(longest, int) else None
        self._spans = self._read_text(encoder, longest)
        self._check_tokenizer(plan.finetuned, plan.finetuned, encoder)
        rows = _rows(model)
        largest = max(int(span.tokens.max()) for span in self._spans)
        if largest >= rows:
            raise UsageError(
                f"{self._text} has token {largest}, but {plan.finetuned} has {rows} tokens; use the model's own "
                "tokenizer"
            )
        self._batch_tokens = min(BATCH_TOKENS, LOGIT_BYTES // (4 * rows))
        reference = reader_of(model, str(plan.finetuned), self._device, self._spans[0].tokens[None])
        readings = plan.new_tokens * (plan.continuations > 0) + 2 + len(plan.deltas)
        self._reference, self._total = reference, reference.steps * readings
        written = self._written(reference, encoder, model, longest)
        self._every = [*self._spans, *written]
        self._largest = max(int(span.tokens.max()) for span in self._every)
        self._batches = batched([span.tokens for span in self._every], self._batch_tokens)
        reference.read(self._batches, self._tick)
        reference.release()
        del model
        result = Evaluation(
            self._text,
            sum(span.tokens.size for span in self._spans),
            sum(span.counted for span in self._spans),
            len(self._spans),
            tuple(span.counted for span in written),
            tuple(span.first for span in written),
            plan.sizes[1],
        )
        theirs = self._figures(reference, "finetuned", plan.finetuned, plan.sizes[1])
        why = self._base_lacks(encoder)
        if why:
            result.left_out[str(plan.base)] = why
            self._done += reference.steps
        else:
            model = self._load(plan.base, str(plan.base))
            result.models.append(self._other(model, "base", plan.base, plan.sizes[0]))
            del model
        result.models.append(theirs)
        result.models += [self._delta(path, encoder) for path in plan.deltas]
        self._progress(self._total, self._total)
        return result

    def _base_lacks(self, encoder: Encoder) -> str:
        """Return why the base cannot be compared; empty if it can."""
        base = self._plan.base
        if not self._reads_alike(base, encoder):
            return f"its tokenizer makes other tokens of {self._text}"
        with Checkpoint(base, lenient=True) as checkpoint:
            tokens = checkpoint.config().get("vocab_size")
        if isinstance(tokens, int) and self._largest >= tokens:
            return f"it has {tokens} tokens, and text or continuations have token {self._largest}"
        return ""

    def _tick(self) -> None:
        self._done += 1
        self._progress(self._done, self._total)

    def _load(self, folder: Path, label: str) -> Any:
        gc.collect()  # models are cycles of references, and one more may not fit
        try:
            return load_model(folder, torch.float32 if self._device.type == "cpu" else None, "evaluate")
        except UsageError as error:
            # A temporary folder means nothing to the caller.
            raise UsageError(str(error).replace(str(folder), label)) from error

    def _length(self, longest: int | None) -> int:
        return self._plan.length if longest is None else min(self._plan.length, longest)

    def _read_text(self, encoder: Encoder, longest: int | None) -> list[Span]:
        found = spans(self._documents, encoder, self._length(longest), self._plan.tokens)
        counted = sum(span.counted for span in found)
        if counted < LEAST_COUNTED:
            raise UsageError(
                f"{self._text} gives {counted} tokens to predict, and at least {LEAST_COUNTED} are needed; "
                "give a longer text"
            )
        return found

    def _reads_alike(self, folder: Path, encoder: Encoder) -> bool:
        """Tell whether a folder's tokenizer, if it has one, makes the same tokens of the text as the one in use.

        Special tokens around a text are a setting, and are not compared.
        """
        if not any((folder / name).is_file() for name in TOKENIZER_FILES) or folder == self._plan.tokenizer:
            return True
        other, read = load_encoder(folder, None), 0
        for document in self._documents:
            for piece in document.pieces:
                tokens = encoder.encode(piece)
                if tokens != other.encode(piece):
                    return False
                read += len(tokens)
            if read >= self._plan.tokens:
                break
        return True

    def _check_tokenizer(self, folder: Path, label: Path, encoder: Encoder) -> None:
        if not self._reads_alike(folder, encoder):
            raise UsageError(
                f"{label} has another tokenizer than {self._plan.tokenizer}: it makes other tokens of {self._text}, "
                "so predictions cannot be compared"
            )

    def _written(self, reference: Reader, encoder: Encoder, model: Any, longest: int | None) -> list[Span]:
        """Return prompts of the text with the fine-tune's continuations.

        Raises:
            UsageError: the text has no prompt.
        """
        plan = self._plan
        if not plan.continuations:
            return []
        room = self._length(longest) if longest is None else longest - plan.new_tokens
        asked = prompts(self._spans, plan.continuations, room)
        if not asked:
            raise UsageError(
                f"{self._text} has nothing that a continuation can begin with: more than {PROMPT} tokens of a text, or "
                f"a prompt of at most {room}; give a longer text, or ask for no continuations"
            )
        return continued(reference, asked, plan.new_tokens, _ends(model, encoder), self._batch_tokens, self._tick)

    def _delta(self, path: Path, encoder: Encoder) -> ModelFigures:
        """Unpack a delta file and evaluate the model."""
        plan = self._plan
        try:
            temporary = tempfile.TemporaryDirectory(prefix="deltafmt-evaluate-")
        except OSError as error:
            raise storage_error("cannot make a temporary folder for", path, error) from error
        with temporary as parent:
            folder = Path(parent) / "model"
            unpack(plan.base, path, folder, code=LEAVE, **plan.unpacking)
            if not (folder / CONFIG).exists():
                shutil.copyfile(plan.finetuned / CONFIG, folder / CONFIG)
            self._check_tokenizer(folder, path, encoder)
            model = self._load(folder, str(path))
        rows = _rows(model)
        if self._largest >= rows:
            raise UsageError(f"{path} gives a model of {rows} tokens, but text or continuations have {self._largest}")
        return self._other(model, "delta", path, path.stat().st_size)

    def _other(self, model: Any, role: str, path: Path, size: int) -> ModelFigures:
        """Have another model than the fine-tune read the batches, and compare its predictions."""
        reader = reader_of(model, str(path), self._device, self._spans[0].tokens[None])
        share = self._reference.steps
        done = self._done
        reader.read(self._batches, self._tick)
        self._done = done + share  # a model without blocks has another number of steps
        reader.release()
        return self._figures(reader, role, path, size)

    def _figures(self, reader: Reader, role: str, path: Path, size: int) -> ModelFigures:
        found = compared(reader, self._reference, self._every, self._batches)
        count = len(self._spans)
        if reader is self._reference:
            self._likelihoods = found.likelihoods[:count]
        lost, error = lost_of(self._likelihoods, found.likelihoods[:count])
        divergences = np.concatenate(found.divergences[:count]) if found.divergences else None
        return ModelFigures(
            str(path),
            role,
            size,
            float(np.concatenate(found.likelihoods[:count]).mean()),
            lost,
            error,
            float(np.concatenate(found.agreed[:count]).mean()),
            None if divergences is None else float(divergences.mean()),
            () if divergences is None else tuple(map(float, np.quantile(divergences, QUANTILES))),
            tuple(followed(agreed) for agreed in found.agreed[count:]),
        )


def _rows(model: Any) -> int:
    """Return the number of tokens that a model knows."""
    return int(model.get_input_embeddings().weight.shape[0])


def _ends(model: Any, encoder: Encoder) -> frozenset[int]:
    """Return the tokens that end what a model writes."""
    config = getattr(model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    found = [*ends] if isinstance(ends, list | tuple) else [ends]
    return frozenset(int(token) for token in (*found, encoder.end) if token is not None)
