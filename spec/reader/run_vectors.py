"""Run test vectors through ``driver`` and ``apply``; needs Python's standard library alone.

    python run_vectors.py PROGRAMS ../vectors
    python run_vectors.py --unpack FOLDER ../vectors

PROGRAMS is the folder of the two. A vector is right if the verdict, the content id, the SHA-256 of every delta and,
where it has a base, that of every fine-tuned tensor are those of its header. The second form writes the files that the
vectors hold into a folder.
"""

from __future__ import annotations

import hashlib
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

# In the order of dlt_dtype in deltafmt.h.
DTYPES = [
    *("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F4", "F6_E2M3", "F6_E3M2", "F8_E5M2", "F8_E4M3"),
    *("F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F16", "BF16", "F32", "F64", "C64"),
]
VERDICTS = ("ok", "invalid", "unsupported", "limit", "system")


def load(path: Path) -> tuple[dict[str, str], bytes]:
    """Return the header and the file of a vector."""
    head, _, body = path.read_bytes().partition(b"\n\n")
    return dict(line.split(": ", 1) for line in head.decode().splitlines()), zlib.decompress(body)


def parsed(report: bytes) -> tuple[dict[str, str], str]:
    """Return what the reader found, in the words of a vector's header, and its message; driver.c has the bytes."""
    verdict, said = VERDICTS[report[1]], report[2]
    message, rest = report[3 : 3 + said].decode(errors="replace"), report[3 + said :]
    found = {"expect": verdict}
    if verdict != "ok":
        return found, message
    found["content_id"] = rest[:32].hex()
    (tensors,) = struct.unpack_from("<I", rest, 32)
    at = 36 + 65 * tensors
    for _ in range(tensors):
        (length,) = struct.unpack_from("<I", rest, at)
        name, at = rest[at + 4 : at + 4 + length].decode(), at + 4 + length
        if length:
            (elements,) = struct.unpack_from("<Q", rest, at)
            found[f"delta.{name}"] = hashlib.sha256(rest[at + 8 : at + 8 + 4 * elements]).hexdigest()
            at += 8 + 4 * elements
    return found, message


def applied(program: Path, data: bytes, expected: dict[str, str]) -> dict[str, str]:
    """Return what ``apply`` makes of a file and the base of its vector, in the words of a vector's header."""
    base = b""
    for key, value in expected.items():
        if key.startswith("base."):
            name = key.removeprefix("base.").encode()
            dtype, sizes, hexadecimal = value.split(" ")
            shape, tensor = [int(size) for size in sizes.split(",") if size], bytes.fromhex(hexadecimal)
            base += struct.pack("<I", len(name)) + name + struct.pack("<II", DTYPES.index(dtype), len(shape))
            base += struct.pack(f"<{len(shape)}QQ", *shape, len(tensor)) + tensor
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "file").write_bytes(data)
        (Path(scratch) / "base").write_bytes(base)
        done = subprocess.run([program, f"{scratch}/file", f"{scratch}/base"], capture_output=True, check=False)
    if done.returncode == 4:
        return {"apply": "refuse"}
    if done.returncode:
        return {"apply": done.stderr.decode(errors="replace")}
    found, at = {}, 0
    while at < len(done.stdout):
        (length,) = struct.unpack_from("<I", done.stdout, at)
        name, at = done.stdout[at + 4 : at + 4 + length].decode(), at + 4 + length
        (size,) = struct.unpack_from("<Q", done.stdout, at)
        found[f"tensor.{name}"] = hashlib.sha256(done.stdout[at + 8 : at + 8 + size]).hexdigest()
        at += 8 + size
    return found


def main() -> int:
    """Return 0 if all vectors are right."""
    if len(sys.argv) == 4 and sys.argv[1] == "--unpack":
        folder = Path(sys.argv[2])
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(Path(sys.argv[3]).glob("*.vec")):
            (folder / f"{path.stem}.deltafmt").write_bytes(load(path)[1])
        return 0
    programs, folder = map(Path, sys.argv[1:])
    vectors = [(path.stem, *load(path)) for path in sorted(folder.glob("*.vec"))]
    sent = b"".join(struct.pack("<Q", len(data)) + data for _, _, data in vectors)
    done = subprocess.run([programs / "driver", "deltas"], input=sent, stdout=subprocess.PIPE, check=False)
    told, wrong = done.stdout, 0
    for name, expected, data in vectors:
        if len(told) < 4:
            print(f"{name}: the reader ended")
            return 1
        (size,) = struct.unpack_from("<I", told)
        report, told = told[4 : 4 + size], told[4 + size :]
        found, message = parsed(report)
        if any(key.startswith("base.") for key in expected):
            found |= applied(programs / "apply", data, expected)
        compared = ("expect", "content_id", "delta.", "tensor.", "apply")
        wanted = {key: value for key, value in expected.items() if key.startswith(compared)}
        if found != wanted:
            wrong += 1
            print(f"{name}: expected {wanted}, found {found} {message}")
    print(f"{len(vectors) - wrong} of {len(vectors)} vectors are right")
    return 1 if wrong or done.returncode else 0


if __name__ == "__main__":
    sys.exit(main())
