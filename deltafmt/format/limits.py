"""How much a delta file may ask of its reader: memory, work and output (docs/security.md).

Every limit has a default that follows the size of the file, and of the base where there is one. A file that asks for
more is refused before the work starts, and the message names the limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NoReturn

from deltafmt.errors import InvalidFileError, Remedy, UsageError

MIB: Final = 1 << 20

# The defaults: a constant, so much for each byte of the file, and so much for each byte of the base.
MEMORY: Final = (128 * MIB, 64, 0)
ELEMENTS: Final = (1 << 24, 1 << 15, 1 << 8)
OUTPUT: Final = (32 * MIB, 256, 4)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a reader gives for a delta file at most; None for the default, which any real model meets.

    Attributes:
        max_memory: bytes that the file may make its reader hold at once: its decoded index, a tensor of a compressed
            section, the factors of a module. By default 128 MiB and 64 bytes for each byte of the file.
        max_elements: products and sums that decoding may take: the elements of every term, for ``lowrank`` once for
            each vector. By default 2**24, 2**15 for each byte of the file and 2**8 for each byte of the base.
        max_output: bytes that the file may become: its sections decoded, and what is written from it. By default
            32 MiB, 256 bytes for each byte of the file and 4 for each byte of the base.

    Raises:
        UsageError: a limit is below 1.
    """

    max_memory: int | None = None
    max_elements: int | None = None
    max_output: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_memory", "max_elements", "max_output"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} = {value} is below 1")

    def memory(self, file_bytes: int) -> int:
        """Return the bytes of memory that a file of this size may take."""
        return _limit(self.max_memory, MEMORY, file_bytes, 0)

    def check_memory(self, needed: int, file_bytes: int, what: str) -> None:
        """Refuse a file of this size if ``what`` would take more than the memory allowed.

        Raises:
            InvalidFileError: names what is needed and the limit.
        """
        limit = self.memory(file_bytes)
        if needed > limit:
            _refuse(what, needed, "bytes of memory", limit, "max_memory")

    def check_elements(self, needed: int, file_bytes: int, base_bytes: int, what: str) -> None:
        """Refuse a file if ``what`` would take more products and sums than are allowed.

        Raises:
            InvalidFileError: names what is needed and the limit.
        """
        limit = _limit(self.max_elements, ELEMENTS, file_bytes, base_bytes)
        if needed > limit:
            _refuse(what, needed, "elements", limit, "max_elements")

    def check_output(self, needed: int, file_bytes: int, base_bytes: int, what: str) -> None:
        """Refuse a file if ``what`` would become more bytes than are allowed.

        Raises:
            InvalidFileError: names what is needed and the limit.
        """
        limit = _limit(self.max_output, OUTPUT, file_bytes, base_bytes)
        if needed > limit:
            _refuse(what, needed, "bytes", limit, "max_output")


DEFAULT_LIMITS: Final = Limits()


def _limit(given: int | None, default: tuple[int, int, int], file_bytes: int, base_bytes: int) -> int:
    constant, of_file, of_base = default
    return constant + of_file * file_bytes + of_base * base_bytes if given is None else given


def _refuse(what: str, needed: int, unit: str, limit: int, name: str) -> NoReturn:
    message = f"{what} {needed:,} {unit}, and {name} is {limit:,}"
    raise InvalidFileError(message, Remedy("limits", name.replace("_", "-")))
