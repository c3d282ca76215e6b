"""Second moments of a fine-tune's matrices in a folder beside the output, so that an interrupted run can go on.

The folder, ``.NAME.calibration``, holds a file for every matrix and what an interrupted pass through the model needs to
go on. Memory therefore holds one block of the model at a time. A run of the same job finds the folder again; the folder
is removed once the delta file is written.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltafmt.calibration.callbacks import Moments, OnStage
from deltafmt.calibration.moment_store import MomentStore
from deltafmt.errors import UsageError
from deltafmt.extras import need
from deltafmt.output import OutputLock, storage_error
from deltafmt.pipeline.calibrate import SEQUENTIAL, Calibration

_JOB = "job"
_DONE = "done.json"


class MomentFolder:
    """Second moments of the inputs of a fine-tune's matrices, gathered once and kept until the pack is done.

    Args:
        out: the output, beside which the folder lies; None for a temporary folder.
        described: the calibration, as :meth:`deltafmt.pipeline.calibrate.Calibration.describe` describes it.
        job: a digest. What an interrupted run has gathered is used if its job had the same digest.
        suffix: what the folder's name ends with.

    Attributes:
        described: as given.
        tokens: number of tokens that the fine-tune has read; 0 before it has read the text.

    Raises:
        UsageError: there is a folder of that name that no calibration has made.
        StorageError: the folder cannot be made.
    """

    def __init__(self, out: Path | None, described: dict[str, str], job: bytes, suffix: str = "calibration") -> None:
        self.described = described
        self.tokens = 0
        self._wanted: frozenset[str] = frozenset()
        self._lock: OutputLock | None = None
        try:
            if out is None:
                self.path = Path(tempfile.mkdtemp(prefix="deltafmt-calibration-"))
            else:
                self.path = out.parent / f".{out.name}.{suffix}"
                self._lock = self._take(out, job)
        except OSError as error:
            raise storage_error("cannot make a calibration's folder for", out or "a stream", error) from error
        self._store = MomentStore(self.path / "moments")

    def _take(self, out: Path, job: bytes) -> OutputLock:
        """Use the folder of an interrupted run of the same job, or empty it; the file with the digest is the lock."""
        self.path.mkdir(exist_ok=True)
        if not (self.path / _JOB).is_file() and any(self.path.iterdir()):
            raise UsageError(f"{self.path} is not the folder of a calibration; remove it")
        lock = OutputLock(self.path / _JOB, out)
        lock.file.seek(0)
        if lock.file.read() != job:
            for old in self.path.iterdir():
                if old.is_dir():
                    shutil.rmtree(old)
                elif old.name != _JOB:
                    old.unlink()
            lock.file.truncate(0)
            lock.file.write(job)
            lock.file.flush()
        return lock

    def gather(
        self,
        finetuned: Path,
        wanted: Mapping[str, int],
        calibration: Calibration,
        progress: Callable[[int, int], None] | None = None,
        on_stage: OnStage | None = None,
    ) -> None:
        """Have a fine-tune read the text, unless an earlier run has already read it.

        Args:
            finetuned: the fine-tune's folder.
            wanted: number of columns of the matrices whose moments will be used, by name.
            calibration: the text.
            progress: called with the number of steps done and the number of all steps.
            on_stage: for a sequential calibration, gives the parameters of a stage as the file will hold them.

        Raises:
            MissingExtraError: torch or transformers is missing.
            UsageError: transformers cannot load the model, there is no such device, the text is too short, or none of
                the matrices gets moments.
            NonFiniteError: activations are not finite; names the module.
            StorageError, InvalidFileError: a file cannot be read or written, or is not what its name says.
        """
        self._wanted = frozenset(wanted)
        if self._read_done():
            return
        need("calibration", "torch", "transformers", extra="transformers")
        from deltafmt.calibration import run, run_options  # noqa: PLC0415  # torch is optional and slow to import

        def keep(name: str, weight_name: str, moments: Moments) -> None:
            # Moments of a tied weight are left out: other modules use the weight with other inputs.
            own = weight_name == f"{name}.weight"
            if own and moments.axis == 1 and wanted.get(weight_name) == len(moments.matrix):
                self._store.on_module(name, weight_name, moments)

        done = run.calibrate_folder(
            finetuned,
            calibration.text,
            keep,
            tokenizer=calibration.tokenizer,
            tokens=calibration.tokens,
            length=calibration.length,
            options=run_options.RunOptions(calibration.device, state=self.path / "state"),
            on_progress=progress,
            on_stage=on_stage,
        )
        if not any(self.has(name) for name in wanted):
            raise UsageError(
                f"{finetuned}: the calibration text gives second moments for none of the matrices to be compressed, "
                f'such as "{next(iter(wanted))}"'
            )
        self._write_done(done.tokens)

    def _read_done(self) -> bool:
        try:
            obj: Any = json.loads((self.path / _DONE).read_text("utf-8"))
            self.tokens = int(obj["tokens"])
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return True

    def _write_done(self, tokens: int) -> None:
        self.tokens = tokens
        path = self.path / _DONE
        try:
            path.with_suffix(".tmp").write_text(json.dumps({"tokens": tokens}), "utf-8")
            os.replace(path.with_suffix(".tmp"), path)
            shutil.rmtree(self.path / "state", ignore_errors=True)
        except OSError as error:
            raise storage_error("cannot write", path, error) from error

    def metadata(self) -> dict[str, str]:
        """Return what a file's metadata says of its calibration."""
        return {
            "calibration.length": self.described["length"],
            **(SEQUENTIAL if self.sequential else {}),
            "calibration.text": f"blake3:{self.described['text']}",
            "calibration.tokens": str(self.tokens),
        }

    @property
    def sequential(self) -> bool:
        """True if each block was calibrated on the outputs of the compressed blocks before it."""
        return self.described["sequential"] == "yes"

    def lacks(self, name: str) -> bool:
        """Return True if moments of a matrix's inputs were wanted and are not here."""
        return name in self._wanted and not self.has(name)

    def has(self, name: str) -> bool:
        """Return True if there are moments of a matrix's inputs."""
        return self._store.path(name).is_file()

    def get(self, name: str) -> NDArray[np.float32] | None:
        """Return the second moments of a matrix's inputs, if there are any.

        Raises:
            StorageError: reading failed.
            InvalidFileError: the file is damaged.
        """
        return self._store.load(name).matrix if self.has(name) else None

    def keep(self) -> bool:
        """Leave the folder to a later run and return True; remove a temporary folder and return False."""
        if self._lock is None:
            self.remove()
            return False
        self._lock.keep()
        return True

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            self._lock.keep()
