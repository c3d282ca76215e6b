"""The gatherer: hooks that add up the second moments of the inputs of linear modules."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self

import torch

from deltafmt.calibration.callbacks import Moments, OnModule
from deltafmt.calibration.modules import Linear, replace_weight
from deltafmt.errors import NonFiniteError


class Gatherer:
    """Within a ``with`` block, add up x x^T over all inputs x of linear modules.

    Modules that receive the same tensor, as q, k and v do, share the product of a batch; each has its own sum.

    Args:
        linears: the modules.
        stop_at: the name of a module that need not run: its inputs are added up, then :class:`Stop` is raised.
    """

    def __init__(self, linears: Iterable[Linear], *, stop_at: str | None = None) -> None:
        self.linears = {linear.name: linear for linear in linears}
        self.called: list[str] = []
        self._stop_at = stop_at
        self._sums: dict[str, torch.Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def __enter__(self) -> Self:
        self._handles = [
            linear.module.register_forward_pre_hook(self._hook(linear), with_kwargs=True)
            for linear in self.linears.values()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._last = None

    def _hook(self, linear: Linear) -> Any:
        def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = args[0] if args else kwargs["input"]
            self._add(linear, inputs)
            if linear.name == self._stop_at:
                raise Stop

        return hook

    def _add(self, linear: Linear, inputs: torch.Tensor) -> None:
        if self._last is None or self._last[0] is not inputs:
            flat = inputs.detach().reshape(-1, inputs.shape[-1]).to(torch.float32)
            self._last = inputs, flat.T @ flat
        product = self._last[1]
        name = linear.name
        if name not in self._sums:
            self.called.append(name)
            self._sums[name] = torch.zeros_like(product)
            self._tokens[name] = 0
        self._sums[name] += product
        self._tokens[name] += inputs.numel() // inputs.shape[-1]

    def moments(self, name: str) -> Moments:
        """Return the moments of a module that was called, and free its sum.

        Raises:
            NonFiniteError: an input was NaN or infinite, or so large that its square is infinite.
        """
        total = self._sums.pop(name)
        if not bool(total.isfinite().all()):
            raise NonFiniteError(f'the activations that enter "{name}" are not finite')
        return Moments(total.cpu().numpy(), self._tokens[name], self.linears[name].axis)

    @property
    def uncalled(self) -> list[str]:
        """The names of the modules that were never called."""
        return [name for name in self.linears if name not in self._tokens]


def hand_out(gatherer: Gatherer, on_module: OnModule) -> bool:
    """Call ``on_module`` for every module that was called, in that order; return True if a weight was replaced.

    All moments were gathered before the first weight is replaced.

    Raises:
        NonFiniteError: the inputs of a module are not finite.
        UsageError: a new weight does not fit.
    """
    replaced = False
    for name in gatherer.called:
        linear = gatherer.linears[name]
        new = on_module(name, linear.weight_name, gatherer.moments(name))
        if new is not None:
            replace_weight(linear, new)
            replaced = True
    return replaced


class Stop(Exception):  # noqa: N818  # not an error
    """Raised in a hook to end a forward pass early, once all wanted inputs were seen."""
