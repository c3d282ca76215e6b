"""Vectors of attachments and of the names that their files may have (section 7.2)."""

from __future__ import annotations

import io

from draft import Draft
from vector_tools import vector

from deltafmt.container.writer import ContainerWriter

from .endings import ENDINGS


def attached(*names: str, content: bytes = b"x") -> bytes:
    """Return a file with attachments of these names, which may be any, and no tensor."""
    out = io.BytesIO()
    writer = ContainerWriter(out)
    rows = {f"{i}": writer.attach(content) for i in range(len(names))}
    writer.finish([], attachments=rows)
    draft = Draft.of(out.getvalue())
    rows = draft.index["attachments"]
    draft.index["attachments"] = dict(sorted(zip(names, rows.values(), strict=True)))
    return draft.build()


PLAIN = "not a plain relative path"

# What is wrong with a name, and the name.
BAD_NAMES = {
    "path": ("would be written outside its folder", "../x"),
    "parent": ("would be written outside its folder, by way of another", "a/../../x"),
    "absolute": ("has an absolute path", "/x"),
    "empty-part": ("has a path with an empty part", "a//x"),
    "folder": ("has a path that ends in a stroke", "a/"),
    "hidden": ("would be read by git", ".git/config"),
    "hidden-part": ("is hidden in a folder", "a/.x"),
    "space": ("has a part that ends in a space", "a /x"),
    "full-stop": ("has a part that ends in a full stop", "x."),
    "device": ("would be written to a device of Windows", "NUL"),
    "device-part": ("would be written to a device of Windows in a folder", "a/aux/x"),
    "device-ending": ("would be written to a device of Windows, which counts no endings", "a/com1.tar.gz"),
    "device-case": ("would be written to a device of Windows, whatever the case", "Lpt9.txt"),
    "device-con": ("would be written to the console of Windows", "CON.json"),
    "device-prn": ("would be written to the printer of Windows", "prn"),
    "device-com9": ("would be written to a device of Windows, as a folder", "COM9/x.json"),
    "device-spaces": ("would be written to a device of Windows, spaces before its full stop", "aux  .json"),
    "device-superscript": ("would be written to a device of Windows: COM and a superscript 2", "COM\u00b2.txt"),
    "device-conin": ("would be written to the console's input of Windows", "conin$"),
    "device-conout": ("would be written to the console's output of Windows", "CONOUT$.x"),
    "long-part": ("has a part of 256 bytes", "a" * 256),
    "long-part-of-umlauts": ("has a part of 256 bytes and fewer characters", "\u00e4" * 128),
    "nul": ("has a NUL in its name", "a\0b"),
    "control": ("has a control character in its name", "a\x1fb"),
    "delete": ("has a control character in its name, U+007F", "a\x7fb"),
    "control-next-line": ("has a control character in its name, U+0085", "a\x85b"),
    "control-late": ("has a control character in its name, U+009F", "a\x9fb"),
    "backslash": ("has a backslash in its name", "a\\b"),
    "colon": ("has a colon in its name", "a:b"),
    "asterisk": ("has an asterisk in its name", "a*b"),
    "question-mark": ("has a question mark in its name", "a?b"),
    "quote": ("has a quotation mark in its name", 'a"b'),
    "less": ("has a less-than sign in its name", "a<b"),
    "greater": ("has a greater-than sign in its name", "a>b"),
    "bar": ("has a bar in its name", "a|b"),
}
for _name, (_what, _path) in BAD_NAMES.items():
    vector("invalid", f"an attachment {_what}", PLAIN, f"attachment-{_name}")(lambda path=_path: attached(path))  # type: ignore[misc]

for _ending in ENDINGS:
    vector(
        "invalid",
        "an attachment would be taken for weights",
        "a name for weights",
        f"attachment-of-{_ending.replace('.', '-')}",
    )(
        lambda ending=_ending: attached(f"a/x.{ending}")  # type: ignore[misc]
    )


