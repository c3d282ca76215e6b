"""Reading calibration texts: plain text, or JSON lines with a text or with a question and its answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltafmt.errors import InvalidFileError, UsageError
from deltafmt.output import storage_error
from deltafmt.regular_file import read_regular

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
PAIRS = (("prompt", "completion"), ("question", "answer"))


@dataclass(frozen=True, slots=True)
class Document:
    """One text.

    Attributes:
        pieces: the text; or prompt and completion, each of which becomes tokens by itself, as when a model is asked.
        ended: True if the text is complete, so that the end token follows it.
    """

    pieces: tuple[str, ...]
    ended: bool


def read_documents(path: Path) -> list[Document]:
    """Read a calibration text.

    A ``.jsonl``, ``.ndjson`` or ``.json`` file has a JSON object on each line, with ``text``, with ``prompt`` and
    ``completion``, or with ``question`` and ``answer``. Any other file is one plain text.

    Raises:
        StorageError: the file cannot be read.
        InvalidFileError: the file is not UTF-8, or a line is not such an object.
        UsageError: the file holds no text.
    """
    try:
        content = read_regular(path).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        raise storage_error("cannot read", path, error) from error
    except ValueError as error:
        raise InvalidFileError(f"{path}: not UTF-8") from error
    if path.suffix.lower() in JSON_SUFFIXES:
        lines = [(number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
        documents = [_parse(line, f"{path}: line {number}") for number, line in lines]
    else:
        documents = [Document((content,), ended=False)] if content.strip() else []
    if not any(piece.strip() for document in documents for piece in document.pieces):
        raise UsageError(f"{path}: the calibration text is empty")
    return documents


def _parse(line: str, where: str) -> Document:
    try:
        obj: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidFileError(f"{where} is not JSON") from error
    if type(obj) is dict:
        if type(obj.get("text")) is str:
            return Document((obj["text"],), ended=False)
        for names in PAIRS:
            values = tuple(value for value in (obj.get(name) for name in names) if type(value) is str)
            if len(values) == len(names):
                return Document(values, ended=True)
    wanted = ", ".join(" and ".join(f'"{name}"' for name in names) for names in (("text",), *PAIRS))
    raise InvalidFileError(f"{where} is not an object with one of: {wanted}")
