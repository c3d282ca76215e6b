"""From a delta file to what each layer of this process needs of it. Everything that can fail is done here.

An error in a step of the engine ends the engine, so nothing is left to a step: the file is read whole, its checksums
are compared, its terms are checked (specification, section 15), every tensor finds its place or is refused, and the
base is compared.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from deltafmt.delta import DeltaFile, refuse_child, refuse_exact
from deltafmt.errors import DeltafmtError, UsageError
from deltafmt.index.entries import TensorEntry
from deltafmt.output import storage_error
from deltafmt.runtime.checks import check_terms
from deltafmt.runtime.cut_loading import load_held
from deltafmt.runtime.cuts import Cut, HeldTensor
from deltafmt.runtime.device_delta import DeviceDelta
from deltafmt.runtime.dtypes import TORCH_DTYPES
from deltafmt.runtime.upload import load
from deltafmt.runtime.values import new_values
from deltafmt.vllm.base import EngineBase
from deltafmt.vllm.decoding import Decoded, old_values
from deltafmt.vllm.parts import LayerParts
from deltafmt.vllm.served import Served, ServedModel
from deltafmt.vllm.tensor_places import Piece, Place, Places


@dataclass(frozen=True, slots=True, eq=False)
class LoadedDelta:
    """A delta in host memory.

    Attributes:
        content_id: of the file, in hexadecimal.
        nbytes: bytes that it takes in a slot on a GPU; 0 where no kernel runs.
        tensors: its packed tensors; None where no kernel runs.
        parts: what it changes, by the layer's name.
    """

    content_id: str
    nbytes: int
    tensors: DeviceDelta | None
    parts: dict[str, LayerParts]


# What a delta changes, by the layer's name.
_Found = dict[str, LayerParts]


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A piece of a tensor that a layer of this process needs."""

    entry: TensorEntry
    base_name: str
    place: Place
    piece: Piece
    held: HeldTensor


class _Whole(io.BytesIO):
    """A file that was read into memory, under its name.

    Args:
        path: the file.

    Raises:
        StorageError: it cannot be read.
    """

    def __init__(self, path: str) -> None:
        try:
            super().__init__(Path(path).read_bytes())
        except OSError as error:
            raise storage_error("cannot read", path, error) from error
        self.name = path


def load_delta(
    path: str, model: ServedModel, base: EngineBase | None, where: str = "", *, starting: bool = False
) -> LoadedDelta:
    """Read a delta file and make ready what each layer of this process needs of it.

    Args:
        path: the file.
        model: the engine's model.
        base: the base's checkpoint; None if the engine's weights are random, and nothing is compared.
        where: the file's name for messages, if it is another than the path.
        starting: True before the model has run, when nobody can tell what computes without deltas.

    Raises:
        StorageError, InvalidFileError: the file cannot be read, or breaks its format.
        WrongBaseError: it was made for another base.
        UsageError: it changes something that the engine cannot change for a request; names the tensor.
    """
    name = where or path
    try:
        # What is checked and what is decoded must be the same bytes, whoever writes to the file meanwhile; and a mapped
        # file that is cut short would end the engine. For kernels, loading copies while it checks.
        source = None if model.has_kernels else _Whole(path)
        with DeltaFile(source or path, mmap=False) as opened:
            entries = {tensor: opened.resolve(tensor) for tensor in opened}
            refuse_child(opened.container)
            refuse_exact(name, entries.values())
            content_id = opened.content_id
            metadata = opened.container
            if base is not None:
                base.check(metadata, {entry.name: entry for entry in entries.values()}.values())
            wanted = _wanted(entries, opened.container.removed, model, starting=starting)
            if source is not None:
                with torch.inference_mode(mode=False), torch.no_grad():
                    return LoadedDelta(content_id, 0, None, _parts(wanted, Decoded(opened, base), model, base))
            tensors = _read(path, wanted, opened)
            if tensors.content_id != content_id:
                raise UsageError("the file changed while it was read")
            check_terms(name, tensors)
            parts = _parts(wanted, tensors, model, base)
        model.check(parts, tensors, starting=starting)
        return LoadedDelta(content_id, tensors.nbytes, tensors, parts)
    except DeltafmtError as error:
        if name in str(error):
            raise
        if where and path in str(error):
            raise type(error)(str(error).replace(path, where)) from error
        raise error.located(name) from error


