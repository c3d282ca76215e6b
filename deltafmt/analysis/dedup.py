"""What several checkpoints have in common: equal files, equal tensors, and the bases that would save most."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from deltafmt.analysis.base_choice import choose_bases
from deltafmt.analysis.copies import EqualFiles, EqualTensors, TensorDigests, equal_files
from deltafmt.analysis.named_bases import named_bases
from deltafmt.analysis.savings import HELPS, Saving, estimate
from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.errors import DeltafmtError, InvalidFileError, StorageError, UsageError, WrongBaseError
from deltafmt.format.choices import check_list
from deltafmt.methods.exact import Exact
from deltafmt.output import storage_error
from deltafmt.pipeline.many_outputs import own_name
from deltafmt.pipeline.pack_options import PackOptions
from deltafmt.pipeline.pairing import PairOptions, pair_up
from deltafmt.pipeline.plan import Plan, predicting
from deltafmt.pipeline.workers import thread_count, worker_pool

# Windows that are coded to compare two checkpoints, and to estimate what the chosen base saves.
FIRST_WINDOWS: Final = 8
WINDOWS: Final = 64

# Called with what is done, and how much of how much is done.
Steps = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class FineTune:
    """A checkpoint that a base would make smaller.

    Attributes:
        name: the name that its delta file would have, unlike those of the base's other fine-tunes.
        path: the checkpoint.
        saving: what the base saves.
    """

    name: str
    path: Path
    saving: Saving


@dataclass(frozen=True, slots=True)
class Proposal:
    """A base to keep whole, and the fine-tunes to pack against it.

    Attributes:
        base: the checkpoint to keep.
        finetunes: the others, in the order given.
        chosen_by: why this is the base: ``given`` by the caller, ``model cards`` of fine-tunes name it, or ``bytes``:
            it is the checkpoint that saves most of the others. What A saves of B is about what B saves of A, so bytes
            cannot tell a base from a fine-tune that is as near to the others.
    """

    base: Path
    finetunes: tuple[FineTune, ...]
    chosen_by: str = "bytes"

    @property
    def saved(self) -> int:
        """Bytes saved, estimated."""
        return sum(each.saving.saved for each in self.finetunes)

    @property
    def error(self) -> int:
        """Two standard errors of that. The errors of the fine-tunes are added up, as if they all had one sign."""
        return sum(each.saving.error for each in self.finetunes)


@dataclass(slots=True)
class DedupResult:
    """What several checkpoints have in common.

    Attributes:
        paths: the checkpoints that were compared.
        weight_bytes: bytes of the weight files of each.
        files: files with copies.
        tensors: tensors with copies. The numbers in their places are those of ``paths``.
        proposals: the bases that would save most, those that save most first.
        alone: checkpoints that no base makes smaller.
        failed: why a checkpoint could not be compared, by its path.
    """

    paths: list[Path] = field(default_factory=list)
    weight_bytes: list[int] = field(default_factory=list)
    files: list[EqualFiles] = field(default_factory=list)
    tensors: list[EqualTensors] = field(default_factory=list)
    proposals: list[Proposal] = field(default_factory=list)
    alone: list[Path] = field(default_factory=list)
    failed: dict[Path, DeltafmtError] = field(default_factory=dict)


def dedup(
    folders: Sequence[str | os.PathLike[str]],
    *,
    base: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    progress: Steps | None = None,
) -> DedupResult:
    """Compare checkpoints: which files and tensors are equal, and what keeping one as a base would save of the others.

    Nothing is written. Tensors are hashed with BLAKE3 where another has the same dtype, shape and first bytes; memory
    holds digests, and some megabytes for each thread. What a base would save is estimated from windows of the tensors,
    coded as ``pack`` with the method Exact codes them; each figure has its error.

    Args:
        folders: checkpoint folders or ``.safetensors`` files, or folders of such folders.
        base: the checkpoint to take as the base. If not given, those that model cards name as the base of others are
            taken (``base_model``), and then the ones that save most.
        threads: worker threads; one for each processor if not given.
        progress: called with what is done, and with how much of how much is done.

    Returns:
        What was found. A checkpoint that cannot be read is in ``failed``, and the others are compared.

    Raises:
        UsageError: fewer than two checkpoints are given, or ``base`` cannot be read as one.
        StorageError: a file cannot be read.
    """
    steps = progress or (lambda *_: None)
    check_list("folders", folders)
    paths = _expanded([*([base] if base is not None else []), *folders])
    if len(paths) < 2:
        raise UsageError("dedup compares checkpoints, and fewer than two are given")
    result = DedupResult()
    workers = thread_count(threads)
    with contextlib.ExitStack() as stack, worker_pool(workers, "dedup") as pool:
        opened: list[Checkpoint] = []
        for path in paths:
            try:
                opened.append(stack.enter_context(Checkpoint(path)))
            except DeltafmtError as error:
                if base is not None and path == paths[0]:
                    raise
                result.failed[path] = error
        if len(opened) < 2:
            raise next(iter(result.failed.values()))
        result.paths = [checkpoint.path for checkpoint in opened]
        result.weight_bytes = [checkpoint.file_bytes for checkpoint in opened]
        digests = TensorDigests(opened, pool, lambda done, total: steps("hashing tensors", done, total))
        result.tensors = digests.groups()
        result.files = equal_files(opened, digests, pool)
        run = _Comparison(opened, digests, pool, steps)
        named = {} if base is not None else named_bases(result.paths)
        chosen = {0: list(range(1, len(opened)))} if base is not None else run.choose(named)
        for number, members in chosen.items():
            proposal = run.proposal(number, members)
            if proposal.finetunes:
                reason = (
                    "given"
                    if base is not None
                    else "model cards"
                    if any(named.get(each) == number for each in members)
                    else "bytes"
                )
                result.proposals.append(replace(proposal, chosen_by=reason))
    result.proposals.sort(key=lambda proposal: -proposal.saved)
    placed = {path for each in result.proposals for path in (each.base, *(tune.path for tune in each.finetunes))}
    result.alone = [path for path in result.paths if path not in placed]
    return result


class _Comparison:
    """Checkpoints that are compared with one another."""

    def __init__(
        self, checkpoints: Sequence[Checkpoint], digests: TensorDigests, pool: ThreadPoolExecutor, steps: Steps
    ) -> None:
        self._checkpoints = checkpoints
        self._digests = digests
        self._pool = pool
        self._steps = steps

    def choose(self, named: Mapping[int, int]) -> dict[int, list[int]]:
        """Return the fine-tunes of each base that is worth keeping, by the checkpoints' numbers.

        Each pair is compared one way round: what A saves of B, as a share, is about what B saves of A.

        Args:
            named: the base that a checkpoint's model card names, both by their numbers.
        """
        count, gains = len(self._checkpoints), {}
        total, done = count * (count - 1) // 2, 0
        for one in range(count):
            for other in range(one + 1, count):
                saving = self._first_look(one, other)
                if saving is not None and saving.helps:
                    share = saving.saved / saving.whole
                    gains[one, other] = saving.saved
                    gains[other, one] = int(share * self._checkpoints[one].file_bytes)
                done += 1
                self._steps("comparing checkpoints", done, total)
        return choose_bases(count, gains, named)

    def _first_look(self, base: int, other: int) -> Saving | None:
        """Estimate what a base saves from few windows; None if the two do not belong together."""
        before, after = self._checkpoints[base], self._checkpoints[other]
        # Whether names belong together is asked only of pairs whose shapes may: the answer can take seconds.
        shapes = {tensor.shape for tensor in before.tensors.values()}
        if sum(each.nbytes for each in after.tensors.values() if each.shape in shapes) < HELPS * after.nbytes:
            return None
        try:
            pairing = pair_up(before, after, PairOptions())
        except (WrongBaseError, UsageError):
            return None
        plans = [
            Plan(tensor, predicting(tensor, None if name in pairing.unrelated else pairing.tensors.get(name)), Exact())
            for name, tensor in after.tensors.items()
        ]
        return estimate(plans, self._same(plans, base, other), after.file_bytes, FIRST_WINDOWS, self._pool)

    def _same(self, plans: Sequence[Plan], base: int, other: int) -> frozenset[str]:
        """Return the names of tensors that are equal to their base."""
        found = set()
        for plan in plans:
            parts = () if plan.base is None else plan.base.parts()
            alike = plan.base is not None and (plan.base.dtype, plan.base.shape) == (
                plan.tensor.dtype,
                plan.tensor.shape,
            )
            if alike and len(parts) == 1 and self._digests.equal((other, plan.tensor.name), (base, parts[0].name)):
                found.add(plan.tensor.name)
        return frozenset(found)

    def proposal(self, base: int, members: Sequence[int]) -> Proposal:
        """Return what a base saves of those of some checkpoints that it helps, planned as ``pack`` would plan them."""
        options = PackOptions.read(method=Exact())
        found = []
        names = unlike_names([self._checkpoints[other].path for other in members])
        for done, (other, name) in enumerate(zip(members, names, strict=True), 1):
            path = self._checkpoints[other].path
            with contextlib.suppress(WrongBaseError, InvalidFileError, UsageError):
                with options.open(self._checkpoints[base].path, path) as (before, after):
                    plans = options.job(before, after).plans
                    same = self._same(plans, base, other)
                    saving = estimate(plans, same, after.file_bytes, WINDOWS, self._pool)
                if saving.helps:
                    found.append(FineTune(name, path, saving))
            self._steps("estimating what a base saves", done, len(members))
        return Proposal(self._checkpoints[base].path, tuple(found))


def unlike_names(paths: Sequence[Path]) -> list[str]:
    """Return names of delta files for checkpoints, none of which is another's but for capitals.

    A name is that of the checkpoint's folder or file. Where two would be the same, folders above it stand in front.
    """
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    names, length = [own_name(path) for path in paths], 1
    while length < max(map(len, parts)):
        folded = [name.casefold() for name in names]
        twice = {name for name in folded if folded.count(name) > 1}
        if not twice:
            break
        length += 1
        for number, name in enumerate(folded):
            if name in twice:
                above = parts[number][max(1, len(parts[number]) - length) : -1]
                names[number] = "-".join((*above, own_name(paths[number])))
    return names


def _expanded(given: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Return checkpoints: those given, and those in folders that are none themselves; each once.

    Raises:
        StorageError: a path does not exist, or a folder cannot be read.
    """
    found: dict[tuple[int, int], Path] = {}
    for each in given:
        path = Path(each)
        for one in _checkpoints_in(path):
            stat = one.stat()
            found.setdefault((stat.st_dev, stat.st_ino), one)
    return list(found.values())


def _checkpoints_in(path: Path) -> Iterator[Path]:
    if not path.exists():
        raise StorageError(f"no such file or folder: {path}")
    if not path.is_dir() or _has_weights(path):
        yield path
        return
    try:
        inside = [child for child in sorted(path.iterdir()) if child.is_dir() and _has_weights(child)]
    except OSError as error:
        raise storage_error("cannot read", path, error) from error
    # A folder without any says what is wrong with it when it is opened.
    yield from inside or [path]


def _has_weights(folder: Path) -> bool:
    return (folder / "model_index.json").is_file() or any(folder.glob("*.safetensors"))
