"""Hooks that add up the second moments of what linear modules are given."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self

import torch

from deltafmt.calibration.callbacks import Moments, OnModule
from deltafmt.calibration.modules import Linear, replace_weight
from deltafmt.errors import NonFiniteError


class Gatherer:
    """Sums of x x^T for linear modules, while it is entered.

    Modules that are given the same tensor, as q, k and v are, share the product, not the sum.

    Args:
        linears: the modules.
        double: add up in float64; the products of a batch stay in float32.
        stop_at: a module whose inputs are added up, but which shall not run: :class:`Stop` is raised instead.
    """

    def __init__(self, linears: Iterable[Linear], *, double: bool = False, stop_at: str | None = None) -> None:
        self.linears = {linear.name: linear for linear in linears}
        self.called: list[str] = []
        self._dtype = torch.float64 if double else torch.float32
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
            self._sums[name] = torch.zeros(product.shape, dtype=self._dtype, device=product.device)
            self._tokens[name] = 0
        self._sums[name] += product
        self._tokens[name] += inputs.numel() // inputs.shape[-1]

    def moments(self, name: str) -> Moments:
        """Return what was added up for a module that was called, and forget it.

        Raises:
            NonFiniteError: an input was NaN or infinite, or too large for its square.
        """
        total = self._sums.pop(name)
        if not bool(total.isfinite().all()):
            raise NonFiniteError(f'the activations that enter "{name}" are not finite')
        return Moments(total.to(torch.float32).cpu().numpy(), self._tokens[name], self.linears[name].axis)

    @property
    def uncalled(self) -> list[str]:
        """Names of modules that were given nothing."""
        return [name for name in self.linears if name not in self._tokens]


def hand_out(gatherer: Gatherer, on_module: OnModule) -> bool:
    """Call back for every module that was called, in that order; tell whether a weight was replaced.

    All moments are those of the modules as they were when they were gathered.

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


class Stop(Exception):  # noqa: N818  # no error: it ends a forward pass that has given what was wanted
    """Ends a forward pass."""
