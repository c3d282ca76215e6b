"""Where the tensors of a checkpoint lie in a model that vLLM has loaded: in which layer, and in which rows of it.

The model itself is asked. Its ``load_weights`` is given tensors without values, and every parameter a loader that
writes nothing and notes what it was given. So renamed, stacked and tied parameters are found for every architecture,
without a table of names. A tensor that the model changes on its way to a parameter, or does not take, has no place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deltafmt.vllm import seam


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a tensor, and where it lies in the layer of this process.

    Attributes:
        start: the first row of the layer's parameter that it fills.
        rows: the rows of the checkpoint's tensor; of a vector, its elements.
        columns: the columns of the checkpoint's tensor; of a vector, empty.
    """

    start: int
    rows: range
    columns: range


@dataclass(frozen=True, slots=True)
class Place:
    """A parameter that a tensor of the checkpoint belongs to.

    Attributes:
        layer: the layer's name in vLLM's model.
        parameter: the parameter's name in the layer.
        pieces: the parts of the tensor that this process has; none if it has none.
        expert: the number of the expert, if the layer has experts.
        matrix: which of an expert's matrices it is: ``w1`` (gate), ``w2`` (down) or ``w3`` (up).
    """

    layer: str
    parameter: str
    pieces: tuple[Piece, ...]
    expert: int | None = None
    matrix: str = ""


@dataclass(frozen=True, slots=True)
class Places:
    """The places of the tensors of a checkpoint.

    Attributes:
        found: by the tensor's name.
        reasons: why a tensor has no place, by its name.
    """

    found: Mapping[str, tuple[Place, ...]]
    reasons: Mapping[str, str]


Shapes = Mapping[str, tuple[int, ...]]

_NOT_TAKEN = "the model does not take it"
_REARRANGED = "the model rearranges it when it is loaded"


@dataclass(frozen=True, slots=True)
class _Given:
    """What a parameter's loader was given."""

    tensor: str
    parameter: int
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    exact: bool


class _Probe(torch.Tensor):
    """A tensor without values that stands for one of the checkpoint; a copy of it stands for the same one.

    vLLM copies tensors that it gives to the parameters later, as for pooling models.
    """

    @classmethod
    def of(cls, shape: Sequence[int]) -> Any:
        """Return a probe of a shape."""
        with torch.inference_mode(mode=False):
            # No view of another tensor, so that views of it have it as their base.
            return torch.Tensor._make_subclass(cls, torch.empty(tuple(shape), device="meta"))  # noqa: SLF001

    def clone(self, *_: Any, **__: Any) -> Any:
        """Return the probe itself."""
        return self


class _Recorder:
    """Notes what the loaders of parameters are given."""

    def __init__(self, probes: Mapping[str, torch.Tensor]) -> None:
        self._names = {id(probe): name for name, probe in probes.items()}
        self.given: list[_Given] = []

    def __call__(self, param: Any, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any) -> bool:
        base = loaded_weight._base  # noqa: SLF001 - torch has no other name for what a view is of
        name = self._names.get(id(loaded_weight))
        if name is not None:
            # torch counts what was written to it on its way.
            exact = loaded_weight._version == 0  # noqa: SLF001
            self.given.append(_Given(name, id(param), args, kwargs, exact=exact))
        elif base is not None and id(base) in self._names:
            # A view of the whole tensor, in its order, is the tensor.
            same = base._version == 0 and _order(loaded_weight) == _order(base)  # noqa: SLF001
            self.given.append(_Given(self._names[id(base)], id(param), args, kwargs, exact=same))
        return True  # some loaders of experts tell whether they took the tensor


