"""``deltafmt.export_lora``: a delta of ``lowrank`` terms to a LoRA adapter as PEFT saves it.

The folder appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from deltafmt.checkpoint.adapter import PREFIX, WEIGHTS_FILE, is_embedding
from deltafmt.checkpoint.adapter_config import CONFIG_FILE
from deltafmt.checkpoint.folder import natural_key
from deltafmt.checkpoint.folder_writer import CheckpointWriter, TensorSpec, check_output_folder
from deltafmt.checkpoint.renames import Renames
from deltafmt.checkpoint.weight_names import WeightNames, bounded
from deltafmt.delta import DeltaFile
from deltafmt.errors import Remedy, UsageError
from deltafmt.format import constants as c
from deltafmt.index.entries import TensorEntry
from deltafmt.pipeline.bases import BaseTensors, open_base
from deltafmt.pipeline.import_lora import METADATA_BASE, METADATA_TASK
from deltafmt.pipeline.lora_entries import entries_in_base
from deltafmt.pipeline.lora_modules import LoraModule, lora_modules
from deltafmt.pipeline.outputs import refuse_input_folder
from deltafmt.pipeline.verify import check_base
from deltafmt.pipeline.workers import thread_count
from deltafmt.terms.buffers import raw_bytes

DEFAULT_TASK: Final = "CAUSAL_LM"

# A model's configuration in an adapter's folder would say that the folder holds a model.
_NOT_FOR_ADAPTERS: Final = frozenset(("config.json", "generation_config.json", CONFIG_FILE))


@dataclass(slots=True)
class ExportResult:
    """What an export did.

    Attributes:
        path: the folder.
        nbytes: bytes of the tensors written.
        rank: the largest rank.
        modules: number of modules that have factors.
        saved: names of modules that are stored whole.
        files: names of the attached files that were written.
        tied: the module of a changed embedding that the base ties to its output head; empty if there is none. PEFT
            changes the embedding alone, so it loads another model than :func:`deltafmt.unpack` writes.
    """

    path: Path
    nbytes: int = 0
    rank: int = 0
    modules: int = 0
    saved: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    tied: str = ""


def export_lora(
    delta: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    task_type: str | None = None,
    rename: Sequence[str] = (),
    strip_prefix: Sequence[str] = (),
    force: bool = False,
) -> ExportResult:
    """Write a delta whose terms are all ``lowrank`` as a LoRA adapter with a scaling of 1.

    Several terms of one tensor become one pair of factors, joined along the rank. The module of a tensor that the delta
    replaces becomes one of ``modules_to_save``.

    Args:
        delta: the delta file.
        out: the folder to make.
        base: the delta's base. The adapter then names it, and its configuration is used. It is not needed if the delta
            has a configuration attached.
        dtype: the dtype of the factors: ``BF16``, ``F16`` or ``F32``. If not given, the dtype in which all terms of a
            tensor are stored, or F32 for terms of codes; both are exact.
        task_type: PEFT's name of the task. If not given, the task of the adapter that was imported, or ``CAUSAL_LM``.
        rename: rules FROM=TO that say what a name that the file records is in this base. FROM is how the name begins,
            or a pattern with ``*``. Bases whose names differ in a known way are recognized without rules.
        strip_prefix: beginnings of names that do not count, on either side.
        force: True to replace ``out`` if it is a folder that exists.

    Raises:
        UsageError: the output exists, or a tensor's delta is not low rank.
        NonFiniteError: a factor is not finite in ``dtype``.
        InvalidFileError: the delta is not valid.
        WrongBaseError: the base lacks a tensor, or has other bytes than those packed against.
        StorageError: reading or writing failed.
    """
    if dtype is not None and dtype not in c.DELTA_DTYPES:
        raise UsageError(f"dtype {dtype!r} is not one of {', '.join(c.DELTA_DTYPES)}")
    path, renames = Path(out), Renames.parse(rename, strip_prefix)
    check_output_folder(path, force=force)
    refuse_input_folder(path, [delta] if base is None else [delta, base])
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(DeltaFile(delta))
        named_entries = entries_in_base(opened.container.entries(), opened.container.name)
        entries = list(named_entries.values())
        named = opened.metadata.get(METADATA_BASE)
        config = _attached_config(opened)
        tensors = None
        components = [
            component
            for component in WeightNames.from_metadata(opened.metadata, opened.container.name).components
            if component
        ]
        if components:
            raise UsageError(
                f"{delta} is of a model with weights in {bounded(components)}, and an adapter is of one model"
            )
        checkpoint = None if base is None else stack.enter_context(open_base(base, opened.metadata))
        if checkpoint is not None:
            tensors = BaseTensors(checkpoint, entries, opened.metadata, renames)
            check_base(tensors, entries, thread_count(None))
            named, config = str(checkpoint.path), config or checkpoint.config()
        exporter = _Exporter(opened, tensors, named_entries, lora_modules(opened, entries, config, dtype))
        task = task_type or opened.metadata.get(METADATA_TASK) or DEFAULT_TASK
        result = exporter.run(path, exporter.config(named, task), force)
        result.tied = _tied_embedding(entries, config)
        return result


class _Exporter:
    """One run of an export."""

    def __init__(
        self, delta: DeltaFile, base: BaseTensors | None, entries: dict[str, TensorEntry], modules: list[LoraModule]
    ) -> None:
        self._delta = delta
        self._base = base
        self._entries = entries
        self._modules = modules
        self._whole: dict[str, TensorEntry] = {}
        self._bias = "none"
        owners: dict[str, list[TensorEntry]] = {}
        for entry in entries.values():
            owners.setdefault(entry.name.rpartition(".")[0], []).append(entry)
        with_factors = {module.name for module in modules}
        changed = {module: parts for module, parts in owners.items() if any(part.action == "replace" for part in parts)}
        self._saved = [module for module, parts in changed.items() if not self._is_biased(module, parts, with_factors)]

    def _is_biased(self, module: str, parts: list[TensorEntry], with_factors: set[str]) -> bool:
        """Note a module's tensors that are stored whole; return True if that is a bias alone.

        PEFT names modules that are stored whole in ``modules_to_save``, and biases alone in ``bias``.

        Raises:
            UsageError: a replaced tensor belongs to no module or to one with factors, or the module has another tensor
                that only the base holds.
        """
        replaced = [part for part in parts if part.action == "replace"]
        where = f'{self._delta.container.name}: tensor "{replaced[0].name}"'
        if not module:
            raise UsageError(f"{where} is replaced and belongs to no module")
        only_bias = [part.name for part in replaced] == [f"{module}.bias"]
        if module in with_factors:
            if not only_bias:
                raise UsageError(f"{where} is replaced, and its module has factors")
            # PEFT keeps the own parameters of a module with factors one level down.
            self._whole[f"{PREFIX}{module}.base_layer.bias"] = replaced[0]
            self._bias = "lora_only" if self._bias == "none" else self._bias
            return True
        if only_bias and len(parts) > 1:
            self._whole[f"{PREFIX}{module}.bias"] = replaced[0]
            self._bias = "all"
            return True
        for part in parts:
            if part.action != "replace" and self._base is None:
                text = f"{where} is replaced, but {part.name} of the same module is the base's, and both must be stored"
                raise UsageError(text, Remedy("base", None))
            self._whole[f"{PREFIX}{part.name}"] = part
        return False

    def run(self, path: Path, config: dict[str, Any], force: bool) -> ExportResult:
        """Write every tensor, the configuration and the attached files, and put the folder in its place."""
        specs = [spec for module in self._modules for spec in module.specs()]
        specs += [TensorSpec(name, entry.dtype, entry.shape) for name, entry in self._whole.items()]
        nbytes = sum(spec.nbytes for spec in specs)
        result = ExportResult(path, nbytes, config["r"], len(self._modules), self._saved)
        names = WeightNames({"": WEIGHTS_FILE})
        writer = CheckpointWriter(path, specs, max_shard_bytes=max(nbytes, 1), names=names, force=force)
        try:
            for module in self._modules:
                for spec, factor in zip(module.specs(), module.factors(self._delta), strict=True):
                    writer.write(spec.name, 0, raw_bytes(factor))
            for name, entry in self._whole.items():
                self._write_whole(writer, name, entry)
            writer.add_file(CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())
            for name in self._delta.container.attachments:
                if name not in _NOT_FOR_ADAPTERS:
                    writer.add_file(name, self._delta.attachment(name))
                    result.files.append(name)
            writer.commit()
        except BaseException:
            writer.abandon()
            raise
        return result

    def _write_whole(self, writer: CheckpointWriter, name: str, entry: TensorEntry) -> None:
        """Write a tensor that the delta replaces, or one of the base's."""
        if entry.data is not None:
            writer.write(name, 0, self._delta.container.buffer(entry.data))
            return
        tensor = None if self._base is None else self._base.find(self._aliased(entry))
        assert tensor is not None
        assert self._base is not None
        if entry.base is not None and tensor.fingerprint() != entry.base.digest:
            raise self._base.differs(entry.name)
        offset = 0
        for piece in tensor.pieces():
            writer.write(name, offset, piece)
            offset += len(piece)

    def _aliased(self, entry: TensorEntry) -> TensorEntry:
        """Return the entry that an alias stands for; other entries as they are."""
        return entry if entry.target is None else self._entries[entry.target]

    def config(self, base: str | None, task_type: str) -> dict[str, Any]:
        """Return the configuration: a scaling of 1 for every rank, so that B A is the delta."""
        ranks = {module.name: module.rank for module in self._modules}
        largest = max(ranks.values())
        pattern: dict[str, int] = {}
        if min(ranks.values()) < largest:
            # PEFT takes the first key that a module's name ends with. Long names come first, and all are there.
            pattern = {name: ranks[name] for name in sorted(ranks, key=lambda name: (-len(name), natural_key(name)))}
        return {
            "peft_type": "LORA",
            "task_type": task_type,
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
            "fan_in_fan_out": any(module.conv1d for module in self._modules),
            "bias": self._bias,
            "target_modules": list(ranks),
            "modules_to_save": self._saved or None,
        }


def _tied_embedding(entries: list[TensorEntry], config: Mapping[str, Any]) -> str:
    """Return the module of a changed embedding of tokens whose base ties it to the head, or an empty text."""
    if config.get("tie_word_embeddings") is not True:
        return ""
    for entry in entries:
        module = entry.name.rpartition(".")[0]
        changed = entry.action in ("add", "replace")
        if changed and is_embedding(module) and entry.shape[:1] == (config.get("vocab_size"),):
            return module
    return ""


def _attached_config(delta: DeltaFile) -> dict[str, Any]:
    try:
        config = json.loads(delta.attachment("config.json"))
    except (KeyError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}
