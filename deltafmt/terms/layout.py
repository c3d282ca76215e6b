"""The base class of the layouts of all kinds of terms (specification, section 7.3)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from deltafmt.format.checks import Where
from deltafmt.terms.tiles import BufferForm


class TermLayout(ABC):
    """How a term of one kind arranges its numbers: a value, equal to another with the same parameters.

    A kind's layout is a frozen dataclass derived from this class. What it does not define keeps the default from here.

    Attributes:
        kind: the kind's name in the index.
        has_slots: True if a term says how many slots it has, on which the lengths of its buffers depend.
        counted_as: the label under which ``inspect`` counts each buffer.
    """

    __slots__ = ()

    kind: ClassVar[str]
    has_slots: ClassVar[bool] = False
    counted_as: ClassVar[Mapping[str, str]]

    @property
    def seeded(self) -> bool:
        """True if a term has a seed."""
        return False

    @property
    def cold_only(self) -> bool:
        """True if only a ``cold`` file may have this layout in its table."""
        return False

    @property
    def drops_most(self) -> bool:
        """True if the layout keeps less than half of each row; the errors of a narrow row may then not average out."""
        return False

    def plain(self) -> TermLayout:
        """Return the layout of the form that is digested and that kernels read; for most kinds the layout itself."""
        return self

    @property
    def converted_buffers(self) -> tuple[str, ...]:
        """The names of the buffers that hold other bytes in the plain layout, even where they have the same shape."""
        return ()

    def for_profile(self, profile: str) -> TermLayout:  # noqa: ARG002 - most kinds are the same in both
        """Return the layout that ``repack`` gives a term of this layout in a profile."""
        return self

    @abstractmethod
    def buffers(self, rows: int, columns: int, slots: int = 0) -> dict[str, BufferForm]:
        """Return the arrays of a term by name, sorted: the order in which they are stored and digested.

        Raises:
            UsageError: a term of this shape cannot have so many slots, or so many vectors.
        """

    def buffer_lengths(self, rows: int, columns: int, slots: int = 0) -> dict[str, int]:
        """Return the byte lengths of :meth:`buffers`."""
        return {name: form.nbytes for name, form in self.buffers(rows, columns, slots).items()}

    @classmethod
    @abstractmethod
    def from_obj(cls, obj: Any, where: Where) -> Self:
        """Check a row of the layout table.

        Raises:
            InvalidFileError: names the place and the value.
        """

    @abstractmethod
    def to_obj(self) -> dict[str, Any]:
        """Return the index's form of this layout, its keys sorted."""

    @abstractmethod
    def describe(self) -> str:
        """Return a short form, without the kind."""
