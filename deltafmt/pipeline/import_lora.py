"""``deltafmt.import_lora``: a base and a LoRA adapter to a delta file.

The factors become ``lowrank`` terms. What no term of low rank says (DoRA, convolutions, a head that the base ties) is
stored whole, as PEFT computes it; so are the tensors that the adapter holds whole. Every other tensor is the base's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from deltafmt._version import __version__
from deltafmt.checkpoint.adapter import Adapter
from deltafmt.checkpoint.adapter_config import CONFIG_FILE
from deltafmt.checkpoint.base_name import base_name
from deltafmt.checkpoint.dequantized import DequantizedTensor
from deltafmt.checkpoint.folder import Checkpoint, natural_key, read_file
from deltafmt.checkpoint.folder_writer import TensorSpec
from deltafmt.checkpoint.fp8 import read_as_values
from deltafmt.checkpoint.name_changes import NameChange
from deltafmt.checkpoint.plain_config import leave_out_quantization
from deltafmt.checkpoint.renames import Renames
from deltafmt.checkpoint.safetensors_file import Tensor
from deltafmt.checkpoint.weight_names import METADATA_VARIANT
from deltafmt.container.partial import PartialFile
from deltafmt.container.writer import ContainerWriter
from deltafmt.errors import UsageError
from deltafmt.format import constants as c
from deltafmt.format.choices import check_choice
from deltafmt.index.entries import BaseRef, TensorEntry
from deltafmt.index.file_names import collisions
from deltafmt.index.sections import Attachment
from deltafmt.methods.base import Method
from deltafmt.pipeline.entry_writer import EntryWriter, TermBytes, packed_bytes
from deltafmt.pipeline.lora_factors import term_bytes, term_of
from deltafmt.pipeline.lora_merge import Change, Merged
from deltafmt.pipeline.lora_method import method_terms
from deltafmt.pipeline.lora_plan import LoraPlan, plan_lora
from deltafmt.pipeline.lora_rows import rows_term
from deltafmt.pipeline.lora_ties import TIES, without_ties
from deltafmt.pipeline.outputs import refuse_input_file
from deltafmt.pipeline.quantized_pairs import scaled_refs
from deltafmt.pipeline.read_as_values import Dequantized
from deltafmt.pipeline.workers import Progress, thread_count, worker_pool
from deltafmt.terms.buffers import blank
from deltafmt.terms.lowrank.codec import LowRankCodec
from deltafmt.terms.lowrank.layout import LowRankLayout

METADATA_BASE: Final = "lora.base_model_name_or_path"
METADATA_TASK: Final = "lora.task_type"

# These describe the model, so they come from the base even if the adapter's folder has files of the same name.
_CONFIGS: Final = frozenset(("config.json", "generation_config.json"))
# The base's card does not describe the fine-tune. A tokenizer is taken whole: all its files come from one folder.
_CARD: Final = "README.md"
_TOKENIZER: Final = frozenset(
    (
        *(
            "added_tokens.json",
            "chat_template.jinja",
            "merges.txt",
            "sentencepiece.bpe.model",
            "special_tokens_map.json",
        ),
        *("spiece.model", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt"),
    )
)


@dataclass(slots=True)
class ImportResult:
    """What an import did.

    Attributes:
        path: the file.
        size: bytes of the file.
        content_id: its content id, hexadecimal.
        adapter_bytes: bytes of the adapter's weight file.
        ranks: number of matrices with a low-rank delta, by rank.
        replaced: names of tensors that are stored whole: those that the adapter holds whole, with other bytes than the
            base, and those whose change is not of low rank.
        computed: the names among them whose values are the base's plus a change that is not of low rank.
        compressed: names of tensors whose change is not of low rank, and is compressed by a method.
        grown: names of tensors that have more rows than the base's.
        untied: names of tensors that the base ties to others, and this adapter does not.
        config: the keys of the attached ``config.json`` that have other values than the base's.
        warnings: what the user has to know, one sentence each.
        same: number of tensors that equal the base's.
        base_name: the base that the adapter names; empty if it names none.
        left_out: why files and folders of the adapter's folder do not travel, by name.
        names: what differs between the adapter's names and the base's.
        dequantized: how many tensors of the base are 8-bit floats that were read as the values that they mean.
    """

    path: Path
    size: int = 0
    content_id: str = ""
    adapter_bytes: int = 0
    ranks: dict[int, int] = field(default_factory=dict)
    replaced: list[str] = field(default_factory=list)
    computed: list[str] = field(default_factory=list)
    compressed: list[str] = field(default_factory=list)
    grown: list[str] = field(default_factory=list)
    untied: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    same: int = 0
    base_name: str = ""
    left_out: dict[str, str] = field(default_factory=dict)
    names: list[NameChange] = field(default_factory=list)
    dequantized: Dequantized = field(default_factory=Dequantized)


def import_lora(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rename: Sequence[str] = (),
    strip_prefix: Sequence[str] = (),
    variant: str | None = None,
    profile: str = "hot",
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    method: Method | None = None,
) -> ImportResult:
    """Write a LoRA adapter as a delta file, with the adapter's scaling multiplied into the factors.

    Args:
        base: the checkpoint that the adapter was trained on, a folder or a ``.safetensors`` file.
        adapter: a folder as PEFT saves it, with ``adapter_config.json`` and ``adapter_model.safetensors``.
        out: the file to make.
        rename: rules FROM=TO that say what a name of the adapter is in the base, as :func:`deltafmt.pack` takes them;
            the adapter's names count without ``base_model.model.``.
        strip_prefix: beginnings of names that do not count, on either side.
        variant: read the base's weights of this variant, such as ``fp16``, if it has it. 8-bit floats with scales are
            read as the BF16 values that they mean.
        profile: ``hot`` or ``cold``.
        force: True to replace ``out`` if it exists.
        threads: worker threads for the base's fingerprints; one for each processor if not given.
        progress: called with a base tensor's name and bytes as each is done.
        method: the method for tensors of the base whose change is not of low rank, such as DoRA's. If not given, they
            are stored whole.

    Raises:
        UsageError: the output exists or is an input, or the profile is unknown.
        NonFiniteError: a factor has NaN or infinity.
        InvalidFileError: an input is not valid.
        UnsupportedError: the adapter is of a kind that no delta is made of.
        WrongBaseError: the base lacks a tensor of the adapter, or has it in another shape.
        StorageError: reading or writing failed.
    """
    check_choice("profile", profile, c.PROFILES)
    path, renames = Path(out), Renames.parse(rename, strip_prefix)
    with Checkpoint(base, variant=variant, lenient=True) as checkpoint, Adapter(adapter) as opened:
        read_as_values(checkpoint, exact=False)
        if checkpoint.dequantized:
            leave_out_quantization(checkpoint)
        refuse_input_file(path, [checkpoint])
        if path.resolve().parent == opened.path.resolve() and path.exists():
            raise UsageError(f"the output {path} lies in the adapter's folder and is not replaced")
        plan = plan_lora(checkpoint, opened, renames)
        workers = thread_count(threads)
        result = ImportResult(
            path,
            adapter_bytes=opened.nbytes,
            base_name=opened.config.base_name,
            left_out=dict(opened.left_out),
            names=plan.names,
            untied=plan.untied,
            warnings=plan.warnings,
        )
        sink = PartialFile(path, None, force=force, features=c.FEATURE_SCALED if checkpoint.dequantized else 0)
        try:
            container = ContainerWriter(sink, profile, features=c.FEATURE_SCALED if checkpoint.dequantized else 0)
            _Importer(checkpoint, opened, plan, container, result, method).run(workers, progress)
            checkpoint.check_unchanged()
            opened.check_unchanged()
            sink.commit()
        except BaseException:
            sink.abandon()
            raise
        return result


class _Importer:
    """One run of an import."""

    def __init__(
        self,
        base: Checkpoint,
        adapter: Adapter,
        plan: LoraPlan,
        container: ContainerWriter,
        result: ImportResult,
        method: Method | None,
    ) -> None:
        self._base = base
        self._adapter = adapter
        self._plan = plan
        self._container = container
        self._writer = EntryWriter(container)
        self._result = result
        self._method = method

    def run(self, threads: int, progress: Progress | None) -> None:
        """Write every tensor, then the attachments, then finish the file."""
        base, plan, result = self._base.tensors, self._plan, self._result
        with worker_pool(threads, "import") as pool:
            needed = [name for name in base if self._needs_digest(name)]
            digests = zip(needed, pool.map(lambda name: base[name].fingerprint(), needed), strict=True)
            entries = []
            for name in sorted({**base, **plan.added}, key=natural_key):
                reference = None
                if self._needs_digest(name):
                    _, digest = next(digests)
                    reference = BaseRef(digest, base[name].dtype, base[name].shape)
                entries.append(self._entry(name, reference))
                self._container.boundary()
                if progress and name in base:
                    progress(name, base[name].nbytes)
        result.same = sum(entry.action == "same" for entry in entries)
        result.replaced = [entry.name for entry in entries if entry.action == "replace"]
        values = {name: tensor for name, tensor in base.items() if isinstance(tensor, DequantizedTensor)}
        scaled = scaled_refs(values, threads)
        result.dequantized = Dequantized(len(scaled))
        identity = self._container.finish(
            entries, attachments=self._attach(), metadata=self._metadata(), scaled=scaled or None
        )
        result.size, result.content_id = self._container.position, identity.hex()

    def _needs_digest(self, name: str) -> bool:
        """Tell whether a tensor may become its base, or its base plus a change."""
        change = self._plan.changes.get(name)
        whole = None if change is None else change.whole
        base = self._base.tensors.get(name)
        if base is None or name in self._plan.copies:
            return False
        return whole is None or (len(whole.shape) == 2 and whole.rows > base.rows)

    def _entry(self, name: str, reference: BaseRef | None) -> TensorEntry:
        """Write what the adapter makes of a tensor, and return its entry.

        Args:
            name: the tensor's name.
            reference: the identity of its base; None for a tensor that needs none.
        """
        plan = self._plan
        if name in plan.added:
            tensor, change = plan.added[name]
            return self._changed(name, tensor, change)
        base = self._base.tensors[name]
        if name in plan.copies:
            target = plan.changes[plan.copies[name]]
            changed = target.whole or target.own or base
            return self._writer.alias(TensorSpec(name, changed.dtype, changed.shape), plan.copies[name])
        found = plan.changes.get(name, Change())
        if reference is None:
            assert found.whole is not None
            return self._replaced(name, found.whole)
        if found == Change():
            return self._writer.same(base, reference)
        own = found.whole or found.own
        if found.whole is not None or found == Change(own=own):
            assert own is not None
            if not _begins_as(own, base):
                return self._replaced(name, own)
            self._result.grown.append(name)
            nothing = LowRankLayout(1, "BF16")
            blank_term = packed_bytes(LowRankCodec(nothing, *base.shape), blank(nothing, *base.shape))
            spec = TensorSpec(name, own.dtype, own.shape)
            return self._writer.add(spec, reference, [blank_term], own.pieces(base.nbytes))
        terms = self._terms(base, found)
        if not terms and self._method is not None:
            terms = method_terms(base, Merged(base, found), self._method)
            if terms:
                self._result.compressed.append(name)
                return self._writer.add(base, reference, terms)
        if not terms:
            return self._changed(name, base, found)
        if own is None:
            return self._writer.add(base, reference, terms)
        self._result.grown.append(name)
        spec = TensorSpec(name, own.dtype, own.shape)
        return self._writer.add(spec, reference, terms, Merged(base, found).pieces(base.shape[0]))

    def _terms(self, base: Tensor, change: Change) -> list[TermBytes]:
        """Return the terms that say a change; none if it is stored whole."""
        if change.rows is not None and change.own is None:
            term = rows_term(base, change.rows)
            return [] if term is None else [term]
        if not change.low_rank or (change.own is not None and not _begins_as(change.own, base)):
            return []
        rows = base.rows
        for product in change.products:
            # Factors of stacked experts are spread over all of their rows; the tensor itself may be smaller.
            stacked = product.experts > 1 and product.expert is None
            if stacked and term_bytes(product, rows, base.columns) >= base.nbytes:
                return []
        terms = []
        for product in change.products:
            layout, arrays = term_of(product, rows)
            codec = LowRankCodec(layout, rows, base.columns)
            packed = blank(layout, rows, base.columns)
            codec.encode(arrays, packed)
            self._result.ranks[layout.rank] = self._result.ranks.get(layout.rank, 0) + 1
            terms.append(packed_bytes(codec, packed))
        return terms

    def _changed(self, name: str, tensor: Tensor, change: Change) -> TensorEntry:
        """Return the entry of a tensor that is stored whole, with a change."""
        if change == Change():
            return self._replaced(name, tensor)
        merged = Merged(tensor, change)
        self._result.computed.append(name)
        return self._writer.replace(TensorSpec(name, merged.dtype, merged.shape), merged.pieces())

    def _replaced(self, name: str, tensor: Tensor) -> TensorEntry:
        """Return the entry of a tensor that the adapter holds whole, under the name that it has in the model."""
        return self._writer.replace(TensorSpec(name, tensor.dtype, tensor.shape), tensor.pieces())

    def _attach(self) -> dict[str, Attachment]:
        """Attach the files with which the unpacked folder loads: the adapter's, and those that only the base has."""
        own, base, found = self._adapter.files, self._base.files, {}
        left_out = {_CARD, CONFIG_FILE} | (_TOKENIZER if _TOKENIZER & own.keys() else set())
        files = {name: path for name, path in base.items() if name not in left_out} | own
        files |= {name: base[name] for name in _CONFIGS & base.keys()}
        # Two names that differ in the case of letters are one file on some systems: the adapter's stays.
        for name in collisions(sorted(files, key=lambda name: (name not in _CONFIGS, name not in own, name))):
            del files[name]
        for name, path in sorted(files.items()):
            data = self._base.attachment(name) if path == base.get(name) else read_file(path)
            if name == "config.json" and self._plan.config:
                data = self._config(data)
            found[name] = self._container.attach(data)
        return found

    def _config(self, data: bytes) -> bytes:
        """Return the base's ``config.json`` for a model with other ties or another vocabulary."""
        config: dict[str, Any] = json.loads(data)
        changed = self._result.config
        if self._plan.config.get(TIES) is False:
            config = without_ties(config)
            changed[TIES] = False
        if "vocab_size" in self._plan.config:
            old, new = self._plan.config["vocab_size"]
            changed["vocab_size"] = new
            _resize(config, old, new)
        return (json.dumps(config, indent=2) + "\n").encode()

    def _metadata(self) -> dict[str, str]:
        config = self._adapter.config
        named = {
            METADATA_BASE: config.base_name,
            METADATA_TASK: config.task_type,
            c.METADATA_BASE: base_name(self._base),
        }
        return {
            "deltafmt.version": __version__,
            "method": "lora",
            **{key: value for key, value in named.items() if value},
            **({METADATA_VARIANT: variant} if (variant := self._base.names.variant()) else {}),
            **self._base.names.metadata(),
            **{f"safetensors.{key}": value for key, value in self._base.metadata().items()},
        }


def _begins_as(own: Tensor, base: Tensor) -> bool:
    """Tell whether a matrix is the base's, with more rows after it."""
    if own.dtype != base.dtype or own.dtype not in c.DELTA_DTYPES or len(base.shape) != 2 or own.rows <= base.rows:
        return False
    # The base's pieces decide how far: a longer one of the adapter's is cut.
    return all(bytes(a[: len(b)]) == bytes(b) for b, a in zip(base.pieces(), own.pieces(), strict=False))


def _resize(config: dict[str, Any], old: int, new: int) -> None:
    """Change the vocabulary's size in a configuration, and in its parts."""
    for key, value in config.items():
        if isinstance(value, dict):
            _resize(value, old, new)
        elif key == "vocab_size" and value == old:
            config[key] = new
