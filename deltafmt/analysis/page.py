"""Pages without scripts, fonts and network, light or dark as the reader prefers: their frame, and writing them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from deltafmt.analysis import svg
from deltafmt.analysis.tables import Table
from deltafmt.errors import Remedy, UsageError
from deltafmt.output import OutputLock, storage_error, sync_folder

_LIGHT = ["1f77b4", "d95f02", "1b9e77", "c2255c", "7048e8", "a07000", "0b7285", "868e96", "5c940d", "9c36b5"]
_DARK = ["6db3f2", "ff9f57", "4fd3a8", "ff7aa2", "a99bff", "e0b83a", "53c7d9", "adb5bd", "a9d65c", "d98be8"]

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5c6370; --line: #d9dde3; --page: #ffffff; LIGHT }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #9aa2ad; --line: #363b43; --page: #16181c; DARK }
}
body { margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: var(--ink); background: var(--page);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
p { max-width: 46rem; } .note { color: var(--soft); }
svg { width: 100%; height: auto; max-width: 52rem; display: block; margin: 1rem 0; }
svg text { fill: var(--ink); font: 11px system-ui, sans-serif; }
svg .title { font-size: 13px; font-weight: 600; } svg .label, svg .tick { text-anchor: middle; }
svg .tick { fill: var(--soft); } svg .tick.y { text-anchor: end; }
svg .grid { stroke: var(--line); stroke-width: 1; } svg .axis { stroke: var(--soft); fill: none; }
svg .line { fill: none; stroke-width: 1.8; } svg .dashed { stroke-dasharray: 5 3; }
svg .median { stroke: var(--page); stroke-width: 2; } svg circle, svg rect { stroke: none; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; } th:first-child, td:first-child { text-align: left; padding-left: 0; }
COLORS"""


def save(text: str, path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Write a page to a file.

    Raises:
        UsageError: the file exists, and ``force`` is not given.
        StorageError: the file cannot be written.
    """
    target = Path(path)
    if not force and os.path.lexists(target):
        raise UsageError(f"{path} exists", Remedy("force"))
    # The page appears whole or not at all.
    partial = target.parent / f".{target.name}.partial"
    try:
        lock = OutputLock(target.parent / f".{target.name}.partial.lock", target)
        try:
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o644)
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
            sync_folder(target.parent)
        finally:
            partial.unlink(missing_ok=True)
            lock.remove()
    except OSError as error:
        raise storage_error("cannot write", path, error) from error


def page(title: str, opening: str, parts: Iterable[str]) -> str:
    """Return a page as text: its title, a sentence or two below it, and its parts as HTML; empty parts are left out."""
    head = f'<meta charset="utf-8"><title>{svg.text(title)}</title>'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    start = [f"<h1>{svg.text(title)}</h1>", f'<p class="note">{svg.text(opening)}</p>']
    body = "\n".join([*start, *(part for part in parts if part)])
    head += f"<style>{_style()}</style>"
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>{head}</head>\n<body>\n{body}\n</body>\n</html>\n'


def section(table: Table, charts: Sequence[str]) -> str:
    """Return a table with its title, note and charts; empty if it has no rows."""
    if len(table.rows) < 2:
        return ""
    head = "".join(f"<th>{svg.text(cell)}</th>" for cell in table.rows[0])
    rows = "".join("<tr>" + "".join(f"<td>{svg.text(cell)}</td>" for cell in row) + "</tr>\n" for row in table.rows[1:])
    drawn = "\n".join(charts)
    return (
        f'<h2>{svg.text(table.title)}</h2>\n<p class="note">{svg.text(table.note)}</p>\n{drawn}\n'
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{rows}</tbody></table></div>'
    )


def _style() -> str:
    light, dark = (" ".join(f"--c{i}: #{color};" for i, color in enumerate(colors)) for colors in (_LIGHT, _DARK))
    rules = "".join(
        f"svg .line.c{i} {{ stroke: var(--c{i}); }} svg circle.c{i}, svg rect.c{i} {{ fill: var(--c{i}); }}\n"
        for i in range(svg.COLORS)
    )
    return STYLE.replace("LIGHT", light).replace("DARK", dark).replace("COLORS", rules)
