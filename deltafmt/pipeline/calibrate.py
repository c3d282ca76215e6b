"""The first pass of a calibrated pack: the fine-tune reads a text, and second moments of its inputs go to a folder.

The folder, ``.NAME.calibration`` beside the output, holds a file for every matrix and what an interrupted pass needs to
go on, so that memory holds one block of the model at a time. The same job finds it again; it is removed at success.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from deltafmt._version import __version__
from deltafmt.calibration.callbacks import Moments, OnStage
from deltafmt.calibration.store import MomentStore
from deltafmt.calibration.tokens import LENGTH, TOKENS
from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.container import canonical
from deltafmt.errors import UsageError
from deltafmt.extras import need
from deltafmt.methods.base import Method
from deltafmt.output import OutputLock, storage_error
from deltafmt.pipeline.plan import Plan
from deltafmt.pipeline.sequential import Stages
from deltafmt.pipeline.workers import Progress

# What a file's metadata says of a sequential calibration.
SEQUENTIAL = {"calibration.sequential": "yes"}

_JOB = "job"
_DONE = "done.json"


@dataclass(frozen=True, slots=True)
class Calibration:
    """A text for the fine-tune to read, and how.

    Attributes:
        text: the file: plain text, or ``.jsonl`` with a ``text``, or ``prompt`` and ``completion``, or ``question`` and
            ``answer``, in every line.
        tokens: about how many to use, in whole sequences; the first ones of the text.
        length: of the longest sequence.
        device: ``cpu``, ``cuda`` or ``cuda:N``; None for a GPU if there is one.
        tokenizer: a folder or ``tokenizer.json``, where the fine-tune's folder has none.
        sequential: whether each block is given what the blocks before it give as they will be stored, errors and all;
            otherwise what those of the fine-tune give.

    Raises:
        UsageError: an option is out of range.
    """

    text: str | os.PathLike[str]
    tokens: int = TOKENS
    length: int = LENGTH
    device: str | None = None
    tokenizer: str | os.PathLike[str] | None = None
    sequential: bool = False

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise UsageError(f"{self.tokens} calibration tokens are fewer than one")
        if self.length < 2:
            raise UsageError(f"a calibration length of {self.length} tokens is less than two")
        kind, colon, number = (self.device or "cpu").partition(":")
        if kind not in ("cpu", "cuda") or (colon and (kind == "cpu" or not number.isdecimal())):
            raise UsageError(f"calibration device {self.device!r} is not cpu, cuda or cuda:N")

    def digest(self) -> str:
        """Return the BLAKE3 of the text, hexadecimal.

        Raises:
            StorageError: it cannot be read.
        """
        hasher = blake3()
        try:
            with open(self.text, "rb") as file:
                while data := file.read(1 << 20):
                    hasher.update(data)
        except OSError as error:
            raise storage_error("cannot read", self.text, error) from error
        return hasher.hexdigest()

    def describe(self) -> dict[str, str]:
        """Return what decides the moments that a fine-tune gives, as text by name.

        Raises:
            StorageError: the text cannot be read.
        """
        return {
            "device": self.device or "",
            "length": str(self.length),
            "sequential": "yes" if self.sequential else "no",
            "suffix": Path(self.text).suffix,
            "text": self.digest(),
            "tokenizer": "" if self.tokenizer is None else os.path.abspath(self.tokenizer),
            "tokens": str(self.tokens),
        }


class MomentFolder:
    """Second moments of a fine-tune's matrices, gathered once and kept until the pack is done.

    Args:
        out: the output, beside which the folder lies; None for a temporary folder.
        described: the calibration, as :meth:`Calibration.describe` has it.
        job: whatever must be equal for what an interrupted run has gathered to be of use.
        suffix: of the folder's name.

    Attributes:
        described: as given.
        tokens: that the fine-tune has read; 0 before it has.

    Raises:
        UsageError: a folder of that name is something else.
        StorageError: it cannot be made.
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
        """Use the folder of an interrupted run of the same job, or begin anew; the job's note is the lock."""
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
        """Have a fine-tune read the text, unless an earlier run has had it.

        Args:
            finetuned: its folder.
            wanted: columns of the matrices whose moments are of use, by name.
            calibration: the text.
            progress: called with the number of steps done and of all.
            on_stage: gives what is stored, for a sequential calibration.

        Raises:
            MissingExtraError: torch or transformers is missing.
            UsageError: transformers cannot load the model, there is no such device, the text is too short, or no
                moments are of any of the matrices.
            NonFiniteError: activations are not finite; names the module.
            StorageError, InvalidFileError: a file cannot be read or written, or is not what its name says.
        """
        self._wanted = frozenset(wanted)
        if self._read_done():
            return
        need("calibration", "torch", "transformers", extra="transformers")
        from deltafmt.calibration import options, run  # noqa: PLC0415  # torch is optional and slow to import

        def keep(name: str, weight_name: str, moments: Moments) -> None:
            # A tied weight is more than this module's: its moments are not all that matters about it.
            own = weight_name == f"{name}.weight"
            if own and moments.axis == 1 and wanted.get(weight_name) == len(moments.matrix):
                self._store.on_module(name, weight_name, moments)

        report = run.calibrate_folder(
            finetuned,
            calibration.text,
            keep,
            tokenizer=calibration.tokenizer,
            tokens=calibration.tokens,
            length=calibration.length,
            options=options.Options(calibration.device, state=self.path / "state"),
            on_progress=progress,
            on_stage=on_stage,
        )
        if not any(self.has(name) for name in wanted):
            raise UsageError(
                f"{finetuned}: the calibration text gives second moments for none of the matrices to be compressed, "
                f'such as "{next(iter(wanted))}"'
            )
        self._write_done(report.tokens)

    def stages(self, plans: Sequence[Plan], packing: Packing) -> Stages:
        """Return what gives the parameters of each stage as they are stored, from the moments that are here by then."""
        return Stages(
            {plan.tensor.name: plan for plan in plans},
            lambda some, path: packing.pack(some, path, self),
            self.path / "stage.deltafmt",
        )

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
        """Return what a file says of its calibration."""
        return {
            "calibration.length": self.described["length"],
            **(SEQUENTIAL if self.sequential else {}),
            "calibration.text": f"blake3:{self.described['text']}",
            "calibration.tokens": str(self.tokens),
        }

    @property
    def sequential(self) -> bool:
        """Whether each block was given what the blocks before it give as they are stored."""
        return self.described["sequential"] == "yes"

    def lacks(self, name: str) -> bool:
        """Tell whether moments of a matrix's inputs were wanted and not found."""
        return name in self._wanted and not self.has(name)

    def has(self, name: str) -> bool:
        """Tell whether there are moments of a matrix's inputs."""
        return self._store.path(name).is_file()

    def get(self, name: str) -> NDArray[np.float32] | None:
        """Return the second moments of a matrix's inputs, if there are any.

        Raises:
            StorageError: reading failed.
            InvalidFileError: the file is damaged.
        """
        return self._store.load(name).matrix if self.has(name) else None

    def keep(self) -> bool:
        """Leave what a later run can use; remove it, and return False, where nothing can."""
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


