"""Wrong readers of progressive files (sections 17.7 and 17.8)."""

from __future__ import annotations

from .wrong import patched

patched(
    "pipeline.exact_parts",
    ("terms are not multiplied with their factors", "progressive", "part = matrix * factor", "part = matrix"),
    (
        "terms are added in the wrong order",
        "progressive",
        "zip(self._factors, self._decoder.matrices(start, stop), strict=True)",
        "[*zip(self._factors, self._decoder.matrices(start, stop), strict=True)][::-1]",
    ),
    (
        "new rows are predicted by zeros",
        "progressive",
        "units[low - first :] = new[low - shared : end - shared]",
        "units[low - first :] = 0",
    ),
)
patched(
    "exact.chunk",
    (
        "units that are marked come first",
        "progressive",
        "marked = marks if form == SORTED else None",
        "marked = ~marks if form == SORTED and marks is not None else None",
    ),
    ("marks are not seen", "progressive", "marked = marks if form == SORTED else None", "marked = None"),
    (
        "marks are not seen at places",
        "progressive",
        "differences, prediction.take(places), unit, unit, of_places)",
        "differences, prediction.take(places), unit, unit, None)",
    ),
)
patched(
    "terms.nm.codec",
    (
        "an entry of value zero is not marked",
        "progressive",
        "found: NDArray[np.bool_] = dense(self.layout, NMArrays(positions, lowest, ones), columns) != 0",
        "found: NDArray[np.bool_] = self.decode(packed, start, stop) != 0",
    ),
)
patched(
    "terms.sparse.codec",
    (
        "entries of a sparse term are not marked",
        "progressive",
        "found[row[inside], column[inside]] = True",
        "found[row[inside], column[inside]] = False",
    ),
)
patched(
    "container.served",
    ("the end of a served part lists all sections", "progressive-files", 'obj["sections"][:number]', 'obj["sections"]'),
    ("the end of a served part names files", "progressive-files", 'obj.pop("files", None)', "pass"),
)
