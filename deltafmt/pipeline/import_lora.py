"""``deltafmt.import_lora``: a base and a LoRA adapter to a delta file.

The factors become ``lowrank`` terms; every other tensor is the base's, or replaced by one that the adapter holds whole.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from deltafmt._version import __version__
from deltafmt.checkpoint.adapter import Adapter
from deltafmt.checkpoint.adapter_config import CONFIG_FILE
from deltafmt.checkpoint.base_name import base_name
from deltafmt.checkpoint.folder import Checkpoint, natural_key, read_file
from deltafmt.checkpoint.folder_writer import TensorSpec
from deltafmt.checkpoint.name_changes import NameChange
from deltafmt.checkpoint.renames import Renames
from deltafmt.checkpoint.safetensors_file import Tensor
from deltafmt.container.partial import PartialFile
from deltafmt.container.writer import ContainerWriter
from deltafmt.errors import UsageError
from deltafmt.format import constants as c
from deltafmt.index.entries import BaseRef, TensorEntry
from deltafmt.index.sections import Attachment
from deltafmt.pipeline.entry_writer import EntryWriter, packed_bytes
from deltafmt.pipeline.lora_factors import term_of
from deltafmt.pipeline.lora_plan import LoraPlan, plan_lora
from deltafmt.pipeline.outputs import refuse_input_file
from deltafmt.pipeline.workers import Progress, drain, thread_count
from deltafmt.terms.buffers import blank
from deltafmt.terms.lowrank.codec import LowRankCodec

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
        replaced: names of tensors that the adapter holds whole, with other bytes than the base.
        same: number of tensors that equal the base's.
        base_name: the base that the adapter names; empty if it names none.
        left_out: why files and folders of the adapter's folder do not travel, by name.
        names: what differs between the adapter's names and the base's.
    """

    path: Path
    size: int = 0
    content_id: str = ""
    adapter_bytes: int = 0
    ranks: dict[int, int] = field(default_factory=dict)
    replaced: list[str] = field(default_factory=list)
    same: int = 0
    base_name: str = ""
    left_out: dict[str, str] = field(default_factory=dict)
    names: list[NameChange] = field(default_factory=list)


def import_lora(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rename: Sequence[str] = (),
    strip_prefix: Sequence[str] = (),
    profile: str = "hot",
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> ImportResult:
    """Write a LoRA adapter as a delta file, with the adapter's scaling multiplied into the factors.

    Args:
        base: the checkpoint that the adapter was trained on, a folder or a ``.safetensors`` file.
        adapter: a folder as PEFT saves it, with ``adapter_config.json`` and ``adapter_model.safetensors``.
        out: the file to make.
        rename: rules FROM=TO that say what a name of the adapter is in the base, as :func:`deltafmt.pack` takes them;
            the adapter's names count without ``base_model.model.``.
        strip_prefix: beginnings of names that do not count, on either side.
        profile: ``hot`` or ``cold``.
        force: True to replace ``out`` if it exists.
        threads: worker threads for the base's fingerprints; one for each processor if not given.
        progress: called with a base tensor's name and bytes as each is done.

    Raises:
        UsageError: the output exists or is an input, or the profile is unknown.
        NonFiniteError: a factor has NaN or infinity.
        InvalidFileError: an input is not valid.
        UnsupportedError: the adapter is not plain LoRA on matrices.
        WrongBaseError: the base lacks a tensor of the adapter, or has it in another shape.
        StorageError: reading or writing failed.
    """
    if profile not in c.PROFILES:
        raise UsageError(f"profile {profile!r} is not one of {', '.join(c.PROFILES)}")
    path, renames = Path(out), Renames.parse(rename, strip_prefix)
    with Checkpoint(base, lenient=True) as checkpoint, Adapter(adapter) as opened:
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
        )
        sink = PartialFile(path, None, force=force)
        try:
            _Importer(checkpoint, opened, plan, ContainerWriter(sink, profile), result).run(workers, progress)
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
        self, base: Checkpoint, adapter: Adapter, plan: LoraPlan, container: ContainerWriter, result: ImportResult
    ) -> None:
        self._base = base
        self._adapter = adapter
        self._plan = plan
        self._container = container
        self._writer = EntryWriter(container)
        self._result = result

    def run(self, threads: int, progress: Progress | None) -> None:
        """Write every tensor, then the attachments, then finish the file."""
        base, result = self._base.tensors, self._result
        pool = ThreadPoolExecutor(threads, thread_name_prefix="deltafmt-import")
        try:
            needed = [tensor for name, tensor in base.items() if name not in self._plan.replaced]
            digests = pool.map(Tensor.fingerprint, needed)
            entries = []
            for name in sorted({**base, **self._plan.replaced}, key=natural_key):
                whole = self._plan.replaced.get(name)
                entry = self._kept(base[name], next(digests)) if whole is None else self._replaced(name, whole)
                entries.append(entry)
                self._container.boundary()
                if progress and name in base:
                    progress(name, base[name].nbytes)
        finally:
            drain(pool)
        result.same = sum(entry.action == "same" for entry in entries)
        result.replaced = [entry.name for entry in entries if entry.action == "replace"]
        identity = self._container.finish(entries, attachments=self._attach(), metadata=self._metadata())
        result.size, result.content_id = self._container.position, identity.hex()

    def _kept(self, base: Tensor, digest: bytes) -> TensorEntry:
        """Return the entry of a tensor that equals its base, or is its base plus one term."""
        reference = BaseRef(digest, base.dtype, base.shape)
        factors = self._plan.factors.get(base.name)
        if factors is None:
            return self._writer.same(base, reference)
        scaling = self._adapter.config.scaling_of(factors.module)
        layout, arrays = term_of(factors, scaling, transposed=base.name in self._plan.transposed)
        codec = LowRankCodec(layout, *base.shape)
        packed = blank(layout, *base.shape)
        codec.encode(arrays, packed)
        self._result.ranks[layout.rank] = self._result.ranks.get(layout.rank, 0) + 1
        return self._writer.add(base, reference, [packed_bytes(codec, packed)])

    def _replaced(self, name: str, tensor: Tensor) -> TensorEntry:
        """Return the entry of a tensor that the adapter holds whole, under the name that it has in the model."""
        return self._writer.replace(TensorSpec(name, tensor.dtype, tensor.shape), tensor.pieces())

    def _attach(self) -> dict[str, Attachment]:
        """Attach the files with which the unpacked folder loads: the adapter's, and those that only the base has."""
        own, base, found = self._adapter.files, self._base.files, {}
        left_out = {_CARD, CONFIG_FILE} | (_TOKENIZER if _TOKENIZER & own.keys() else set())
        files = {name: path for name, path in base.items() if name not in left_out} | own
        files |= {name: base[name] for name in _CONFIGS & base.keys()}
        for name, path in sorted(files.items()):
            found[name] = self._container.attach(read_file(path))
        return found

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
            **self._base.names.metadata(),
            **{f"safetensors.{key}": value for key, value in self._base.metadata().items()},
        }
