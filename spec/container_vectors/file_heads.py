"""Vectors of the names and heads of files that are restored (section 7.10)."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

from draft import Draft
from vector_tools import vector

from container_vectors.exact import head_of, with_files
from container_vectors.progressive import one_part

ROW = {"data_offsets": [0, 8], "dtype": "U8", "shape": [8]}


def spelled(header: str, encoding: str = "utf-8") -> bytes:
    """Return a file that restores two weight files, one of them with this header."""
    text = header.encode(encoding)
    return with_files({"model.safetensors": struct.pack("<Q", len(text)) + text, "sub/x.safetensors": SECOND})


def row(**keys: Any) -> str:
    """Return a header in which the tensor has these keys, too."""
    return json.dumps({"one": {**ROW, **keys}})


def in_folder(folder: str) -> bytes:
    """Return a file that restores a weight file in a folder of this name."""
    heads = {f"{folder}/x.safetensors": head_of(("one", "U8", (8,), 8)), "sub/x.safetensors": SECOND}
    return with_files(heads, (f"{folder}/one", "sub/two"))


def head_in_served_part() -> bytes:
    """Return a progressive file whose head lies behind an attachment, before the end of the served part."""
    draft = Draft.of(one_part(files=True).data)
    attached, held = (draft.index[key] for key in ("attachments", "files"))
    (note,), (file,) = attached.values(), held.values()
    number, section = note["data"][0], draft.raw[note["data"][0]]
    section += bytes(-len(section) % 256)
    head = draft.raw.pop()
    del draft.index["sections"][-1]
    file["head"] = [number, len(section), len(head)]
    section += head
    return draft.build()


SECOND = head_of(("two", "U8", (8,), 8))
ONE = json.dumps(ROW)
BAD: dict[str, tuple[str, str, Callable[[], bytes]]] = {
    "files_in_folder_of_weights": (
        "a weight file lies in a folder that is named like weights",
        "not a plain relative path",
        lambda: in_folder("a.bin"),
    ),
    "files_in_folder_in_capitals": (
        "a weight file lies in a folder that is named like weights, in capitals",
        "not a plain relative path",
        lambda: in_folder("a.SafeTensors"),
    ),
    "files_head_tensor_twice": (
        "a tensor stands twice in a head",
        "a key stands twice",
        lambda: spelled(f'{{"one":{ONE},"one":{ONE}}}'),
    ),
    "files_head_metadata_twice": (
        "a head has __metadata__ twice",
        "a key stands twice",
        lambda: spelled(f'{{"__metadata__":{{}},"one":{ONE},"__metadata__":{{}}}}'),
    ),
    "files_head_metadata_key_twice": (
        "a key stands twice in the metadata of a head, once with an escape",
        "a key stands twice",
        lambda: spelled(f'{{"__metadata__":{{"a":"b","\\u0061":"b"}},"one":{ONE}}}'),
    ),
    "files_head_key_twice": (
        "a tensor of a head has its shape twice",
        "a key stands twice",
        lambda: spelled('{"one":' + ONE.replace("}", ',"shape":[8]}') + "}"),
    ),
    "files_head_metadata_number": (
        "a value of the metadata of a head is a number",
        "from string to string",
        lambda: spelled(f'{{"__metadata__":{{"a":1}},"one":{ONE}}}'),
    ),
    "files_head_unknown_key": (
        "a tensor of a head has a fourth key",
        "expected the keys",
        lambda: spelled(row(strides=[1])),
    ),
    "files_head_three_places": (
        "a tensor of a head has three places",
        "no valid dtype and data_offsets",
        lambda: spelled(row(data_offsets=[0, 8, 8])),
    ),
    "files_head_fraction": (
        "a size of a head is 8.0",
        "is not an integer from 0 on",
        lambda: spelled(row(shape=[8.0])),
    ),
    "files_head_minus_zero": (
        "a place of a head is -0",
        "is not an integer from 0 on",
        lambda: spelled(row().replace("[0, 8]", "[-0, 8]")),
    ),
    "files_head_half_a_character": (
        "a string of a head ends in the middle of a pair of surrogates",
        "the header is not valid",
        lambda: spelled(f'{{"__metadata__":{{"a":"\\ud800"}},"one":{ONE}}}'),
    ),
    "files_head_zero_byte": (
        "a byte of zero follows the header",
        "the header is not valid",
        lambda: spelled(row() + "\0"),
    ),
    "files_head_utf_16": (
        "a head is UTF-16",
        "the header is not valid",
        lambda: spelled(row(), "utf-16-le"),
    ),
    "progressive_head_before": (
        "the head of a file lies in the served part",
        "its head lies in the served part",
        head_in_served_part,
    ),
}


for _name, (_comment, _error, _make) in BAD.items():
    vector("invalid", _comment, _error, _name.replace("_", "-"))(_make)


@vector("ok", "a header with spaces, escapes, a pair of surrogates, and its keys in another order")
def files_head_spellings() -> bytes:
    metadata = '"__metadata__":{"\\ud83d\\ude00":"\\"\\\\\\/\\b\\f\\n\\r\\t\\u00e9\\u20AC"}'
    return spelled(f' {{\n"o\\u006ee"\t: {{"shape":[ 8 ],"dtype":"U8","data_offsets":[0 , 8]}} ,\r{metadata}}} ')
