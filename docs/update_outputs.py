"""Rewrite what the commands in the README and the pages print, from real runs.

    python docs/update_outputs.py [PAGE ...]

Run it after a change of the output, and read what ``git diff docs README.md`` shows. The same blocks are compared by
``tests/test_docs_commands.py``; the rules for them are in ``docs/console_blocks.py``.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from console_blocks import ROOT, Folder, pages, rewritten, steps


def update(page: Path) -> int:
    """Run a page's commands and rewrite their outputs; return how many changed."""
    text = page.read_text("utf-8")
    found = steps(text)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Folder(Path(temporary))
        outputs = [rewritten(step.shown, folder.run(step.command)) for step in found]
    changed = 0
    for step, output in reversed(list(zip(found, outputs, strict=True))):
        if output != step.shown:
            text = text[: step.start] + "".join(f"{line}\n" for line in output) + text[step.stop :]
            changed += 1
    page.write_text(text, "utf-8")
    return changed


def main() -> None:
    """Update the pages named, or all."""
    for page in [Path(name).resolve() for name in sys.argv[1:]] or pages():
        print(f"{page.relative_to(ROOT)}: {update(page)} outputs changed")


if __name__ == "__main__":
    main()
