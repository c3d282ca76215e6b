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
    "exact.differences",
    (
        "units that are marked come first",
        "progressive",
        "for half, part in ((~marks, planes[:, :first]), (marks, planes[:, first:])):",
        (
            "first = prediction.size - first\n    "
            "for half, part in ((marks, planes[:, :first]), (~marks, planes[:, first:])):"
        ),
    ),
    (
        "marks are not seen",
        "progressive",
        "    if marks is None:\n        return joined(planes, prediction, unit, key)\n",
        "    return joined(planes, prediction, unit, key)\n",
    ),
)
patched(
    "exact.chunk",
    (
        "marks are not seen at places",
        "progressive",
        "None if marks is None else marks[places])",
        "None)",
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
