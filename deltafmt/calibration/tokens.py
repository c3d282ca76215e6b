"""From texts to token sequences, and from sequences to batches of one length, which need no padding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltafmt.calibration.text import Document
from deltafmt.errors import UsageError

Tokens = NDArray[np.int64]

# The usual calibration set: 128 sequences of 2048 tokens.
TOKENS = 128 * 2048
LENGTH = 2048

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


@dataclass(frozen=True, slots=True)
class Encoder:
    """A model's tokenizer, and the special tokens that the model wants around a text.

    Attributes:
        encode: a function from a text to its tokens, without special tokens.
        before, after: the special tokens before and after every document.
        end: the token that ends a complete text, or None.
    """

    encode: Callable[[str], list[int]]
    before: tuple[int, ...]
    after: tuple[int, ...]
    end: int | None

    def document(self, document: Document) -> list[int]:
        """Return the tokens of a document."""
        tokens = [*self.before]
        for piece in document.pieces:
            tokens += self.encode(piece)
        tokens += self.after
        if document.ended and self.end is not None and tokens[-1:] != [self.end]:
            tokens.append(self.end)
        return tokens


def check_tokenizer(source: Path) -> None:
    """Refuse a folder without a tokenizer; this takes no time, where loading the model does.

    Raises:
        UsageError: the folder has none of the files that a tokenizer is saved in.
    """
    if source.is_dir() and not any((source / name).is_file() for name in TOKENIZER_FILES):
        raise UsageError(f"{source} has no tokenizer; name a folder that has one, or a tokenizer.json")


def load_encoder(source: Path, config: Any) -> Encoder:
    """Return the encoder of a model's folder, or of a ``tokenizer.json`` by itself.

    A folder's tokenizer puts its own special tokens around a text. If a ``tokenizer.json`` has none, the
    configuration's ``bos_token_id`` begins a text and its ``eos_token_id`` ends it.

    Raises:
        UsageError: there is no tokenizer, or it cannot be loaded.
    """
    begin, end = (_single(getattr(config, name, None)) for name in ("bos_token_id", "eos_token_id"))
    check_tokenizer(source)
    if source.is_dir():
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        except BaseException as error:  # the files of a tokenizer can make transformers raise anything
            _raise_if_ending(error)
            raise UsageError(f"{source}: transformers cannot load the tokenizer: {first_line(error)}") from error

        def raw_encode(text: str, special: bool = False) -> list[int]:
            return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

        end = end if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)
    else:
        from tokenizers import Tokenizer

        try:
            bare = Tokenizer.from_file(str(source))
        except BaseException as error:  # tokenizers raises Exception itself
            _raise_if_ending(error)
            raise UsageError(f"{source}: not a tokenizer: {first_line(error)}") from error

        def raw_encode(text: str, special: bool = False) -> list[int]:
            return list(bare.encode(text, add_special_tokens=special).ids)

    def encode(text: str, special: bool = False) -> list[int]:
        try:
            return raw_encode(text, special)
        except BaseException as error:
            _raise_if_ending(error)
            raise UsageError(f"{source}: the tokenizer fails on a text: {first_line(error)}") from error

    before, after = _around(encode("a"), encode("a", special=True))
    if source.is_file() and not before and not after and begin is not None:
        before = (begin,)
    return Encoder(encode, before, after, end)


def cut(documents: Iterable[Document], encoder: Encoder, length: int, limit: int) -> list[Tokens]:
    """Return sequences of at most ``length`` tokens, in the documents' order, with about ``limit`` tokens together.

    A document that is longer than a sequence is cut into several. A shorter document is a sequence by itself, so that
    the model reads every text from its beginning. Sequences of a single token are left out.
    """
    found: list[Tokens] = []
    count = 0
    for document in documents:
        tokens = np.array(encoder.document(document), np.int64)
        for start in range(0, tokens.size, length):
            if count >= limit:
                return found
            part = tokens[start : start + length]
            if part.size > 1:
                found.append(part)
                count += part.size
    return found


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences of the same length, which need no padding.

    Attributes:
        tokens: the token numbers, shape (sequences, tokens).
        numbers: the numbers of the sequences in the list that was batched.
    """

    tokens: Tokens
    numbers: tuple[int, ...]


def batched(sequences: Sequence[Tokens], tokens: int) -> list[Batch]:
    """Group sequences of equal length into batches of about ``tokens`` tokens, the longest sequences first."""
    by_length: dict[int, list[int]] = {}
    for number, sequence in enumerate(sequences):
        by_length.setdefault(sequence.size, []).append(number)
    found = []
    for length in sorted(by_length, reverse=True):
        alike = by_length[length]
        rows = max(tokens // length, 1)
        for start in range(0, len(alike), rows):
            part = alike[start : start + rows]
            found.append(Batch(np.stack([sequences[number] for number in part]), tuple(part)))
    return found


def batches(sequences: Sequence[Tokens], tokens: int) -> list[Tokens]:
    """Return the tokens of the batches that :func:`batched` makes."""
    return [batch.tokens for batch in batched(sequences, tokens)]


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, for a message that has one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def _raise_if_ending(error: BaseException) -> None:
    """Raise what ends the process, such as an interrupt. A panic of tokenizers is no Exception, and does not."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error


def _single(token: Any) -> int | None:
    """Return a token number as an integer, or the first one of a list; None if there is none."""
    if isinstance(token, (list, tuple)):
        token = token[0] if token else None
    return None if token is None else int(token)


def _around(plain: list[int], special: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the tokens before and after ``plain`` in ``special``."""
    for start in range(len(special) - len(plain) + 1):
        if special[start : start + len(plain)] == plain:
            return tuple(special[:start]), tuple(special[start + len(plain) :])
    return (), ()
