"""What a calibration keeps on disk so that a killed run goes on: which block is next, and that it is the same job."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from deltafmt.errors import UsageError
from deltafmt.output import storage_error, sync_folder

VERSION = 1
_FILE = "calibration.json"


class State:
    """A folder with the hidden states that enter the next block and a note of which block that is.

    A note is written, atomically, once the hidden states that it speaks of are on disk; the older ones go after it. The
    modules of a block may thus be handed out twice, if a run is killed between the last of them and the note.

    Args:
        folder: made if it is not there.
        key: identifies the job: model, texts and options. A note of another job is refused.

    Raises:
        StorageError: the folder cannot be made or read.
        UsageError: the folder holds another job.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key
        self.next = 0
        self.started = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            text = (folder / _FILE).read_text("utf-8")
        except FileNotFoundError:
            return
        except OSError as error:
            raise storage_error("cannot use", folder, error) from error
        try:
            note: Any = json.loads(text)
            same = (note["version"], note["key"]) == (VERSION, key)
            self.next = int(note["next"])
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{folder / _FILE} is not the note of a calibration; remove it to start anew") from error
        if not same:
            raise UsageError(f"{folder} holds the state of another calibration; remove it to start anew")
        self.started = True

    def hidden(self, block: int) -> Path:
        """Return the path of the hidden states that enter a block."""
        return self.folder / f"hidden-{block:05d}.bin"

    def advance(self, block: int) -> None:
        """Record that a block is next; its hidden states, if it has any, are in their file.

        Raises:
            StorageError: writing failed.
        """
        path = self.folder / _FILE
        temporary = self.folder / f".{_FILE}.tmp"
        try:
            if self.hidden(block).exists():
                with open(self.hidden(block), "rb") as file:
                    os.fsync(file.fileno())
            with open(temporary, "w", encoding="utf-8") as out:
                json.dump({"version": VERSION, "key": self.key, "next": block}, out)
                out.flush()
                os.fsync(out.fileno())
            os.replace(temporary, path)
            sync_folder(self.folder)
            for old in self.folder.glob("hidden-*.bin"):
                if old != self.hidden(block):
                    old.unlink()
        except OSError as error:
            raise storage_error("cannot write", path, error) from error
        self.next, self.started = block, True
