"""Models that serve deltas: ``deltafmt.transformers.attach(model, {"math": "math.deltafmt"})``.

::

    model = deltafmt.transformers.attach(model, {"math": "math.deltafmt", "code": "code.deltafmt"})
    with model.delta("math"):
        model.generate(**inputs)
    with model.delta(["math", None, "code"]):  # a name for each row; None is the base alone
        model.generate(**inputs)
    model.generate(**inputs, delta="math")  # the same without a block
    model.generate_batch(prompts, delta=["math", None])  # continuous batching: a name for each request
    deltafmt.transformers.detach(model)

Importing this module without torch raises :class:`deltafmt.errors.MissingExtraError`, an ``ImportError``. The package
transformers is not imported: every model of torch modules can be served.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from deltafmt.checkpoint.renames import Renames
from deltafmt.errors import MissingExtraError, UsageError
from deltafmt.extras import lacking

if _missing := lacking("deltafmt.transformers", "torch", extra="transformers"):
    raise MissingExtraError(_missing)

import torch
from torch import nn

from deltafmt.runtime.attach import Deltas
from deltafmt.runtime.warmup import TOKENS

__all__ = ["attach", "detach"]

M = TypeVar("M", bound=nn.Module)


def attach(
    model: M,
    deltas: Mapping[str, str | os.PathLike[str]],
    *,
    device: torch.device | str | None = None,
    budget: int | None = None,
    host_budget: int = 0,
    verify_base: bool = True,
    ignore: Sequence[str] = (),
    rename: Callable[[str], str] | Sequence[str] | None = None,
    strip_prefix: Sequence[str] = (),
    fuse: bool = True,
    warmup: bool | Sequence[int] = False,
) -> M:
    """Attach deltas to their base and return the same model, which then has ``delta`` and ``deltas``.

    ``model.delta(names)`` serves deltas within a ``with`` block (:meth:`deltafmt.runtime.attach.Deltas.use`);
    ``model(...)``, ``model.generate(...)`` and ``model.generate_batch(...)`` take ``delta=names``. ``model.deltas``
    manages the deltas: ``add``, ``replace``, ``remove``, ``prefetch``, ``merge``, ``unmerge``. The model keeps its
    class, parameters and state dict. A call without names outside of all blocks computes what it did before, bit for
    bit.

    Args:
        model: any model of linear, embedding and other innermost modules, quantized or not.
        deltas: files by name; more can be added later.
        device: where the deltas go; that of the model's parameters if not given.
        budget: bytes of deltas on the device; the least recently used leave first. None for no bound.
        host_budget: bytes of deltas in host memory, from which one comes back quicker than from its file.
        verify_base: compare the model's parameters with the fingerprints of every delta's base. What cannot be
            compared, because the model is quantized or narrower, is listed in ``model.deltas.unchecked``.
        ignore: tensors whose names match one of these patterns are left out, for example a head the model lacks.
        rename: rules FROM=TO that say what a name in a file is in the model, or a function that gives the model's name.
            FROM is how the name begins, or a pattern with ``*``. Names that differ in a known way need no rule.
        strip_prefix: beginnings of the files' names that do not count.
        fuse: have linear modules that are given the same input (q, k and v) share a launch.
        warmup: compile and load the kernels now, for some minutes if none was compiled before, so that no request has
            to wait for that; True, or the numbers of tokens to be served (see :meth:`.runtime.attach.Deltas.warmup`).

    Raises:
        UsageError: the model has deltas already or is offloaded, a tensor has no place in it, or a delta alone exceeds
            the budget.
        WrongBaseError: the model is not a delta's base; names the first tensor that differs.
        StorageError, InvalidFileError: a file cannot be read.
    """
    for attribute in ("delta", "deltas"):
        if hasattr(model, attribute):
            raise UsageError(f'{type(model).__name__} has "{attribute}" already; model.deltas.add attaches another')
    attached = Deltas(
        model,
        device=device,
        budget=budget,
        host_budget=host_budget,
        verify_base=verify_base,
        ignore=ignore,
        rename=_renaming(rename, strip_prefix),
        fuse=fuse,
    )
    try:
        for name, path in deltas.items():
            attached.add(name, path)
        if warmup is not False:
            attached.warmup(TOKENS if warmup is True else warmup)
    except BaseException:
        attached.close()
        raise
    model.__dict__["deltas"] = attached
    model.__dict__["delta"] = attached.use
    return model


def _renaming(
    rename: Callable[[str], str] | Sequence[str] | None, strip_prefix: Sequence[str]
) -> Callable[[str], str] | None:
    """Return the function that rules and prefixes say, or None if there are none.

    Raises:
        UsageError: a rule is not of the form FROM=TO, or prefixes stand beside a function.
    """
    if callable(rename):
        if strip_prefix:
            raise UsageError("strip_prefix stands beside a function that renames; let the function strip it")
        return rename
    rules = Renames.parse(rename or (), strip_prefix)
    return rules.apply if rules else None


def detach(model: nn.Module) -> None:
    """Take the deltas from a model, which is then what it was before they were attached.

    Raises:
        UsageError: it has none, or they are in use or merged.
    """
    attached = model.__dict__.get("deltas")
    if not isinstance(attached, Deltas):
        raise UsageError(f"{type(model).__name__} has no deltas attached")
    attached.close()
    del model.__dict__["deltas"], model.__dict__["delta"]
