"""The index of one file, decoded and checked (spec/deltafmt-v1.md, sections 7 and 9).

Tensor entries stay encoded until somebody asks for one, so a file of many tensors opens quickly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from deltafmt.container import canonical
from deltafmt.format import constants as c
from deltafmt.format.checks import Where, check_bytes, check_name, fail, is_name
from deltafmt.index.entries import TensorEntry
from deltafmt.index.exact import FileRef
from deltafmt.index.file_names import first_collision
from deltafmt.index.scaled import ScaledRef
from deltafmt.index.sections import DIGEST_BYTES, Attachment, BufferRef, Section
from deltafmt.terms.layout import TermLayout
from deltafmt.terms.registry import parse_layout

_TOP_KEYS = ("attachments", "layouts", "metadata", "profile", "removed", "sections", "tensors")
# Keys that an index has only with a feature of the header.
_FEATURE_KEYS = ("files", "parent", "scaled")
# The key of a safetensors file's header that holds no tensor; behind a component's folder it would be that key, too.
_NO_TENSOR = "__metadata__"


@dataclass(frozen=True, slots=True)
class FileIndex:
    """The index of a file.

    Attributes:
        profile: ``hot`` or ``cold``.
        metadata: strings by name.
        layouts: the layout table.
        sections: the sections in the order of their offsets.
        tensors: the encoded entries by tensor name; :meth:`entry` decodes one.
        removed: the names of the tensors that the base has and the fine-tune lacks.
        attachments: the attached files by name.
        features: the header's incompatible features.
        scaled: how the base keeps tensors that are read as values, encoded, by name; :meth:`scaled_ref` decodes one.
        files: the files that are restored byte for byte, by name.
        served: the number of the section that ends the served part of a progressive file; None in other files.
        parent: the content id of the delta file whose result is the base; None for most files.
        has_scaled: whether the index has the key ``scaled``, which may be empty.
    """

    profile: str
    metadata: Mapping[str, str]
    layouts: tuple[TermLayout, ...]
    sections: tuple[Section, ...]
    tensors: dict[str, Any]
    removed: tuple[str, ...]
    attachments: Mapping[str, Attachment]
    features: int = 0
    scaled: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, FileRef] = field(default_factory=dict)
    served: int | None = None
    parent: bytes | None = None
    has_scaled: bool = False

    @classmethod
    def parse(cls, data: bytes, index_offset: int, features: int = 0, max_memory: int | None = None) -> Self:
        """Decode and check an index.

        Args:
            data: the encoded index.
            index_offset: the place of the index in the file, where the last section must end.
            features: the header's incompatible features.
            max_memory: refuse an index that takes more bytes of memory; None for the default.

        Raises:
            InvalidFileError: the index breaks the format; the message names the place.
        """
        obj = canonical.decode(data, "the index", max_memory)
        optional = [key for key in _FEATURE_KEYS if type(obj) is dict and key in obj]
        keys = tuple(sorted((*_TOP_KEYS, *optional)))
        if type(obj) is not dict or tuple(obj) != keys:
            fail("index", f"expected the keys {', '.join(keys)}")
        if "files" in optional and not features & c.FEATURE_EXACT:
            fail("files", "the header does not have the feature of exact tensors and files, bit 3")
        if "parent" in optional and not features & c.FEATURE_PARENT:
            fail("parent", "the header does not have the feature of parents, bit 5")
        if "scaled" in optional and not features & c.FEATURE_SCALED:
            fail("scaled", "the header does not have the feature of scaled tensors, bit 2")
        profile = obj["profile"]
        if profile not in c.PROFILES:
            fail("profile", f"unknown profile {profile!r}")
        metadata = canonical.check_names(obj["metadata"], "metadata")
        if not all(type(value) is str for value in metadata.values()):
            fail("metadata", "a value is not a string")
        layouts = _parse_layouts(obj["layouts"], profile)
        sections = _parse_sections(obj["sections"], profile, index_offset, features)
        tensors = canonical.check_names(obj["tensors"], "tensors")
        _check_tensors(tensors)
        removed = _parse_removed(obj["removed"], tensors)
        attachments = _parse_attachments(obj["attachments"])
        scaled = canonical.check_names(obj["scaled"], "scaled") if "scaled" in obj else None
        for name, encoded in (scaled or {}).items():
            check_name(name, where := ('scaled["', name, '"]'))
            _check_encoded(encoded, where)
        files = _parse_files(obj["files"], attachments) if "files" in obj else {}
        served = next((i for i, section in enumerate(sections) if section.kind == c.SECTION_KIND_SERVED), None)
        parent = check_bytes(obj["parent"], "parent", DIGEST_BYTES) if "parent" in obj else None
        rest = attachments, features, scaled or {}, files, served, parent, scaled is not None
        index = cls(profile, metadata, layouts, sections, tensors, removed, *rest)
        for name, attachment in index.attachments.items():
            index.check_ref(attachment.data, f'attachments["{name}"]', c.SECTION_KIND_ATTACHMENTS)
            if served is not None and attachment.data.section > served:
                fail(f'attachments["{name}"]', "it lies behind the served part")
        for name, file in index.files.items():
            index.check_ref(file.head, f'files["{name}"]', c.SECTION_KIND_ATTACHMENTS)
            if served is not None and file.head.section < served:
                fail(f'files["{name}"]', "its head lies in the served part, which has no files")
        return index

    def entry(self, name: str) -> TensorEntry:
        """Decode and check the entry of a tensor that the index has.

        Raises:
            InvalidFileError: the entry breaks the format.
        """
        where = ('tensors["', name, '"]')
        entry = TensorEntry.from_obj(name, self._decode_entry(name), self.layouts)
        if entry.base is not None and entry.base.parts and not self.features & c.FEATURE_PARTS:
            fail((where, ".base.parts"), "the header does not have the feature of parts, bit 0")
        if entry.leading is not None and not self.features & c.FEATURE_LEADING:
            fail((where, ".leading"), "the header does not have the feature of leading dimensions, bit 1")
        if entry.exact is not None:
            self._check_exact(entry, (where, ".exact"))
        refs = entry.refs()
        for buffer, ref in refs:
            if buffer == "exact":
                self.check_ref(ref, (where, ".", buffer), c.SECTION_KIND_EXACT)
                continue
            if ref.section != refs[0][1].section:
                fail(where, "the buffers lie in several sections")
            self.check_ref(ref, (where, ".", buffer), c.SECTION_KIND_TENSORS)
        if entry.target is not None:
            target = self._decode_entry(entry.target) if entry.target in self.tensors else None
            if type(target) is not dict or target.get("action") == "alias":
                fail((where, ".target"), f"{entry.target!r} is not a tensor of its own")
            if [target.get("dtype"), target.get("shape")] != [entry.dtype, list(entry.shape)]:
                fail((where, ".target"), f"{entry.target!r} has another dtype or shape")
        return entry

    def _check_exact(self, entry: TensorEntry, where: Where) -> None:
        """Check that exact tensors stand in archives, and exact parts in progressive files."""
        if not self.features & c.FEATURE_EXACT:
            fail(where, "the header does not have the feature of exact tensors and files, bit 3")
        if entry.terms and self.served is None:
            fail(where, "a tensor has an exact part, and the file has no served part")
        if not entry.terms and self.served is not None:
            fail(where, "a file with a served part has an exact tensor, which nobody can serve")

    def scaled_ref(self, name: str) -> ScaledRef:
        """Decode and check how the base keeps a tensor that is read as values.

        Raises:
            InvalidFileError: the description breaks the format.
        """
        where = f'scaled["{name}"]'
        return ScaledRef.from_obj(canonical.decode(self.scaled[name], where), where)

    def _decode_entry(self, name: str) -> Any:
        return canonical.decode(self.tensors[name], f'tensors["{name}"]')

    def check_ref(self, ref: BufferRef, where: Where, section_kind: int) -> None:
        """Check that a buffer lies inside a section of the right section kind.

        Raises:
            InvalidFileError: it does not.
        """
        if ref.section >= len(self.sections):
            fail(where, f"section {ref.section} is not one of the {len(self.sections)} sections")
        section = self.sections[ref.section]
        if section.kind != section_kind:
            fail(where, f"section {ref.section} is of another kind")
        if ref.offset + ref.length > section.raw_length:
            fail(where, f"{ref.length} bytes at {ref.offset} leave section {ref.section}")


def _check_encoded(data: Any, where: Where) -> None:
    if type(data) is not bytes:
        fail(where, "expected a byte string that holds an entry")


def _parse_layouts(rows: Any, profile: str) -> tuple[TermLayout, ...]:
    if type(rows) is not list:
        fail("layouts", "expected a list")
    layouts: tuple[TermLayout, ...] = tuple(parse_layout(row, f"layouts[{i}]") for i, row in enumerate(rows))
    if profile == "hot" and any(layout.cold_only for layout in layouts):
        fail("layouts", "a rank index stands in a hot file")
    if len(set(layouts)) != len(layouts):
        fail("layouts", "a layout stands in the table twice")
    return layouts


def _parse_sections(rows: Any, profile: str, index_offset: int, features: int) -> tuple[Section, ...]:
    if type(rows) is not list:
        fail("sections", "expected a list")
    sections = tuple(Section.from_obj(row, f"sections[{i}]") for i, row in enumerate(rows))
    position = c.SECTION_ALIGNMENT
    raw_bytes = 0
    behind: set[int] = set()
    for number, section in enumerate(sections):
        if section.offset != position:
            fail(f"sections[{number}].offset", f"{section.offset} where {position} is next")
        if section.offset + section.length > index_offset:
            fail(f"sections[{number}].length", f"{section.length} bytes run into the index")
        if profile == "hot" and section.kind == c.SECTION_KIND_TENSORS and section.codec != c.CODEC_STORED:
            fail(f"sections[{number}].codec", "a hot file stores its tensors as they are")
        if section.kind == c.SECTION_KIND_TENSORS and c.SECTION_KIND_EXACT in behind:
            fail(f"sections[{number}].kind", "a section of tensors lies behind one of exact tensors")
        if section.kind == c.SECTION_KIND_TENSORS and c.SECTION_KIND_SERVED in behind:
            fail(f"sections[{number}].kind", "a section of tensors lies behind the served part")
        if section.kind == c.SECTION_KIND_EXACT and not features & c.FEATURE_EXACT:
            fail(f"sections[{number}].kind", "a section of exact tensors needs feature bit 3")
        if section.kind == c.SECTION_KIND_SERVED and not features & c.FEATURE_PROGRESSIVE:
            fail(f"sections[{number}].kind", "a served part needs feature bit 4")
        if section.kind == c.SECTION_KIND_SERVED and behind & {c.SECTION_KIND_EXACT, c.SECTION_KIND_SERVED}:
            fail(f"sections[{number}].kind", "a served part ends behind another one, or behind exact tensors")
        behind.add(section.kind)
        raw_bytes += section.raw_length
        if raw_bytes > c.MAX_RAW_BYTES:
            fail(f"sections[{number}].raw_length", f"the sections decode to more than {c.MAX_RAW_BYTES} bytes")
        position = c.align(section.offset + section.length, c.SECTION_ALIGNMENT)
    if position != index_offset:
        fail("sections", f"they end at {position}, the index starts at {index_offset}")
    return sections


def _check_tensors(names: Mapping[str, Any]) -> None:
    """Refuse what is no encoded entry, names of no or too many bytes, and the name that safetensors files keep."""
    for name, encoded in names.items():
        _check_encoded(encoded, ('tensors["', name, '"]'))
        if not is_name(name):
            fail(('tensors["', name, '"]'), f"a name has 1 to {c.MAX_NAME_BYTES} bytes")
        if name.endswith(_NO_TENSOR) and name.rpartition("/")[2] == _NO_TENSOR:
            fail(('tensors["', name, '"]'), "a safetensors file keeps no tensor under this name")


def _parse_removed(names: Any, tensors: Mapping[str, Any]) -> tuple[str, ...]:
    if type(names) is not list or not all(type(name) is str for name in names):
        fail("removed", "expected a list of names")
    for name in names:
        check_name(name, "removed")
    if names != sorted(set(names)) or any(name in tensors for name in names):
        fail("removed", "the names are not sorted and distinct from the tensors")
    return tuple(names)


def _parse_files(obj: Any, attachments: Mapping[str, Attachment]) -> dict[str, FileRef]:
    files = {name: FileRef.from_obj(name, value) for name, value in canonical.check_names(obj, "files").items()}
    if not files:
        fail("files", "expected at least one file")
    collision = first_collision((*attachments, *files))
    if collision is not None:
        name, other = collision
        fail(f'files["{name}"]', f'"{other}" stands in the place of this file or of its folder')
    return files


def _parse_attachments(obj: Any) -> dict[str, Attachment]:
    names = canonical.check_names(obj, "attachments")
    attachments = {name: Attachment.from_obj(name, value) for name, value in names.items()}
    collision = first_collision(attachments)
    if collision is not None:
        name, other = collision
        fail(f'attachments["{name}"]', f'"{other}" stands in the place of the file or of its folder')
    return attachments