def _read(path: str, wanted: list[_Wanted], opened: DeltaFile) -> DeviceDelta:
    held = {one.held.key: one.held for one in wanted}
    if all(one.cut is None for one in held.values()):
        return load(path, "cpu", tensors=list(held) or None, known=opened)
    return load_held(path, held, torch.device("cpu"), threading.Event())


def _wanted(
    entries: Mapping[str, TensorEntry], removed: Iterable[str], model: ServedModel, *, starting: bool
) -> list[_Wanted]:
    """Return the pieces that this process needs.

    Raises:
        UsageError: a tensor cannot be served; names it.
    """
    places = model.places
    wanted: list[_Wanted] = []
    for name, entry in entries.items():
        base_name = _base_name(name, entry)
        if entry.action == "same" or _is_repeated(name, entry, entries, places):
            continue
        for place in _places_of(name, base_name, entries, model):
            served = model.layers[place.layer]
            _check(name, entry, place, served, model, starting=starting)
            whole = len(place.pieces) == 1
            for piece in place.pieces:
                cut = _cut(entry, piece) if not whole or not _covers(entry, piece) else None
                wanted.append(_Wanted(entry, base_name, place, piece, HeldTensor(name, cut)))
    for name in removed:
        if name in places.found and not any(entry.name == name for entry in entries.values()):
            if model.follows(name):
                continue
            raise UsageError(f'the fine-tune has no tensor "{name}", and the engine computes with it for every request')
    return wanted


def _is_repeated(name: str, entry: TensorEntry, entries: Mapping[str, TensorEntry], places: Places) -> bool:
    """Tell whether a tensor repeats another one that is in the file and reaches the same layers."""
    return entry.name != name and entry.name in entries and name not in places.found


def _base_name(name: str, entry: TensorEntry) -> str:
    """Return what a tensor is called in the base."""
    if entry.base is not None and len(entry.base.parts) == 1:
        return entry.base.parts[0].name
    return name


def _places_of(name: str, base_name: str, entries: Mapping[str, TensorEntry], model: ServedModel) -> tuple[Place, ...]:
    """Return the places of a tensor that a delta changes.

    Raises:
        UsageError: it has none.
    """
    found = model.places.found.get(base_name) or model.places.found.get(name)
    if found is None:
        found = model.heads.get(name)
    if found is None:
        reason = model.places.reasons.get(base_name, "the engine's model has no such tensor")
        raise UsageError(f'tensor "{name}" changes, which the engine cannot do for a request: {reason}')
    # A head that has a tensor of its own in the file does not follow the embedding that the base ties it to.
    own = {place.layer for other in entries if other != name for place in model.heads.get(other, ())}
    return tuple(place for place in found if place.layer not in own)


def _check(name: str, entry: TensorEntry, place: Place, served: Served, model: ServedModel, *, starting: bool) -> None:
    """Refuse what a layer cannot do for a request.

    Raises:
        UsageError: names the tensor.
    """
    reason = model.refusals.get(place.layer) or (served if isinstance(served, str) else "")
    if not reason and not starting and not model.computes(place.layer):
        reason = f"{place.layer} computed without the method that deltas are added in"
    expected = model.shapes.get(name) or model.shapes.get(_base_name(name, entry))
    if not reason and expected is not None and tuple(entry.shape) != expected:
        grown = "the vocabulary of a request is the base's; " if len(entry.shape) == 2 else ""
        reason = f"{grown}it has the shape {list(entry.shape)} where the engine's has {list(expected)}"
    if not reason and entry.dtype not in TORCH_DTYPES:
        reason = f"torch has no numbers of {entry.dtype}"
    if reason:
        raise UsageError(f'tensor "{name}" changes, which the engine cannot do for a request: {reason}')