def _order(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset()


def find_places(model: Any, shapes: Shapes) -> Places:
    """Find the places of a checkpoint's tensors.

    Args:
        model: vLLM's model, loaded, before its layers are wrapped for LoRA.
        shapes: the checkpoint's tensors by name.
    """
    layers = dict(model.named_modules(remove_duplicate=False))
    given = _ask(model, layers, shapes)
    owners: dict[int, list[tuple[str, str]]] = {}
    for name, layer in layers.items():
        for key, parameter in layer._parameters.items():  # noqa: SLF001 - without those of inner modules
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((name, key))
    found: dict[str, tuple[Place, ...]] = {}
    reasons: dict[str, str] = {}
    for name, shape in shapes.items():
        answers = given.get(name, [])
        if not answers:
            reasons[name] = _NOT_TAKEN
            continue
        places: list[Place] = []
        for one in answers:
            for layer_name, key in owners.get(one.parameter, []):
                made = _REARRANGED if not one.exact else place(layers[layer_name], layer_name, key, shape, one)
                if isinstance(made, str):
                    reasons[name] = made
                else:
                    places.append(made)
        if places and name not in reasons:
            found[name] = tuple(places)
        elif name not in reasons:
            reasons[name] = _NOT_TAKEN
    return Places(found, reasons)


def _ask(model: Any, layers: Mapping[str, nn.Module], shapes: Shapes) -> dict[str, list[_Given]]:
    """Load tensors without values, and return what each was given to."""
    probes = {name: _Probe.of(shape) for name, shape in shapes.items()}
    recorder = _Recorder(probes)
    with _recording(layers, recorder):
        _load(model, probes)
        told = {one.tensor for one in recorder.given}
        # A tensor that the model cannot load without its values must not hide those behind it.
        for name in [name for name in probes if name not in told][:_MOST_ALONE]:
            _load(model, {name: probes[name]})
    given: dict[str, list[_Given]] = {}
    for one in recorder.given:
        given.setdefault(one.tensor, []).append(one)
    return given


# Each call of load_weights lists the parameters of the model, which takes milliseconds.
_MOST_ALONE = 256


def _load(model: Any, probes: Mapping[str, torch.Tensor]) -> None:
    with contextlib.suppress(Exception):
        model.load_weights(iter(probes.items()))


@contextlib.contextmanager
def _recording(layers: Mapping[str, nn.Module], recorder: _Recorder) -> Iterator[None]:
    """Give all parameters a loader that notes; a layer whose quantized weight has another name, one of the usual."""
    added: list[nn.Module] = []
    kept: list[tuple[Any, Any]] = []
    try:
        for layer in layers.values():
            if isinstance(layer, seam.layer("LinearBase")) and "weight" not in layer._parameters:  # noqa: SLF001
                layer.register_parameter("weight", nn.Parameter(torch.empty(0, device="meta"), requires_grad=False))
                added.append(layer)
        parameters = {id(one): one for layer in layers.values() for one in layer.parameters(recurse=False)}
        kept.extend((one, seam.set_loader(one, recorder)) for one in parameters.values())
        yield
    finally:
        for parameter, before in kept:
            seam.restore_loader(parameter, before)
        for layer in added:
            del layer._parameters["weight"]  # noqa: SLF001


def place(layer: Any, name: str, key: str, shape: Sequence[int], given: Any) -> Place | str:
    """Return the place of a tensor in a layer, or why there is none.

    Args:
        layer: the layer.
        name: its name.
        key: the name of its parameter.
        shape: of the checkpoint's tensor.
        given: with the ``args`` and ``kwargs`` that the parameter's loader was given.
    """
    shard = given.args[0] if given.args else given.kwargs.get("loaded_shard_id", given.kwargs.get("shard_id"))
    if isinstance(layer, seam.layer("VocabParallelEmbedding")):
        pieces = _vocabulary(layer, shape)
    elif isinstance(layer, seam.layer("LinearBase")):
        pieces = _linear(layer, key, shape, shard)
    elif isinstance(layer, seam.layer("RoutedExperts")):
        return _expert(layer, name, key, shape, given)
    elif given.args or given.kwargs:
        return _unknown(layer)
    else:
        held = getattr(layer, key)
        # A vector, or a table that positions choose rows of.
        whole = tuple(held.shape) == tuple(shape) and len(shape) == (2 if isinstance(layer, nn.Embedding) else 1)
        columns = range(shape[1]) if len(shape) > 1 else range(0)
        pieces = (Piece(0, range(shape[0]), columns),) if whole else _unknown(layer)
    return pieces if isinstance(pieces, str) else Place(name, key, pieces)


def _unknown(layer: Any) -> str:
    return f"it belongs to a layer of the class {type(layer).__name__}, to which deltas cannot be added"


def _vocabulary(layer: Any, shape: Sequence[int]) -> tuple[Piece, ...] | str:
    """Return the rows of an embedding or a head that this process has."""
    columns = range(shape[1]) if len(shape) > 1 else range(0)
    if shape[0] != layer.org_vocab_size or len(columns) not in (0, layer.embedding_dim) or layer.num_added_embeddings:
        return _unknown(layer)
    first, stop = layer.shard_indices.org_vocab_start_index, layer.shard_indices.org_vocab_end_index
    return (Piece(0, range(first, stop), columns),) if stop > first else ()


def _linear(layer: Any, key: str, shape: Sequence[int], shard: Any) -> tuple[Piece, ...] | str:
    """Return the rows and columns of a linear layer that this process has."""
    if key not in ("weight", "bias") or len(shape) != (2 if key == "weight" else 1):
        return _unknown(layer)
    cut = int(layer.tp_size)
    rank = int(layer.tp_rank) if cut > 1 else 0
    columns = range(shape[1]) if key == "weight" else range(0)
    kinds = [seam.layer(kind) for kind in ("QKVParallelLinear", "MergedColumnParallelLinear", "ColumnParallelLinear")]
    known = {*kinds, seam.layer("RowParallelLinear"), seam.layer("ReplicatedLinear")}
    if cut > 1 and type(layer) not in known:
        return f"its layer, a {type(layer).__name__}, is cut over processes in a way of its own"
    local = int(layer.output_size_per_partition) if hasattr(layer, "output_size_per_partition") else layer.output_size
    if isinstance(layer, kinds[0]):
        pieces = _of_heads(layer, shard, rank)
    elif isinstance(layer, kinds[1]):
        pieces = _merged(layer.output_sizes, shard, cut, rank)
    elif isinstance(layer, kinds[2]):
        pieces = [(0, rank * local, local)]
    else:
        pieces = [(0, 0, local)]
        if key == "weight" and isinstance(layer, seam.layer("RowParallelLinear")) and cut > 1:
            width = int(layer.input_size_per_partition)
            columns = range(rank * width, (rank + 1) * width)
    if pieces is None:
        return _unknown(layer)
    total = sum(length for _, _, length in pieces)
    fits = all(first + length <= shape[0] and start + length <= local for start, first, length in pieces)
    if not fits or (cut == 1 and total != shape[0]):
        return _unknown(layer)
    return tuple(Piece(start, range(first, first + length), columns) for start, first, length in pieces)


_Runs = list[tuple[int, int, int]]


def _of_heads(layer: Any, shard: Any, rank: int) -> _Runs | None:
    """Return (start in the layer, first row of the tensor, rows) for q, k or v, or for all three in one tensor."""
    sizes = [layer.num_heads * layer.head_size, layer.num_kv_heads * layer.head_size]
    sizes.append(layer.num_kv_heads * getattr(layer, "v_head_size", layer.head_size))
    totals = [layer.total_num_heads * layer.head_size, layer.total_num_kv_heads * layer.head_size]
    totals.append(layer.total_num_kv_heads * getattr(layer, "v_head_size", layer.head_size))
    # Heads of keys and values that are fewer than the processes are held by several of them.
    ranks = [rank, rank // layer.num_kv_head_replicas, rank // layer.num_kv_head_replicas]
    runs: _Runs = []
    for number, letter in enumerate("qkv"):
        if shard is None or shard == letter:
            before = sum(totals[:number]) if shard is None else 0
            runs.append((sum(sizes[:number]), before + ranks[number] * sizes[number], sizes[number]))
    return runs or None


def _merged(sizes: Sequence[int], shard: Any, cut: int, rank: int) -> _Runs | None:
    """Return (start in the layer, first row of the tensor, rows) for parts of a merged layer."""
    chosen = range(len(sizes)) if shard is None else (shard,) if isinstance(shard, int) else shard
    if not isinstance(chosen, range | tuple) or any(not 0 <= number < len(sizes) for number in chosen):
        return None
    runs: _Runs = []
    before = 0
    for number in chosen:
        mine = sizes[number] // cut
        runs.append((sum(sizes[:number]) // cut, before + rank * mine, mine))
        before += sizes[number]
    return runs


def _expert(layer: Any, name: str, key: str, shape: Sequence[int], given: Any) -> Place | str:
    """Return the place of one matrix of one expert."""
    expert, matrix = given.kwargs.get("expert_id"), given.kwargs.get("shard_id")
    if not isinstance(expert, int) or matrix not in ("w1", "w2", "w3") or len(shape) != 2 or "weight" not in key:
        return _unknown(layer)
    parallel = layer.moe_config.moe_parallel_config
    at = 1 if matrix == "w2" else 0
    runs = [range(size) for size in shape]
    if shape[at] % parallel.tp_size:
        return _unknown(layer)
    mine = shape[at] // parallel.tp_size
    runs[at] = range(parallel.tp_rank * mine, (parallel.tp_rank + 1) * mine)
    return Place(name, key, (Piece(0, runs[0], runs[1]),), expert, matrix)
