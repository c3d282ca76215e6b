"""The plugin's options, which users give with the engine's: ``--additional-config '{"deltafmt": {...}}'``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from deltafmt._version import __version__
from deltafmt.errors import UsageError

KEY: Final = "deltafmt"
# What becomes part of the key of compiled code: compiled code of an engine without the plugin holds no operations.
_STAMP: Final = "plugin"


@dataclass(frozen=True, slots=True)
class Options:
    """The plugin's options.

    Attributes:
        open_files: the most delta files that a worker keeps open.
        largest: the bytes of the largest delta on a GPU, of which there is room for ``max_loras``; 0 for
            that of the deltas in ``prepare``, or an eighth of the base if there is none.
        prepare: deltas whose layouts CUDA graphs are captured for; other deltas of the same layouts need not be named.
    """

    open_files: int = 256
    largest: int = 0
    prepare: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: Any) -> Options:
        """Return the options of an engine.

        Raises:
            UsageError: an option is unknown, or has a value of another type.
        """
        given = _given(config)
        known = {field.name: field for field in fields(cls)}
        values: dict[str, Any] = {}
        for name, value in given.items():
            if name == _STAMP:
                continue
            if name not in known:
                raise UsageError(f'deltafmt has no option "{name}" in vLLM; it has {", ".join(known)}')
            if name == "prepare":
                if not isinstance(value, list) or not all(isinstance(path, str) for path in value):
                    raise UsageError(f'the option "prepare" of deltafmt is a list of paths, not {value!r}')
                values[name] = tuple(value)
                continue
            if type(value) is not int or value < 0:
                raise UsageError(f'the option "{name}" of deltafmt is a number of at least 0, not {value!r}')
            values[name] = value
        return cls(**values)


def _given(config: Any) -> Mapping[str, Any]:
    additional = getattr(config, "additional_config", None)
    given = additional.get(KEY, {}) if isinstance(additional, dict) else {}
    if not isinstance(given, dict):
        raise UsageError(f"the options of deltafmt are an object of names and values, not {given!r}")
    return given


def stamp(config: Any) -> None:
    """Make the plugin part of what the engine derives the key of its compiled code from."""
    additional = getattr(config, "additional_config", None)
    if isinstance(additional, dict):
        additional[KEY] = {**_given(config), _STAMP: __version__}
