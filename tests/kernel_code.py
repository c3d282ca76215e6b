"""Compile the Triton kernels for a GPU that need not be there, with the arguments that a launch gives them.

``python tests/kernel_code.py`` prints a JSON object for each case. A process of its own, because the others' Triton
interprets.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deltafmt.kernels.launching import launch_products
from deltafmt.kernels.nm import dense, elements, fused, gather, launch
from deltafmt.kernels.operand import BUFFER_DTYPES, Operand
from deltafmt.kernels.segments import Segments
from deltafmt.kernels.table import OperandTable
from deltafmt.terms.layout import TermLayout
from deltafmt.terms.nm.layout import NMLayout
from term_kinds import CASES

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGET = GPUTarget("cuda", 90, 32)
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
# Rows of the parts and columns of one matrix of Llama 2 7B, or of those that share an input.
SQUARE, QKV, GATE_UP, DOWN = ((4096,), 4096), ((4096,) * 3, 4096), ((11008,) * 2, 4096), ((4096,), 11008)
MANY = 256  # tokens, all of different slots

Launch = tuple[Any, dict[str, Any]]
Shape = tuple[tuple[int, ...], int]


def kernel_modules() -> list[ModuleType]:
    """Return the modules that hold the product kernels: of ``nm``, and ``kernel`` of every other kind that has one."""
    names = (f"deltafmt.kernels.{kind}.kernel" for kind in CASES if kind != "nm")
    others = (importlib.import_module(name) for name in names if importlib.util.find_spec(name))
    return [gather, elements, fused, dense, *others]


def recorded(run: Callable[[], None]) -> list[Launch]:
    """Return the kernels that a function would launch, and their arguments."""
    found: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda **arguments: found.append((self.kernel, arguments))

    kernels = [(module, name) for module in kernel_modules() for name in vars(module) if name.endswith("_kernel")]
    originals = [(module, name, getattr(module, name)) for module, name in kernels]
    for module, name, kernel in originals:
        setattr(module, name, Recorder(kernel))
    try:
        run()
    finally:
        for module, name, kernel in originals:
            setattr(module, name, kernel)
    return found


def compiled(kernel: Any, arguments: dict[str, Any]) -> Any:
    """Compile a kernel as a launch with these arguments would: pointers aligned, numbers divisible by 16 or 1 known."""
    options = {name: arguments[name] for name in ("num_warps", "num_stages") if name in arguments}
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or one:
            signature[parameter.name], constants[(place,)] = "constexpr", value
            continue
        pointer = isinstance(value, torch.Tensor)
        signature[parameter.name] = POINTERS[value.dtype] if pointer else "i32"
        if pointer or (value % 16 == 0 and not parameter.do_not_specialize):
            attributes[(place,)] = [["tt.divisibility", 16]]
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=TARGET, options=options)


def tool(name: str, *arguments: str) -> str:
    """Return what one of the CUDA tools that Triton brings prints."""
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def longest_loop(code: str) -> int:
    """Return the instructions of the longest loop in a disassembly."""
    labels: dict[str, int] = {}
    longest = count = 0
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\w+):", line):
            labels[label[1]] = count
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            count += 1
            jump = re.search(r"BRA.*?(\.L_x_\w+)", instruction[1])
            if jump and jump[1] in labels:
                longest = max(longest, count - labels[jump[1]])
    return longest


def described(kernel: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return registers, bytes of local memory (spills) and shared memory, and instructions per nonzero of the loop."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        made = compiled(kernel, arguments)
        file.write(made.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
        loop = longest_loop(tool("nvdisasm", "-c", file.name))
    used = {name: int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")}
    found = {"kernel": kernel.__name__, "registers": used["REG"], "local": used["STACK"] + used["LOCAL"]}
    found |= {"shared": made.metadata.shared, "warps": arguments["num_warps"], "loop": loop}
    if kernel is gather.gather_kernel:
        sizes = [arguments[name] for name in ("ELEMENTS", "STEPS", "MASK_ROWS", "SHARE", "TOKENS")]
        nonzeros = torch.Size(sizes).numel() / (32 * arguments["num_warps"])
        found |= {"per_nonzero": round(loop / nonzeros, 2), "even": arguments["EVEN"]}
        found |= {"steps": arguments["STEPS"], "mask_rows": arguments["MASK_ROWS"]}
    if kernel.__name__ == "lowbit_kernel":
        weights = arguments["WORDS"] * 32 * (32 // arguments["PLANE0"]) / (32 * arguments["num_warps"])
        found |= {"per_nonzero": round(loop / weights, 2)}
    if kernel.__name__ == "sparse_kernel":
        found |= {"per_nonzero": round(loop / 32, 2)}  # the slots of a step
    return found


def operand(layout: TermLayout, rows: int, columns: int, slots: int = 0, seed: int = 0) -> Operand:
    """Return an operand of zeros."""
    forms = layout.buffers(rows, columns, slots)
    buffers = {name: torch.zeros(form.shape, dtype=BUFFER_DTYPES[form.dtype]) for name, form in forms.items()}
    return Operand(layout, rows, columns, buffers, seed, slots=slots)


def launches(layout: NMLayout, shape: Shape, slots: list[int], dtype: torch.dtype) -> list[Launch]:
    """Return the launches of one product with one layout; tokens of slot 0 and up."""
    parts, columns = shape
    table = OperandTable(max(slots) + 1, parts, columns, "cpu")
    table.put(0, [[operand(layout, rows, columns)] for rows in parts])
    x = torch.empty(len(slots), columns, dtype=dtype)
    outputs = [torch.empty(len(slots), rows, dtype=dtype) for rows in parts]
    segments = Segments.of(slots, table.slots, "cpu")
    return recorded(lambda: launch_products(outputs, x, table, segments))


def cases() -> dict[str, Callable[[], list[Launch]]]:
    """Return what is compiled: names, and functions that give launches."""
    bf16 = torch.bfloat16
    found: dict[str, Callable[[], list[Launch]]] = {}

    def add(name: str, layout: NMLayout, shape: Shape, slots: list[int]) -> None:
        found[f"{layout.describe()}, {name}"] = lambda: launches(layout, shape, slots, bf16)

    many = list(range(MANY))
    for share in (1, 4):
        add("one token", NMLayout(1, 32, 4, share=share), SQUARE, [0])
        add("many slots", NMLayout(1, 32, 4, share=share), GATE_UP, many)
        add("many slots", NMLayout(1, 8, 1, "seeded", "midrise", share), GATE_UP, many)
        add("many slots", NMLayout(4, 16, 4, share=share), GATE_UP, many)
    add("tiles of four tokens", NMLayout(1, 32, 4), QKV, [0] * 32)
    add("one token of long rows", NMLayout(1, 32, 4), DOWN, [0])
    add("one token", NMLayout(4, 16, 4, "fixed"), SQUARE, [0])
    add("many slots", NMLayout(1, 32, 4, "fixed", share=4), GATE_UP, many)
    add("entries", NMLayout(4, 16, 4, scale_group=128), SQUARE, [0])
    add("prefill", NMLayout(1, 32, 4), GATE_UP, [0] * 128)
    add("prefill", NMLayout(4, 16, 4, "fixed", share=4), DOWN, [0] * 128)

    def fuse(layout: NMLayout) -> None:
        parts, columns = QKV
        table = OperandTable(1, parts, columns, "cpu")
        table.put(0, [[operand(layout, rows, columns)] for rows in parts])
        x, weight = torch.empty(1, columns, dtype=bf16), torch.empty(4096, columns, dtype=bf16)
        outputs = [torch.empty(1, rows, dtype=bf16) for rows in parts]
        launch.launch_fused(outputs, x, [weight] * 3, table.layout_tables(slice(0, 3))[0], 0)

    for share in (1, 4):
        layout = NMLayout(1, 32, 4, share=share)
        found[f"{layout.describe()}, fused"] = lambda layout=layout: recorded(lambda: fuse(layout))
    layout = NMLayout(1, 32, 4)
    one = operand(layout, 4096, 4096)
    base = torch.empty(4096, 4096, dtype=bf16)
    found["expand"] = lambda: recorded(lambda: launch.launch_expand(one, base, base, 0, 4096))
    of_seed_1 = operand(layout, 4096, 4096, seed=1)
    found["expand, seed 1"] = lambda: recorded(lambda: launch.launch_expand(of_seed_1, base, base, 0, 4096))

    def embed() -> None:
        table = OperandTable(1, [4096], 4096, "cpu")
        table.put(0, [[one]])
        ids = torch.zeros(4, dtype=torch.int64)
        launch.launch_embedding(base[:4], ids, table.layout_tables(slice(0, 1))[0], Segments.of([0] * 4, 1, "cpu"))

    found["embedding"] = lambda: recorded(embed)

    def packed(layout: TermLayout, slots: int = 0) -> list[Launch]:
        parts, columns = GATE_UP
        table = OperandTable(MANY, parts, columns, "cpu")
        table.put(0, [[operand(layout, rows, columns, slots)] for rows in parts])
        x = torch.empty(MANY, columns, dtype=bf16)
        outputs = [torch.empty(MANY, rows, dtype=bf16) for rows in parts]
        segments = Segments.of(many, MANY, "cpu")
        return recorded(lambda: launch_products(outputs, x, table, segments))

    for kind, known in CASES.items():
        for name, (layout, slots) in known.compiled.items():
            for number, suffix in enumerate(known.launches or ("",)):
                case = f"{kind} {name}, {suffix}" if suffix else f"{kind} {name}"
                found[case] = lambda layout=layout, slots=slots, number=number: [packed(layout, slots)[number]]
    return found


def main() -> None:
    """Print each case's figures as they come."""
    for name, make in cases().items():
        ((kernel, arguments),) = make()
        sys.stdout.write(json.dumps({"case": name, **described(kernel, arguments)}) + "\n")


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("Triton interprets")
    main()