WEIGHTS = {
    "capitals": ("would be taken for weights, whatever the case", "model.SAFETENSORS"),
    "folder": ("lies in a folder that would be taken for weights", "model.bin/x.json"),
    "index-variant": (
        "would be taken for the index of a variant of weights",
        "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
    ),
}
for _name, (_what, _path) in WEIGHTS.items():
    vector("invalid", f"an attachment {_what}", "a name for weights", f"attachment-of-weights-{_name}")(
        lambda path=_path: attached(path)  # type: ignore[misc]
    )

PROGRAMS = {
    "so": "json.cpython-311-x86_64-linux-gnu.so",
    "capitals": "lib/X.PYD",
    "dll": "x.dll",
    "dylib": "x.dylib",
    "exe": "x.exe",
    "pyc": "x.pyc",
    "pyo": "x.pyo",
    "adapter": "Adapter_Config.json",
    "adapter-in-folder": "a/adapter_config.json",
}
for _name, _path in PROGRAMS.items():
    vector(
        "invalid",
        "an attachment would be loaded as a program, or make a loader take other weights",
        "a name for a program",
        f"attachment-program-{_name}",
    )(
        lambda path=_path: attached(path)  # type: ignore[misc]
    )


@vector("ok", "names of attachments that are allowed although they come close to what is not")
def attachments_allowed() -> bytes:
    close = ("CON\u00a0.txt", "com10.txt", "com.json", "console/nul_.json", "lpt0", "model.bin.md", "so", "pyd.txt")
    parts_of = ("A/x.json", "a/y.json", "adapter_config.json.txt", "\u00e9" * 127, "/".join(["x" * 204] * 5))
    # Letters other than A to Z have no lower case here.
    return attached(*close, *parts_of, "\u00c9.txt", "\u00e9.txt", "modeling_x.py")


@vector("invalid", "two attachments whose names differ in the case of a letter", "stands in the place of")
def attachments_equal() -> bytes:
    return attached("readme.md", "README.md")


@vector("invalid", "an attachment a, and one in a folder A", "stands in the place of")
def attachment_is_a_folder_in_capitals() -> bytes:
    return attached("A/b.json", "a")


@vector("invalid", "an attachment has no name", PLAIN)
def attachment_without_name() -> bytes:
    return attached("")


@vector("invalid", "an attachment stands in the place of another's folder", "stands in the place of")
def attachment_is_a_folder() -> bytes:
    return attached("a", "a/b")


@vector("invalid", "an attachment stands in the place of the folder of another's folder", "stands in the place of")
def attachment_is_a_folders_folder() -> bytes:
    return attached("a/b", "a/b/c/d", "a/b.c")


@vector("invalid", "an attachment's name has 1025 bytes", PLAIN)
def attachment_long_name() -> bytes:
    return attached("/".join(["\u00e4" * 102] * 5) + "b")


@vector("ok", "attachments whose names are as close to those that are refused as they may be")
def attachment_names() -> bytes:
    folder = "/".join(["b" * 203] * 5)
    names = (
        "CONSOLE",
        "COM0",
        "COM10",
        "LPT",
        "a.b",
        "a b/c",
        "x-con",
        "x.nul",
        "c" * 255,
        "\u00e4" * 127,
        folder + "/xyz",
    )
    assert len(folder + "/xyz") == 1023
    return attached(*names, "\u00a0x", "x.safetensors.txt", "xbin", "model.json", "~", "a.b.c", "d/e", "d.e")


@vector("invalid", "the bytes of an attachment are not what its digest says", "another digest")
def attachment_digest() -> bytes:
    return Draft.of(attached("x")).build(lambda index: index["attachments"]["x"].update(digest=bytes(32)))


@vector("ok", "an attachment of no bytes")
def attachment_empty() -> bytes:
    return attached("x", content=b"")