def _covers(entry: TensorEntry, piece: Piece) -> bool:
    if len(entry.shape) == 1:
        return piece.rows == range(entry.shape[0])
    return piece.rows == range(entry.rows) and piece.columns == range(entry.columns)


def _cut(entry: TensorEntry, piece: Piece) -> Cut:
    return Cut((piece.rows,) if len(entry.shape) == 1 else (piece.rows, piece.columns))


def _parts(wanted: list[_Wanted], new: Decoded | DeviceDelta, model: ServedModel, base: EngineBase | None) -> _Found:
    """Return what a delta changes in each layer.

    Args:
        wanted: the pieces that this process needs.
        new: the tensors: packed where kernels multiply, decoded elsewhere.
        model: the engine's model.
        base: the base's checkpoint.
    """
    found: _Found = {}
    sums: dict[str, list[tuple[TensorEntry, Piece]]] = {}
    weights: dict[str, torch.Tensor | None] = {}
    for one in wanted:
        layer = one.place.layer
        parts = found.setdefault(layer, LayerParts())
        if one.place.parameter == "bias" and model.is_matrix(layer):
            _add_bias(parts, one, new, model)
        elif model.is_norm(layer):
            held = getattr(model.modules[layer], one.place.parameter)
            parts.values[one.place.parameter] = _new_values(one, new, held.detach().cpu()).to(held.device)
        elif not isinstance(new, Decoded):
            if not one.entry.terms:
                raise UsageError(
                    f'tensor "{one.held.tensor}" changes, which the engine cannot do for a request: the delta has the '
                    "whole matrix, and kernels multiply with packed terms alone"
                )
            parts.packed[one.piece.start] = one.held.key
        elif one.place.expert is not None:
            old = old_values(one.base_name, one.piece, base)
            parts.experts[one.place.expert, one.place.matrix] = new.delta(one.entry, one.base_name, one.piece) + old
        elif _weight_of(layer, weights, model) is not None:
            sums.setdefault(layer, []).append((one.entry, one.piece))
        else:
            parts.decoded[one.piece.start] = new.delta(one.entry, one.base_name, one.piece)
    for layer, pieces in sums.items():
        weight = weights[layer]
        assert isinstance(new, Decoded)
        assert weight is not None
        found[layer].whole = new.sum(weight, sorted(pieces, key=lambda each: each[1].start))
    _add_experts(found, model, base)
    return found


def _weight_of(layer: str, known: dict[str, torch.Tensor | None], model: ServedModel) -> torch.Tensor | None:
    """Return the weight that a layer computes with as it is, if there is one; asked once a layer."""
    if layer not in known:
        known[layer] = model.plain_weight(layer)
    return known[layer]


def _add_experts(found: _Found, model: ServedModel, base: EngineBase | None) -> None:
    """Add the experts that the delta leaves as they are: they belong to the sum, too."""
    for name, places in model.places.found.items():
        for place in places:
            if place.expert is not None and place.layer in found:
                experts = found[place.layer].experts
                if (place.expert, place.matrix) not in experts:
                    experts[place.expert, place.matrix] = old_values(name, place.pieces[0], base)


def _new_values(one: _Wanted, new: Decoded | DeviceDelta, old: torch.Tensor) -> torch.Tensor:
    """Return the fine-tuned values of a piece of a vector, or of a whole table."""
    if isinstance(new, Decoded):
        return new.new_values(one.entry, old, one.piece.rows.start)
    return new_values(new[one.held.key], old)


def _add_bias(parts: LayerParts, one: _Wanted, new: Decoded | DeviceDelta, model: ServedModel) -> None:
    """Add what a delta changes of a layer's bias."""
    layer = model.modules[one.place.layer]
    held: torch.Tensor = layer.bias.detach()
    if model.adds_no_bias(one.place.layer):
        return  # the sum over processes has the bias of the first one
    rows = slice(one.piece.start, one.piece.start + len(one.piece.rows))
    old = held[rows].cpu()
    if parts.bias is None:
        parts.bias = torch.zeros(len(held), dtype=torch.float32, device="cpu")
    parts.bias[rows] = _new_values(one, new, old).float() - old.float()