@dataclass(frozen=True, slots=True)
class Packing:
    """How a sequential calibration gets what will be stored.

    Attributes:
        job: whatever decides the bytes.
        pack: packs some tensors, with what moments there are by then, into a file.
    """

    job: bytes
    pack: Callable[[list[Plan], Path, MomentFolder], None]


def check_calibration(methods: Iterable[Method], calibration: Calibration | None) -> None:
    """Refuse methods that need a calibration where there is none.

    Raises:
        UsageError: names the first.
    """
    for method in methods:
        if calibration is None and method.calibration == "required":
            raise UsageError(f"method {method.name} needs --calibration FILE, a text for the fine-tune to read")


def calibrated_names(plans: Sequence[Plan], calibration: Calibration | None) -> dict[str, int]:
    """Return the columns of the matrices whose methods use second moments, by name.

    Raises:
        UsageError: there is no calibration and a method needs it, or there is one and no method uses it.
    """
    check_calibration((plan.method for plan in plans if plan.method is not None), calibration)
    found = {
        plan.tensor.name: plan.tensor.columns
        for plan in plans
        if plan.method is not None and plan.method.calibration != "none"
    }
    if calibration is not None and not found:
        raise UsageError(f"no method here uses a calibration text such as {os.fspath(calibration.text)}")
    return found


@contextlib.contextmanager
def gathered_moments(
    finetuned: Checkpoint,
    plans: Sequence[Plan],
    calibration: Calibration | None,
    out: Path | None,
    progress: Progress | None,
    packing: Packing | None = None,
) -> Iterator[MomentFolder | None]:
    """Gather moments and have them while a file is made; without a calibration, None.

    The folder outlives an interrupt, and is removed at success and by every other error.

    Args:
        finetuned: the fine-tune.
        plans: of all tensors.
        calibration: the text.
        out: the output, beside which the folder lies; None for a temporary folder.
        progress: called with no name and the bytes that a step of the fine-tune's run counts for: all of its own.
        packing: where the calibration is sequential; the folder is then ``.NAME.sequential``.

    Raises:
        UsageError, NonFiniteError, StorageError, InvalidFileError: as :func:`calibrated_names` and
            :meth:`MomentFolder.gather` raise them.
    """
    wanted = calibrated_names(plans, calibration)
    if calibration is None:
        yield None
        return
    files = [[os.fsencode(path), size, time] for path, size, time in finetuned.identity()]
    described = calibration.describe()
    parts: dict[str, Any] = {"calibration": described, "files": files, "version": __version__, "wanted": wanted}
    if packing is not None:
        parts["packing"] = packing.job
    suffix = "calibration" if packing is None else "sequential"
    folder = MomentFolder(out, described, blake3(canonical.encode(parts)).digest(), suffix)
    on_stage = None if packing is None else folder.stages(plans, packing)
    told = 0

    def step(done: int, total: int) -> None:
        nonlocal told
        if progress:
            progress("", finetuned.nbytes * done // total - told)
        told = finetuned.nbytes * done // total

    try:
        folder.gather(finetuned.path, wanted, calibration, step, on_stage)
        yield folder
    except KeyboardInterrupt as interrupt:
        kept = "; the same command goes on where it stopped" if folder.keep() else ""
        raise KeyboardInterrupt(f"interrupted{kept}") from interrupt
    except BaseException:
        folder.remove()
        raise
    folder.remove()
