"""How often the tensors of a chain are computed, which crossing parts can multiply from link to link."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final

from deltafmt.container.reader import Container
from deltafmt.delta import DeltaFile, work_of
from deltafmt.format.constants import element_count
from deltafmt.index.entries import TensorEntry

# What computing a tensor counts as at least: about so many elements take as long as the calls for a small one.
_LEAST: Final = 1 << 14


def check_chain_work(deltas: Sequence[DeltaFile], entries: Sequence[Sequence[TensorEntry]], base_bytes: int) -> None:
    """Refuse a chain that asks for more than its links' limits.

    A tensor of a link is computed for each tensor of the next link that is made of it. If every tensor is made of two,
    the tensors of the first link are computed once for each path through the chain: 2^20 times with 20 links.

    Args:
        deltas: the links in their order.
        entries: the entries of each link.
        base_bytes: bytes of the model that the first link is applied to.

    Raises:
        InvalidFileError: names the link and the limit.
    """
    asked = Counter({entry.name: 1 for entry in entries[-1]})
    for delta, held in zip(reversed(deltas), reversed(entries), strict=True):
        container, known = delta.container, {entry.name for entry in held}
        work, before = 0, Counter[str]()
        for name, times in asked.items():
            if name not in known:
                continue  # what is missing is told when it is looked for
            entry = delta.resolve(name)
            work += times * max(element_count(entry.shape) + work_of(entry, restores=True), _LEAST)
            for source in _sources(container, entry):
                before[source] += times
        what = f"{container.name}: with the links behind it, this link takes"
        container.limits.check_elements(work, container.size, base_bytes, what)
        asked = before


def _sources(container: Container, entry: TensorEntry) -> Iterator[str]:
    """Give the names of the tensors that a tensor is made of, each once; with scales, also the names of these."""
    if entry.base is None:
        return
    scaled = container.scaled()
    for name in {part.name for part in entry.base.parts} or {entry.name}:
        yield name
        if name in scaled and scaled[name].scales_name:
            yield scaled[name].scales_name
