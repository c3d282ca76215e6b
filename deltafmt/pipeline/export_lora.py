"""``deltafmt.export_lora``: a delta of ``lowrank`` terms to a LoRA adapter as PEFT saves it.

The folder appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from deltafmt.checkpoint.adapter import PREFIX, WEIGHTS_FILE
from deltafmt.checkpoint.adapter_config import CONFIG_FILE
from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.checkpoint.folder_writer import CheckpointWriter, TensorSpec, check_output_folder
from deltafmt.checkpoint.parameter_names import Piece
from deltafmt.checkpoint.renames import Renames
from deltafmt.checkpoint.weight_names import WeightNames, bounded
from deltafmt.delta import DeltaFile, refuse_child, refuse_exact
from deltafmt.errors import Remedy, UsageError
from deltafmt.format import constants as c
from deltafmt.format.choices import check_choice
from deltafmt.format.limits import DEFAULT_LIMITS, Limits
from deltafmt.index.file_names import is_source
from deltafmt.pipeline.bases import BaseTensors, open_base
from deltafmt.pipeline.finetuned import finetuned_pieces, needs_base
from deltafmt.pipeline.import_lora import METADATA_BASE, METADATA_TASK
from deltafmt.pipeline.lora_entries import EntriesInBase
from deltafmt.pipeline.lora_export_plan import ExportPlan, ExportPlanner
from deltafmt.pipeline.lora_for_vllm import VLLM, check_rank, costs, max_lora_rank
from deltafmt.pipeline.lora_modules import LoraModule
from deltafmt.pipeline.lora_peft import also_selected, default_task, rank_patterns
from deltafmt.pipeline.model_layout import ModelLayout, model_layout
from deltafmt.pipeline.outputs import refuse_input_folder
from deltafmt.pipeline.verify import check_base
from deltafmt.pipeline.workers import thread_count
from deltafmt.terms.buffers import raw_bytes

# Bytes of memory for each element of a factor: decoded, joined, transposed, rounded and compared.
FACTOR_BYTES: Final = 24
# A model's configuration in an adapter's folder would say that the folder holds a model.
_NOT_FOR_ADAPTERS: Final = frozenset(("config.json", "generation_config.json", CONFIG_FILE))


@dataclass(slots=True)
class ExportResult:
    """What an export did, or would do.

    Attributes:
        path: the folder.
        nbytes: bytes of the adapter's tensors.
        factor_bytes: the bytes among them that are factors; the others are tensors that are stored whole.
        rank: the largest rank.
        modules: number of modules and parameters that have factors.
        parameters: the names of parameters that are targets by themselves (``target_parameters``).
        saved: names of modules that are stored whole.
        files: names of the attached files that were written.
        task: PEFT's name of the task; None if it has none.
        warnings: what the user has to know.
        tied: the module of a changed embedding that the base ties to others; empty if there is none. It is stored
            whole, and so are those that it is tied to.
        left_out: of an adapter for vLLM, the norms and biases that change and are not in it, with the share of the
            base's values that the change amounts to (by their norms); None for each if no base is given.
        max_lora_rank: of an adapter for vLLM, the option with which it is loaded.
    """

    path: Path
    nbytes: int = 0
    factor_bytes: int = 0
    rank: int = 0
    modules: int = 0
    parameters: list[str] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    task: str | None = None
    warnings: list[str] = field(default_factory=list)
    tied: str = ""
    left_out: dict[str, float | None] = field(default_factory=dict)
    max_lora_rank: int | None = None


def export_lora(
    delta: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    task_type: str | None = None,
    rename: Sequence[str] = (),
    strip_prefix: Sequence[str] = (),
    reader: str | None = None,
    force: bool = False,
    plan: bool = False,
    limits: Limits = DEFAULT_LIMITS,
) -> ExportResult:
    """Write a delta whose terms are all ``lowrank`` as a LoRA adapter with a scaling of 1.

    Several terms of one tensor become one pair of factors, joined along the rank. The module of a tensor that the delta
    replaces becomes one of ``modules_to_save``. An embedding that changes, and that the base ties to its head, becomes
    one too, and so does the head: PEFT then computes the same as it is loaded and as it is merged. Names are those of
    the model that transformers makes of the base, where transformers is installed.

    Args:
        delta: the delta file.
        out: the folder to make.
        base: the delta's base. The adapter then names it, and its configuration is used. It is not needed if the delta
            has a configuration attached and stores every tensor that is written whole.
        dtype: the dtype of the factors: ``BF16``, ``F16`` or ``F32``. If not given, the dtype in which all terms of a
            tensor are stored, or F32 for terms of codes; both are exact.
        task_type: PEFT's name of the task. If not given, the task of the adapter that was imported, or that of the
            base's architecture.
        rename: rules FROM=TO that say what a name that the file records is in this base. FROM is how the name begins,
            or a pattern with ``*``. Bases whose names differ in a known way are recognized without rules.
        strip_prefix: beginnings of names that do not count, on either side.
        reader: ``vllm`` for an adapter that vLLM loads: it stores no module whole, norms and biases are left out, and
            a head that is tied to the embedding has factors of its own. If not given, the adapter is for PEFT.
        force: True to replace ``out`` if it is a folder that exists.
        plan: True to find out what would be written, and to write nothing.
        limits: how much memory, work and output the file may ask for.

    Raises:
        UsageError: the output exists, or a tensor's delta is not low rank, or its base has another layout.
        NonFiniteError: a factor is not finite in ``dtype``.
        InvalidFileError: the delta is not valid.
        WrongBaseError: the base lacks a tensor, or has other bytes than those packed against.
        StorageError: reading or writing failed.
    """
    if dtype is not None:
        check_choice("dtype", dtype, c.DELTA_DTYPES)
    if reader not in (None, VLLM):
        raise UsageError(f"reader {reader!r} is not {VLLM}")
    path, renames = Path(out), Renames.parse(rename, strip_prefix)
    if not plan:
        check_output_folder(path, force=force)
    refuse_input_folder(path, [delta] if base is None else [delta, base])
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(DeltaFile(delta, limits=limits))
        _check_one_model(opened)
        refuse_child(opened.container)
        refuse_exact(opened.container.name, opened.container.entries())
        named = opened.metadata.get(METADATA_BASE)
        config = _attached_config(opened)
        tensors = None
        checkpoint = None if base is None else stack.enter_context(open_base(base, opened.container))
        if checkpoint is not None:
            listed = list(opened.container.entries())
            tensors = BaseTensors(checkpoint, listed, opened.container, renames)
            check_base(tensors, listed, thread_count(None))
            # PEFT loads the base, so what it ties counts, not what the fine-tune ties.
            named, config = str(checkpoint.path), checkpoint.config() or config
        entries = EntriesInBase(opened, tensors)
        layout = model_layout(config, _shapes(checkpoint, entries))
        task = task_type or opened.metadata.get(METADATA_TASK) or default_task(layout)
        planned = ExportPlanner(entries, layout, config, task, dtype, factors_only=reader == VLLM).plan()
        base_bytes = 0 if checkpoint is None else checkpoint.nbytes
        exporter = _Exporter(entries, layout, planned, task, base_bytes)
        if reader == VLLM:
            check_rank(entries.name, exporter.rank)
        result = exporter.run(path, named, force=force, plan=plan)
        if reader == VLLM:
            result.max_lora_rank = max_lora_rank(result.rank)
            result.left_out = costs(planned.left_out, entries, checkpoint)
        if not layout.known and config.get("architectures"):
            result.warnings.append(
                "transformers, which knows the names of the base's model, is missing or does not know the model: names "
                "are the tensors' own, and PEFT says if it misses any"
            )
        return result


def _check_one_model(delta: DeltaFile) -> None:
    """Refuse a delta of a model with several folders of weights, such as a pipeline of diffusers.

    Raises:
        UsageError: names the folders.
    """
    names = WeightNames.from_metadata(delta.metadata, delta.container.name)
    components = [component for component in names.components if component]
    if components:
        where = delta.container.name
        raise UsageError(f"{where} is of a model with weights in {bounded(components)}, and an adapter is of one model")


class _Exporter:
    """One run of an export."""

    def __init__(
        self, entries: EntriesInBase, layout: ModelLayout, plan: ExportPlan, task: str | None, base_bytes: int
    ) -> None:
        self._entries = entries
        self._delta = delta = entries.delta
        self._layout = layout
        self._plan = plan
        self._task = task
        self._base_bytes = base_bytes
        self._ranks = {module.parameter: module.rank(delta) for module in plan.modules}
        # The parameters of a module that are targets by themselves, in the order in which PEFT wraps them.
        self._wrapped: dict[str, list[str]] = {}
        own = {module.parameter for module in plan.modules if module.own}
        order = {name: place for place, name in enumerate(layout.pieces)}
        for name in sorted(own, key=lambda name: order[name]):
            self._wrapped.setdefault(name.rpartition(".")[0], []).append(name)
        self._whole = {self._key(name): (name, pieces) for name, pieces in plan.whole.items()}
        for name, pieces in plan.biases.items():
            self._whole[self._key(name, inside=True)] = (name, pieces)
        self._check_sources()

    def _check_sources(self) -> None:
        """Refuse to write a tensor whole whose values are partly the base's, if no base is given."""
        for name, pieces in self._whole.values():
            for piece in pieces:
                if not self._entries.has_base and needs_base(self._entries.resolve(piece.tensor)):
                    raise UsageError(
                        f'{self._delta.container.name}: "{name}" is written whole, because its module is replaced in '
                        f'part, or tied, and tensor "{piece.tensor}" is the base\'s or a delta of it',
                        Remedy("base", None),
                    )

    def _key(self, name: str, *, inside: bool = False) -> str:
        """Return PEFT's name of a tensor: with the layers that PEFT puts into modules on the way to it.

        Args:
            name: a parameter's name in the model.
            inside: True for a parameter of a module that has factors of its own.
        """
        parts, found = name.split("."), PREFIX.removesuffix(".")
        with_factors = {module.name for module in self._plan.modules if not module.own} if inside else set()
        for count, part in enumerate(parts, 1):
            found += f".{part}"
            module = ".".join(parts[:count])
            layers = len(self._wrapped.get(module, ())) + (module in with_factors)
            if count < len(parts):
                found += ".base_layer" * layers
        return found

    def _specs(self, module: LoraModule) -> tuple[TensorSpec, TensorSpec]:
        """Return A and B as PEFT names them."""
        of_a, of_b = module.shapes(self._ranks[module.parameter])
        start = self._key(f"{module.name}.x").removesuffix(".x")
        if module.own:
            # The first parameter's factors are the innermost.
            siblings = self._wrapped[module.name]
            start = start.removesuffix(".base_layer" * (1 + siblings.index(module.parameter)))
        start += f".lora_{'embedding_' if module.embedding else ''}"
        end = "" if module.embedding else ".weight"
        return TensorSpec(f"{start}A{end}", module.dtype, of_a), TensorSpec(f"{start}B{end}", module.dtype, of_b)

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(self._ranks.values())

    def run(self, path: Path, base: str | None, *, force: bool, plan: bool) -> ExportResult:
        """Write every tensor, the configuration and the attached files, and put the folder in its place."""
        modules = self._plan.modules
        specs = [spec for module in modules for spec in self._specs(module)]
        factors = sum(spec.nbytes for spec in specs)
        specs += [self._whole_spec(key, name, pieces) for key, (name, pieces) in self._whole.items()]
        nbytes = sum(spec.nbytes for spec in specs)
        self._check_limits(nbytes)
        result = ExportResult(
            path,
            nbytes,
            factors,
            self.rank,
            len(modules),
            [module.parameter for module in modules if module.own],
            self._plan.saved,
            task=self._task,
            tied=self._plan.tied,
        )
        attached = [name for name in self._delta.container.attachments if not is_source(name)]
        files = [name for name in attached if name not in _NOT_FOR_ADAPTERS]
        result.files = files
        config = self._config(base)
        if plan:
            return result
        weights = WeightNames({"": WEIGHTS_FILE})
        writer = CheckpointWriter(path, specs, max_shard_bytes=max(nbytes, 1), names=weights, force=force)
        try:
            for module in modules:
                decoded = module.factors(self._delta, self._ranks[module.parameter])
                for spec, factor in zip(self._specs(module), decoded, strict=True):
                    writer.write(spec.name, 0, raw_bytes(factor))
            for key, (_, pieces) in self._whole.items():
                self._write_whole(writer, key, pieces)
            writer.add_file(CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())
            for name in files:
                writer.add_file(name, self._delta.attachment(name))
            writer.commit()
        except BaseException:
            writer.abandon()
            raise
        return result

    def _check_limits(self, nbytes: int) -> None:
        """Refuse a delta that takes more output, work or memory than it may."""
        delta, base_bytes = self._delta, self._base_bytes
        name, size, limits = delta.container.name, delta.container.size, delta.container.limits
        limits.check_output(nbytes, size, base_bytes, f"{name}: the adapter takes")
        whole = [self._entries.resolve(piece.tensor) for _, pieces in self._whole.values() for piece in pieces]
        delta.check_work(whole, base_bytes)
        for module in self._plan.modules:
            elements = sum(c.element_count(shape) for shape in module.shapes(self._ranks[module.parameter]))
            what = f'{name}: the factors of "{module.parameter}" take'
            limits.check_memory(FACTOR_BYTES * elements, size, what)

    def _whole_spec(self, key: str, name: str, pieces: tuple[Piece, ...]) -> TensorSpec:
        entry = self._entries.resolve(pieces[0].tensor)
        alone = len(pieces) == 1 and pieces[0].expert is None
        return TensorSpec(key, entry.dtype, entry.shape if alone else self._layout.shapes[name])

    def _write_whole(self, writer: CheckpointWriter, key: str, pieces: tuple[Piece, ...]) -> None:
        """Write a tensor of the fine-tune, or several that make up one parameter."""
        heights = {piece: self._entries.resolve(piece.tensor).shape[0] for piece in pieces if len(pieces) > 1}
        rows = max((piece.start + height for piece, height in heights.items()), default=0)
        for piece in pieces:
            entry = self._entries.resolve(piece.tensor)
            offset = ((piece.expert or 0) * rows + piece.start) * c.byte_count(entry.dtype, entry.shape[1:])
            for data in finetuned_pieces(self._entries, piece.tensor):
                writer.write(key, offset, memoryview(data))
                offset += len(data)

    def _config(self, base: str | None) -> dict[str, Any]:
        """Return the configuration: a scaling of 1 for every rank, so that B A is the delta."""
        modules = self._plan.modules
        ranks = {module.target: self._ranks[module.parameter] for module in modules}
        largest = max(ranks.values())
        pattern = rank_patterns(ranks)
        targets = [module.name for module in modules if not module.own]
        own = [module.parameter for module in modules if module.own]
        crossed = any(module.crossed and not module.own for module in modules)
        if crossed and own:
            raise UsageError(
                f'{self._delta.container.name}: PEFT gives no factors to "{own[0]}" in a model with transposed '
                "modules; pack that tensor whole"
            )
        biased = {self._key(name, inside=True) for name in self._plan.biases}
        bias = "none" if not biased else "lora_only" if all(".base_layer.bias" in key for key in biased) else "all"
        config: dict[str, Any] = {
            "peft_type": "LORA",
            "task_type": self._task,
            "base_model_name_or_path": base,
            "inference_mode": True,
            "r": largest,
            "lora_alpha": largest,
            "rank_pattern": pattern,
            "alpha_pattern": pattern,
            "lora_dropout": 0.0,
            "use_rslora": False,
            "use_dora": False,
            "init_lora_weights": True,
            "fan_in_fan_out": crossed,
            "bias": bias,
            "target_modules": targets,
            "modules_to_save": self._plan.saved or None,
        }
        if own:
            config["target_parameters"] = own
        if self._plan.tying:
            config["ensure_weight_tying"] = True
        also = also_selected(targets, self._layout.kinds)
        if also:
            config["exclude_modules"] = also
        return config


def _shapes(base: Checkpoint | None, entries: EntriesInBase) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the base's tensors, and of those that the fine-tune adds to them."""
    shapes = {} if base is None else {name: tensor.shape for name, tensor in base.tensors.items()}
    for entry in entries.entries.values():
        if entry.target is None:
            shapes.setdefault(entry.name, entry.shape if entry.base is None else entry.base.shape)
        elif base is None:
            shapes.setdefault(entry.name, entry.shape)
    return shapes


def _attached_config(delta: DeltaFile) -> dict[str, Any]:
    try:
        config = json.loads(delta.attachment("config.json"))
    except (KeyError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}
