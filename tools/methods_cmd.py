"""``deltafmt methods``: which methods there are, and what one of them does with which options."""

from __future__ import annotations

import argparse
import textwrap
from typing import TYPE_CHECKING, Any

from deltafmt.tools import console

if TYPE_CHECKING:
    from deltafmt.methods import Method

WIDTH = 100
EPILOG = """\
examples:
  deltafmt methods
  deltafmt methods residual
  deltafmt methods rtn --json
"""
CALIBRATION = {
    "none": "reads no calibration text",
    "optional": "can use a calibration text (pack --calibration FILE)",
    "required": "needs a calibration text (pack --calibration FILE)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("name", metavar="NAME", nargs="?", help="a method to explain; without it, all are listed")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from deltafmt.methods import METHODS
    from deltafmt.methods.spelling import find

    if options.name is not None:
        method = find(METHODS, options.name.partition(":")[0])
        if options.json:
            console.say_json({"ok": True, "method": method_obj(method)})
        else:
            _explain(method)
    elif options.json:
        console.say_json({"ok": True, "methods": [method_obj(method) for method in METHODS.values()]})
    else:
        console.table([[name, method.summary] for name, method in METHODS.items()], (False, False))
        console.say()
        console.say("deltafmt methods NAME explains one of them.")


def method_obj(method: type[Method]) -> dict[str, Any]:
    """Return everything there is to say of a method as a plain object."""
    from deltafmt.methods.declare import options_of

    return {
        "name": method.name,
        "summary": method.summary,
        "details": method.details,
        "paper": method.paper,
        "stores": method.stores,
        "calibration": method().calibration,
        "example": method.example,
        "options": [
            {
                "key": key,
                "flag": f"--{key.replace('_', '-')}",
                "type": each.type,
                "help": each.help,
                "values": each.possible,
                "choices": list(each.choices),
                "default": None if each.default[0] is None else each.write(each.default),
                "default_text": each.default_text,
                "needs": [need.text for need in method.needs.get(key, ())],
            }
            for key, each in options_of(method).items()
        ],
    }


def _explain(method: type[Method]) -> None:
    found = method_obj(method)
    console.say(f"{found['name']}: {found['summary']}")
    console.say()
    _say(found["details"])
    console.say()
    for title, text in (
        ("paper", found["paper"]),
        ("stores", found["stores"]),
        ("calibration", f"{found['name']} {CALIBRATION[found['calibration']]}"),
    ):
        _say(f"{title}: {text}", after="  ")
    console.say()
    console.say("options:")
    for each in found["options"]:
        _say(f"{each['key']}  ({each['values']}; default: {each['default_text']})", "  ", "      ")
        _say(each["help"], "      ")
        for need in each["needs"]:
            _say(f"needs {need}", "      ")
    console.say()
    console.say("example:")
    text = " --calibration text.txt" if found["calibration"] == "required" else ""
    console.say("  deltafmt pack base/ math/ -o math.deltafmt \\")
    console.say(f"    --method {found['example']}{text}")


def _say(text: str, before: str = "", after: str | None = None) -> None:
    """Print a text in lines of at most WIDTH characters."""
    for line in textwrap.wrap(
        text, WIDTH, initial_indent=before, subsequent_indent=before if after is None else after, break_on_hyphens=False
    ):
        console.say(line)
