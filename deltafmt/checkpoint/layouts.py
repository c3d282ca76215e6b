"""Tensors that one checkpoint keeps as one and another as several: stacked experts, fused projections.

A *joined* tensor holds several others, its *members*, one behind the other in C order. Members of a stack are numbered:
``experts.gate_up_proj`` of shape [E, 2I, H] holds ``experts.0.gate_proj.weight``, ``experts.0.up_proj.weight``,
``experts.1.gate_proj.weight`` and so on. Layouts that exchange dimensions are no such sequence and are not found here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from deltafmt.format.constants import element_count

Shapes = Mapping[str, tuple[int, ...]]

# The parts that a fused module holds, in order.
_QKV: Final = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"), ("wq", "wk", "wv"))
_GATE_UP: Final = (("gate_proj", "up_proj"), ("w1", "w3"), ("gate", "up"))
FUSED: Final[dict[str, tuple[tuple[str, ...], ...]]] = {
    **dict.fromkeys(("qkv_proj", "qkv", "Wqkv", "wqkv", "w_qkv", "in_proj", "att_proj", "query_key_value"), _QKV),
    **dict.fromkeys(("c_attn", "attn_qkv"), _QKV),
    **dict.fromkeys(("gate_up_proj", "gate_up", "w13", "w12", "weights_in", "dense_h_to_4h"), _GATE_UP),
    **dict.fromkeys(("up_gate_proj", "ff_proj"), (("up_proj", "gate_proj"),)),
    **dict.fromkeys(("kv_proj", "kv", "key_value"), (("k_proj", "v_proj"), ("key", "value"), ("k", "v"))),
    "gqkv_proj": (("gate_proj", "q_proj", "k_proj", "v_proj"),),
    "conv1d": (("q_conv1d", "k_conv1d", "v_conv1d"),),
}
_ENDS: Final = ("weight", "bias")


@dataclass(frozen=True, slots=True)
class Slice:
    """Some elements of a tensor, in C order."""

    name: str
    start: int
    count: int


def members(name: str, shape: tuple[int, ...], others: Shapes) -> list[Slice] | None:
    """Return what a joined tensor holds, in order, or None if the other side has no such tensors.

    Args:
        name, shape: the joined tensor's.
        others: the shapes of the other side's tensors, by name.
    """
    for wanted in _sequences(name, shape):
        found: list[Slice] = []
        for member, number, numbers, dimensions in wanted:
            held = others.get(member)
            if held is None or len(held) != dimensions or not _goes_with(held, shape, numbers):
                break
            count = element_count(held) // numbers
            found.append(Slice(member, number * count, count))
        else:
            if found and sum(part.count for part in found) == element_count(shape):
                return found
    return None


def _goes_with(member: tuple[int, ...], joined: tuple[int, ...], numbers: int) -> bool:
    """Tell whether a member's rows can lie in a joined tensor: equal columns, and as many members as the stack has."""
    if not element_count(member) or (numbers > 1 and member[0] != numbers):
        return False
    return len(member) == 1 or member[-1] == joined[-1]


# A member's name, its number in a stack, the size of that stack, and the member's dimensions.
_Member = tuple[str, int, int, int]


def _sequences(name: str, shape: tuple[int, ...]) -> Iterator[Iterator[_Member]]:
    """Give the sequences of members that a tensor may hold."""
    path, module, end = _split(name)
    fused, dimensions = FUSED.get(module, ()), len(shape)
    if dimensions in (1, 2):
        for parts in fused:
            yield ((_name(path, part, end), 0, 1, dimensions) for part in parts)
        if end.startswith("in_proj_"):  # torch.nn.MultiheadAttention
            kind = end.removeprefix("in_proj_")
            yield ((f"{path}{part}.{kind}", 0, 1, dimensions) for part in _QKV[0])
    if dimensions not in (2, 3) or not _is_stack(name):
        return
    experts = range(shape[0])
    for parts in (*fused, (module,)):
        for tail in dict.fromkeys((end or "weight", "")):
            yield (
                (_name(f"{path}{number}.", part, tail), 0, 1, dimensions - 1) for number in experts for part in parts
            )
    for parts in fused:  # each part in a stack of its own
        yield ((_name(path, part, end), number, shape[0], dimensions) for number in experts for part in parts)


def _split(name: str) -> tuple[str, str, str]:
    """Return the path of a module with a full stop behind it, the module, and the parameter or nothing."""
    path, dot, last = name.rpartition(".")
    if last.startswith("in_proj_"):
        return path + dot, "", last
    if last not in _ENDS:
        return path + dot, last, ""
    path, dot, module = path.rpartition(".")
    return path + dot, module, last


def _name(path: str, module: str, end: str) -> str:
    return f"{path}{module}.{end}" if end else f"{path}{module}"


def _is_stack(name: str) -> bool:
    """Tell whether a tensor may hold all experts of a layer."""
    return "experts" in name.split(".")[-3:]


def match_layouts(wanted: Shapes, base: Shapes) -> dict[str, list[Slice]]:
    """Return, for tensors of the fine-tune that the base keeps joined or apart, the slices of the base's tensors.

    Args:
        wanted: the shapes of the fine-tune's tensors without a counterpart, by the names they would have in the base.
        base: the shapes of the base's tensors that are not taken yet.
    """
    found: dict[str, list[Slice]] = {}
    for name, shape in wanted.items():
        held = members(name, shape, base) if _is_joined(name) else None
        if held is not None:
            found[name] = held
    pieces: dict[str, list[tuple[int, Slice]]] = {}
    for name, shape in base.items():
        held = members(name, shape, wanted) if _is_joined(name) else None
        position = 0
        for part in held or ():
            pieces.setdefault(part.name, []).append((part.start, Slice(name, position, part.count)))
            position += part.count
    for name, slices in pieces.items():
        ordered = sorted(slices, key=lambda piece: piece[0])
        if name not in found and sum(part.count for _, part in ordered) == element_count(wanted[name]):
            found[name] = [part for _, part in ordered]
    return found


def _is_joined(name: str) -> bool:
    path, module, end = _split(name)
    numbered = path.rstrip(".").rpartition(".")[2].isdigit()
    return module in FUSED or end.startswith("in_proj_") or (_is_stack(name) and not numbered)
