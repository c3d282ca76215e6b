"""``deltafmt convert``: what changed between two versions of a model, from one format to another."""

from __future__ import annotations

import argparse

from deltafmt.checkpoint.weight_names import bounded
from deltafmt.pipeline.summary import plural
from deltafmt.tools import console
from deltafmt.tools.limit_arguments import add_limit_arguments, limits_of

EPILOG = """\
The format of IN is found from its bytes: a delta file, a version folder (slime, SGLang, Miles, ModelExpress), or a
sparse safetensors file of TRL. A patch of another program becomes a delta file, which unpack and apply restore byte for
byte; an exact delta file becomes a patch. docs/how-to/convert.md says what each format can carry.
"""
FORMATS = ("deltafmt", "version-folder", "trl")
ENCODINGS = ("xor", "overwrite")
CHECKSUMS = ("xxh3-128", "blake3", "adler32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = EPILOG
    parser.add_argument("input", metavar="IN", help="the delta file, version folder or sparse safetensors file")
    parser.add_argument("-o", "--output", metavar="OUT", required=True, help="the file or folder to write")
    parser.add_argument(
        "--base", metavar="BASE", required=True, help="what IN was made on: a checkpoint folder or a .safetensors file"
    )
    parser.add_argument("--to", choices=FORMATS, help="the format of OUT (default: deltafmt, if IN is another one)")
    parser.add_argument(
        "--parent", metavar="DELTA", help="the delta file that gives BASE; OUT is the next link of its chain"
    )
    parser.add_argument(
        "--model-version",
        metavar="V",
        help="the version that a patch gives (default: that of IN, or of a folder named weight_v000001)",
    )
    parser.add_argument(
        "--base-version",
        metavar="V",
        help="the version that it was made on (default: that of IN, the one noted in BASE, or one before)",
    )
    parser.add_argument("--encoding", choices=ENCODINGS, help="the changes of a version folder (default: xor)")
    parser.add_argument("--checksum", choices=CHECKSUMS, help="its checksums (default: xxh3-128)")
    parser.add_argument(
        "--tensors-only", action="store_true", help="leave out files that a delta file carries and a patch cannot"
    )
    parser.add_argument("--threads", type=int, metavar="T", help="number of threads (default: one for each processor)")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    add_limit_arguments(parser, computes=True)


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from deltafmt.pipeline.convert import convert

    def total() -> int:
        return console.checkpoint_bytes(options.base)

    with console.progress_bar("converting", total, not options.json) as progress:
        result = convert(
            options.input,
            options.output,
            options.base,
            options.to,
            parent=options.parent,
            version=options.model_version,
            base_version=options.base_version,
            encoding=options.encoding,
            checksum=options.checksum,
            tensors_only=options.tensors_only,
            force=options.force,
            threads=options.threads,
            limits=limits_of(options),
            progress=progress,
        )
    if not result.base_checked:
        console.warn(
            f"{options.input} has no checksum, and a base of the same shapes with other values is not noticed; make "
            f"sure that {options.base} is the version that it was made on"
        )
    if options.json:
        console.say_json(
            {
                "ok": True,
                "output": str(result.path),
                "from": result.source,
                "to": result.target,
                "bytes": result.size,
                "tensors_changed": result.tensors,
                "model_version": result.version,
                "base_version": result.base_version,
                "content_id": result.content_id or None,
                "parent": result.parent or None,
                "restored": result.restored,
                "attached": result.attached,
                "base_checked": result.base_checked,
            }
        )
        return
    console.say(f"{result.path}: {result.size:,} bytes, {result.target} from {result.source}")
    known = result.version is not None
    versions = f", version {result.version}" + (f" on {result.base_version}" if result.base_version else "")
    console.say(f"{plural(result.tensors, 'tensor')} changed{versions if known else ''}")
    if result.restored:
        console.say(f"restored byte for byte by unpack: {bounded(result.restored)}")
    if result.attached:
        console.say(f"attached: {bounded(result.attached)}")
    if result.parent:
        console.say(f"parent: {result.parent}")
