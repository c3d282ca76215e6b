"""Models whose rows use several deltas, each beside the fine-tunes themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import deltafmt
from deltafmt.transformers import attach

Name = str | None


class Mixed:
    """A model with two deltas, and the fine-tunes that they stand for.

    Attributes:
        model: the base with the deltas.
        alone: the base, under None, and the fine-tunes.
    """

    def __init__(self, folder: Path, base: Any, changed: Callable[[str, Any], bool] | None = None) -> None:
        self.alone: dict[Name, Any] = {None: base}
        paths = {}
        save_file(_state(base), folder / "base.safetensors")
        for number, name in enumerate(("one", "two")):
            tuned = copy.deepcopy(base)
            generator = torch.Generator().manual_seed(number + 1)
            with torch.no_grad():
                for key, parameter in tuned.named_parameters():
                    plain = next(tuned.get_submodule(key.rpartition(".")[0]).children(), None) is None
                    change = 0.1 * torch.randn(parameter.shape, generator=generator)
                    if plain and (changed is None or changed(key, parameter)):
                        parameter.add_(change)
            save_file(_state(tuned), folder / f"{name}.safetensors")
            paths[name] = folder / f"{name}.deltafmt"
            deltafmt.pack(folder / "base.safetensors", folder / f"{name}.safetensors", paths[name], exclude=["*"])
            self.alone[name] = tuned
        self.model: Any = attach(copy.deepcopy(base), paths)

    def check(self, names: Sequence[Name], call: Callable[[Any, slice], torch.Tensor]) -> None:
        """Compare each row of a mixed call with the same row of the fine-tune that it names."""
        with torch.no_grad(), self.model.delta(list(names)):
            found = call(self.model, slice(None))
        with torch.no_grad():
            for row, name in enumerate(names):
                want = call(self.alone[name], slice(row, row + 1))
                assert bool((found[row : row + 1] - want).abs().max() <= 2e-4 * want.abs().max()), (row, name)

    @property
    def steady(self) -> bool:
        """True if no call need be followed again."""
        return all(form.steady for form in self.model.deltas.forms._known.values())


def _state(model: Any) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}
