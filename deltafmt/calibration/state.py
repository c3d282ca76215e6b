"""The state of a calibration on disk, with which a killed run is resumed: the next block and the job's key."""

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
    """A folder with the hidden states that enter the next block, and a note with that block's number.

    The note is written atomically once the hidden states of its block are on disk; the older hidden states are removed
    after it. If a run is killed between a block's last module and the note, the next run hands out the modules of that
    block a second time.

    Args:
        folder: the folder, which is made if it is missing.
        key: the job's key, from model, texts and options. A note with another key is refused.

    Raises:
        StorageError: the folder cannot be made or read.
        UsageError: the folder holds the state of another job.
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
        """Note that a block is next; the hidden states that enter it, if any, are in their file already.

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
