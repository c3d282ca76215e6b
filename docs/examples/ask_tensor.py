"""Ask serve_tensors.c for a tensor, with Python's standard library alone.

python docs/examples/ask_tensor.py SOCKET NAME
"""

from __future__ import annotations

import array
import math
import socket
import sys


def ask(path: str, name: str) -> tuple[str, list[int], bytes]:
    """Return a tensor's dtype, its rows and columns, and its bytes.

    Raises:
        LookupError: the service has no such tensor, or will not give it.
        EOFError: the service ended in the middle of an answer.
    """
    with socket.socket(socket.AF_UNIX) as connection, connection.makefile("rwb") as stream:
        connection.connect(path)
        stream.write(name.encode() + b"\n")
        stream.flush()
        word, _, rest = stream.readline().decode().rstrip("\n").partition(" ")
        if word != "ok":
            raise LookupError(rest)
        dtype, sizes, length = rest.split(" ")
        data = stream.read(int(length))
        if len(data) < int(length):
            raise EOFError("the service ended in the middle of an answer")
        return dtype, [int(size) for size in sizes.split(",")], data


def main() -> None:
    """Print what read_numpy.py prints of a delta."""
    path, name = sys.argv[1:]
    dtype, (rows, columns), data = ask(path, name)
    print(f"{name}: {rows} x {columns}")
    if dtype == "F32":
        values = array.array("f", data)
        print(f"nonzero elements: {sum(value != 0 for value in values)}")
        print(f"norm: {math.sqrt(sum(value * value for value in values)):.6f}")


if __name__ == "__main__":
    main()
