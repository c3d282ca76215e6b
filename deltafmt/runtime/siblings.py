"""Siblings: linear modules that receive the same input (q, k and v; gate and up) share one product.

The siblings of usual architectures are known by their names. Others are found when a model first runs: modules that are
called one after the other with the very same tensor. From then on, the first of them computes the base's outputs of all
siblings, one launch adds the deltas, and the other outputs wait until their modules are called. If all tokens use one
delta and the base's weights are plain, base and delta are one product. On a GPU, a module without siblings is a group
of its own, for the sake of that product.

If a sibling is called with another tensor, or with the same tensor after a change, it computes its output by itself.
Torch does not count the changes of tensors that are made under ``torch.inference_mode``; nothing is shared there.
(``generate`` runs under ``torch.no_grad``.)

While the compiler looks on, the same is done without a selection: the code that it makes is the same for all of them.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from deltafmt.errors import UsageError
from deltafmt.kernels.products import can_fuse, fused_linear, matmul_, repeated_
from deltafmt.kernels.record import MAX_PARTS
from deltafmt.kernels.table import OperandTable
from deltafmt.runtime.frames import check_input, note_input, untraced
from deltafmt.runtime.operations import multiply_, new_key
from deltafmt.runtime.selection import Selection, Waiting
from deltafmt.runtime.sites import LinearSite
from deltafmt.runtime.standing import Standing
from deltafmt.runtime.uncopied import Uncopied
from deltafmt.runtime.values import version_of

# Names of modules of one parent that receive the same input.
_SHARED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
    ("wq", "wk", "wv"),
    ("w1", "w3"),
)
# An attention that takes one of these may give another input to keys and values.
_OTHER_INPUTS = frozenset(("key_value_states", "encoder_hidden_states", "encoder_output", "memory"))

Active = Callable[[], Selection | None]
After = Callable[[LinearSite, Any, Any, Any], Any]


@dataclass(slots=True, eq=False)
class SharedInput:
    """The modules that were called one after the other with the same tensor, which is the last input seen."""

    given: weakref.ref[torch.Tensor] | None = None
    version: int = 0
    sites: list[LinearSite] = field(default_factory=list)

    def observe(self, site: LinearSite, given: torch.Tensor) -> list[LinearSite]:
        """Note a call. If its input is a new one, return the modules that shared the input before."""
        same = self.given is not None and self.given() is given and self.version == version_of(given)
        if same and site not in self.sites and len(self.sites) < MAX_PARTS:
            self.sites.append(site)
            return []
        ended, self.sites = self.sites, [site]
        self.given, self.version = weakref.ref(given), version_of(given)
        return ended


def known_siblings(sites: Iterable[LinearSite], parents: Mapping[str, nn.Module]) -> list[list[LinearSite]]:
    """Return the sites that receive the same input, as their names say, in the order of their calls.

    Args:
        sites: those to be sorted.
        parents: the modules of the model by name.
    """
    by_parent: dict[str, dict[str, LinearSite]] = {}
    for site in sites:
        parent, _, name = site.name.rpartition(".")
        by_parent.setdefault(parent, {})[name] = site
    found = []
    for parent, children in by_parent.items():
        module = parents.get(parent)
        if module is None or not _OTHER_INPUTS.isdisjoint(inspect.signature(type(module).forward).parameters):
            continue
        for names in _SHARED:
            group = [children[name] for name in names if name in children]
            if len(group) > 1 and len({site.columns for site in group}) == 1:
                found.append(group)
    return found


class _Member(Uncopied):
    """One module of a group: its ``run`` is the module's forward while the group computes together.

    It is a method, because compiled code takes methods of equal modules for the same, and functions for different ones.
    """

    __slots__ = ("__weakref__", "group", "key", "number", "plain", "site")

    def __init__(self, group: Siblings, number: int, site: LinearSite, plain: Callable[..., Any]) -> None:
        self.group = group
        self.number = number
        self.site = site
        self.plain = plain
        self.key = new_key(self, group.standing.device)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output."""
        if torch.compiler.is_compiling():
            return self.group.traced(self.number, args, kwargs)
        return self.group.computed(self, args, kwargs)

    def computed(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output for code that is not compiled."""
        return self.group.computed(self, args, kwargs)

    def multiply(self, outputs: Sequence[torch.Tensor], given: torch.Tensor) -> None:
        """Add the products of the deltas that are served now to the output of this module alone."""
        multiply_now(outputs, given, self.site.table.operands, self.group.standing, [self.site])


class Siblings:
    """A group of linear modules with one operand table.

    Args:
        sites: the modules' sites, in the order of their calls.
        slots: the number of slots of the operand tables.
        active: a function that returns the selection of the calling thread, or None.
        after: adds the deltas to the output of a module that has no hook, as a hook would; it gives None if there are
            none.
        standing: what compiled code reads.

    Attributes:
        members: the modules' forwards.
        table: the operands of all modules.
        key: stands for the group in compiled code.
        plain: the modules' own forwards.
    """

    def __init__(self, sites: list[LinearSite], slots: int, active: Active, after: After, standing: Standing) -> None:
        self.sites = sites
        self._numbers = [id(site) for site in sites]
        self._active = active
        self._after = after
        self.standing = standing
        self.key = new_key(self, standing.device)
        self.plain = [site.module.forward for site in sites]
        self._slots: set[int] = set()
        self.table = self._new_table(slots)
        self._forwards: dict[int, tuple[Callable[..., Any], bool]] = {}
        for site in sites:
            for slot in site.table.slots:
                self.refresh(slot)
            self._forwards[id(site)] = site.module.forward, "forward" in site.module.__dict__
        self.members = [_Member(self, number, site, self.plain[number]) for number, site in enumerate(sites)]
        for member in self.members:
            member.site.module.forward = member.run

    def _new_table(self, slots: int) -> OperandTable:
        rows = [site.rows for site in self.sites]
        operands = self.sites[0].table.operands
        return OperandTable(slots, rows, operands.columns, operands.device, operands.memory)

    def refresh(self, slot: int) -> None:
        """Copy a slot from the modules' own tables, or clear it if none of them has it."""
        if any(slot in site.table.slots for site in self.sites):
            self.table.put(slot, [site.table.operands.operands(slot)[0] for site in self.sites])
            self._slots.add(slot)
        elif slot in self._slots:
            self.table.clear(slot)
            self._slots.discard(slot)

    def grow(self, slots: int) -> None:
        """Make the table larger, for ``slots`` slots."""
        self.table = self.table.grown(slots)

    def dissolve(self) -> None:
        """Give each module its own forward back."""
        for site in self.sites:
            forward, own = self._forwards[id(site)]
            if own:
                site.module.forward = forward
            else:
                site.module.__dict__.pop("forward", None)

    def computed(self, member: _Member, args: Any, kwargs: Any) -> Any:
        """Return a module's output, as the calling thread's selection wants it."""
        selection = self._active()
        if selection is None or not selection.touched:
            return member.plain(*args, **kwargs)
        site, output = member.site, None
        if selection.walk is not None:
            selection.walk.note(site, args, kwargs, None)
        if self._serves(selection) and shareable(args, kwargs):
            output = self._take(site, args[0], selection)
            if output is None and member.number == 0:
                output = self._compute(args[0], selection)
        # Everything is added here, whether the module has a hook or not: one may come or go while this runs.
        selection.finished.discard(id(site))
        selection.multiplied.discard(id(site))
        if output is None:
            output = member.plain(*args, **kwargs)
        else:
            selection.multiplied.add(id(site))
            if selection.walk is not None:
                selection.walk.same_rows(output, args[0])
        if id(site) in selection.multiplied and not selection.mixes and site.multiplies_only:
            selection.multiplied.discard(id(site))
            site.ran = True
        else:
            found = self._after(site, args, kwargs, output)
            selection.multiplied.discard(id(site))
            output = output if found is None else found
        if site.hooked:
            selection.finished.add(id(site))
        return output

    def traced(self, number: int, args: Any, kwargs: Any) -> Any:
        """Return a module's output while the compiler looks on: the same code for every selection.

        The first module's call computes for all, and the others take their outputs if they are given the same tensor.
        """
        if kwargs or len(args) != 1 or torch.is_grad_enabled():
            return untraced(self.members[number].computed, args, kwargs)
        given = args[0]
        if number == 0:
            outputs = [forward(given) for forward in self.plain]
            multiply_(outputs, given, self.key)
            if len(outputs) > 1:
                note_input(self.key, given)
                self.standing.ahead = self.key, given, [None, *outputs[1:]]
            return outputs[0]
        ahead = self.standing.ahead
        if ahead is not None and ahead[0] is self.key and ahead[1] is given and ahead[2][number] is not None:
            check_input(self.key, given)
            output = ahead[2][number]
            ahead[2][number] = None
            if number == len(self.plain) - 1:
                self.standing.ahead = None
            return output
        output = self.plain[number](given)
        multiply_([output], given, self.members[number].key)
        return output

    def multiply(self, outputs: Sequence[torch.Tensor], given: torch.Tensor) -> None:
        """Add the products of the deltas that are served now to the outputs of all modules."""
        multiply_now(outputs, given, self.table, self.standing, self.sites)

    def _serves(self, selection: Selection) -> bool:
        return not self._slots.isdisjoint(selection.used)

    @staticmethod
    def _take(site: LinearSite, given: torch.Tensor, selection: Selection) -> torch.Tensor | None:
        waiting = selection.waiting
        if waiting is None or waiting.given is not given or waiting.version != version_of(given):
            return None
        output = waiting.outputs.pop(id(site), None)
        if not waiting.outputs:
            selection.waiting = None
        return output

    def _compute(self, given: torch.Tensor, selection: Selection) -> torch.Tensor:
        """Return the first module's output with its deltas; the outputs of the others wait for their calls."""
        first, leading = self.sites[0], given.shape[:-1]
        order = first.order(selection, given, leading)
        outputs = self._compute_fused(given, selection) if selection.uniform else None
        if outputs is None:
            outputs = [self._forwards[number][0](given) for number in self._numbers]
            segments = order.segments()
            if not repeated_(outputs, given, self.table, segments):
                flat = [output.reshape(-1, output.shape[-1]) for output in outputs]
                x = given.to(flat[0].dtype).reshape(-1, given.shape[-1])
                matmul_(flat, x, self.table, segments)
                outputs = [output.view(*leading, -1) for output in flat]
        selection.waiting = Waiting(given, version_of(given), dict(zip(self._numbers[1:], outputs[1:], strict=True)))
        return outputs[0]

    def _compute_fused(self, given: torch.Tensor, selection: Selection) -> list[torch.Tensor] | None:
        """Return the modules' outputs, base and delta in one product; None if that is not possible.

        All tokens use one delta. It is possible if the base's weights are plain.
        """
        tokens = given.numel() // given.shape[-1]
        (slot,) = selection.used
        if not can_fuse(self.table, slot, tokens):
            return None
        weights = []
        for site in self.sites:
            weight = site.plain_weight(given)
            if weight is None or self._forwards[id(site)][1]:
                return None
            weights.append(weight)
        x = given.reshape(tokens, -1).contiguous()
        found = fused_linear(x, weights, self.table, slot)
        return None if found is None else [y.view(*given.shape[:-1], -1) for y in found]


def multiply_now(
    outputs: Sequence[torch.Tensor],
    given: torch.Tensor,
    table: OperandTable,
    standing: Standing,
    sites: Sequence[LinearSite],
) -> None:
    """Add the products of the deltas that are served now, within compiled code.

    Args:
        outputs: for each part of the table, shape (..., rows).
        given: shape (..., columns).
        table: the deltas.
        standing: what compiled code reads.
        sites: of the parts.

    Raises:
        UsageError: a slot may have more tokens than its kernel takes, which a captured graph could not tell.
    """
    where = sites[0].name
    tokens = given.numel() // given.shape[-1]
    segments = standing.segments(given, sites[0], where)
    if segments is None:
        return
    if given.is_cuda and tokens > table.fewest:
        raise UsageError(
            f"{where} has {tokens} tokens, and its deltas are compiled for {table.fewest}; call it as it is"
        )
    for site in sites:
        site.ran = True
    flat = [output.reshape(tokens, -1) for output in outputs]
    matmul_(flat, given.to(flat[0].dtype).reshape(tokens, -1), table, segments)
    for output, product in zip(outputs, flat, strict=True):
        if product.data_ptr() != output.data_ptr():  # a view was not possible
            output.copy_(product.view(output.shape))


def shareable(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether a call may be shared: it has one tensor, torch counts its changes, and no gradient is wanted."""
    if kwargs or len(args) != 1 or torch.is_grad_enabled():
        return False
    return isinstance(args[0], torch.Tensor) and not args[0].is_inference()
