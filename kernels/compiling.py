"""Compiling variants of kernels ahead of their first launch, in processes beside this one.

Triton keeps what it has compiled in a cache on disk, by the source, the constants and the target. The processes here
have Triton go the very way of a launch, up to the launch itself, so that the later launch finds what they have made.
They need no GPU: a driver that knows its target and nothing else stands in for CUDA's.

``python -m deltafmt.kernels.compiling`` is such a process. It reads a line of JSON for each variant and answers with
one.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import torch

from deltafmt.errors import DeltafmtError, UsageError
from deltafmt.kernels.variants import Variant


class Compiled(NamedTuple):
    """How the compilation of one variant went.

    Attributes:
        variant: which.
        cached: True if Triton's cache had it.
        error: what went wrong, in one line; empty if nothing did.
    """

    variant: Variant
    cached: bool
    error: str = ""


def parse_target(text: str) -> tuple[str, int]:
    """Return the backend and the architecture that a text such as ``cuda:90`` names.

    Raises:
        UsageError: the text is of another form.
    """
    backend, _, number = text.partition(":")
    if backend != "cuda" or not number.isdecimal() or not 70 <= int(number) <= 999:
        raise UsageError(f"target {text!r} is not like cuda:90, the compute capability 9.0 without its dot")
    return backend, int(number)


def target_of(device: torch.device) -> str:
    """Return the target that kernels are compiled for on a GPU, such as ``cuda:90``."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda:{10 * major + minor}"


def compile_variants(
    variants: Sequence[Variant],
    target: str,
    workers: int | None = None,
    done: Callable[[Compiled], None] = lambda _: None,
) -> list[Compiled]:
    """Compile variants into Triton's cache, in processes of their own.

    Args:
        variants: what to compile.
        target: such as ``cuda:90``.
        workers: the number of processes; by default one for each processor.
        done: called in one thread at a time, as each is finished.

    Raises:
        UsageError: the target is none.
        DeltafmtError: a process failed.
    """
    parse_target(target)
    held = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(len(variants), held if workers is None else workers)
    waiting: SimpleQueue[Variant] = SimpleQueue()
    for variant in variants:
        waiting.put(variant)
    found: list[Compiled] = []
    errors: list[BaseException] = []
    lock = threading.Lock()

    def note(one: Compiled) -> None:
        with lock:
            found.append(one)
            done(one)

    def work() -> None:
        try:
            _feed(waiting, target, note)
        except BaseException as error:  # noqa: BLE001 - raised by the caller's thread
            errors.append(error)

    threads = [threading.Thread(target=work, daemon=True, name=f"deltafmt-compile-{i}") for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found


def _feed(waiting: SimpleQueue[Variant], target: str, note: Callable[[Compiled], None]) -> None:
    """Run one process, and give it variants until none is left."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-m", "deltafmt.kernels.compiling", target]
    with subprocess.Popen(  # noqa: S603 - our own module
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        says: list[str] = []
        reader = threading.Thread(target=says.extend, args=(process.stderr,), daemon=True)
        reader.start()
        try:
            while True:
                try:
                    variant = waiting.get_nowait()
                except Empty:
                    break
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(json.dumps(variant) + "\n")
                    process.stdin.flush()
                line = process.stdout.readline()
                if not line:
                    reader.join(1)
                    last = next((text.strip() for text in reversed(says) if text.strip()), "it ended")
                    raise DeltafmtError(f"a process that compiles kernels failed: {last}")
                answer = json.loads(line)
                note(Compiled(variant, answer["cached"], answer["error"]))
            process.stdin.close()
        except BaseException:
            process.kill()
            raise


def load_variants(variants: Sequence[Variant], device: torch.device) -> None:
    """Load variants from Triton's cache onto a GPU, so that the first launch finds them there.

    What the cache lacks is compiled here and now.
    """
    with torch.cuda.device(device):
        for variant in variants:
            made = variant.kernel().warmup(grid=(1,), **variant.values())
            load = getattr(made, "_init_handles", None)
            if load is not None:
                load()


class _Driver:
    """Stands in for CUDA's driver where kernels are compiled and never launched."""

    def __init__(self, backend: str, architecture: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget(backend, architecture, 32)

    def get_current_target(self) -> Any:
        """Return what is compiled for."""
        return self._target

    def get_current_device(self) -> int:
        """Return the number of the device."""
        return 0

    def get_current_stream(self, _device: int) -> int:
        """Return the stream, which nothing is given to."""
        return 0


def _build_launcher(made: Any) -> None:
    """Have Triton build what launches a kernel, which some of its versions compile with a C compiler of its own.

    That needs CUDA's library. Where it is missing, no kernel is launched either.
    """
    with contextlib.suppress(Exception):
        from triton.backends.nvidia.driver import CudaLauncher

        CudaLauncher(made.src, made.metadata)


@contextlib.contextmanager
def _hits() -> Iterator[list[bool]]:
    """Give a list to which Triton adds, for each compilation, whether its cache had the result."""
    from triton import knobs

    found: list[bool] = []
    before = knobs.compilation.listener
    knobs.compilation.listener = lambda **known: found.append(bool(known["cache_hit"]))
    try:
        yield found
    finally:
        knobs.compilation.listener = before


def main() -> None:
    """Compile what the lines of standard input say."""
    from triton.runtime.driver import driver

    driver.set_active(_Driver(*parse_target(sys.argv[1])))  # type: ignore[arg-type, unused-ignore]
    answers, sys.stdout = sys.stdout, sys.stderr  # compilers print
    for line in sys.stdin:
        variant = Variant(*json.loads(line))
        error = ""
        with _hits() as hits:
            try:
                made = variant.kernel().warmup(grid=(1,), **variant.values())
                _build_launcher(made)
            except Exception as caught:  # noqa: BLE001 - told to the process that asked
                error = f"{type(caught).__name__}: {' '.join(str(caught).split())}"[:400]
        answers.write(json.dumps({"cached": bool(hits) and all(hits), "error": error}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
