"""Layers of vLLM with the parts of every delta that concern them: linear layers, heads and embeddings.

A layer's ``quant_method`` computes its product. It gets a subclass that adds the deltas behind that, so quantized
bases, merged projections and layers that are cut over processes are served alike, and LoRA adapters add theirs later.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from deltafmt.errors import UsageError
from deltafmt.kernels.operand import Operand
from deltafmt.kernels.products import embedding_, matmul_
from deltafmt.kernels.record_memory import RecordMemory
from deltafmt.kernels.registry import kernels_of
from deltafmt.kernels.segments import Segments
from deltafmt.kernels.table import OperandTable
from deltafmt.runtime import operations
from deltafmt.runtime.device_delta import DeviceTensor
from deltafmt.terms.layout import TermLayout
from deltafmt.vllm import seam
from deltafmt.vllm.choice import Choice, Rows
from deltafmt.vllm.decoding import RAW_NAMES
from deltafmt.vllm.parts import LayerParts

# The methods that compute with the weight as it is.
_PLAIN = ("UnquantizedLinearMethod", "UnquantizedEmbeddingMethod")


class ServedLayer(ABC):
    """A layer that deltas are added to.

    Args:
        name: its name in the model.
        layer: the layer.
        choice: whose rows a step has.

    Attributes:
        ran: True once it has computed something, so that its deltas would have been added.
        slots: the slots whose deltas change it.
    """

    def __init__(self, name: str, layer: Any, choice: Choice) -> None:
        self.name = name
        self.layer = layer
        self.choice = choice
        self.ran = False
        self.slots: set[int] = set()

    @abstractmethod
    def put(self, slot: int, parts: LayerParts, tensors: Mapping[str, DeviceTensor]) -> None:
        """Fill a slot with what a delta changes here.

        Args:
            slot: the slot.
            parts: what the delta changes.
            tensors: its tensors on the device, by the names that the parts say.
        """

    @abstractmethod
    def clear(self, slot: int) -> None:
        """Empty a slot."""

    def idle(self) -> bool:
        """Return True if no row uses a delta now. Compiled code and graphs hold the operation for every step."""
        if torch.compiler.is_compiling():
            return False
        self.ran = True
        return not (self.choice.busy and (self.slots or self.choice.lost)) and not _capturing(self.choice.device)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class MatrixLayer(ServedLayer):
    """A layer with a matrix: what linear layers, heads and embeddings have in common.

    On a GPU, kernels multiply with the packed terms. Elsewhere each matrix was decoded once, when its delta was
    loaded (:mod:`deltafmt.vllm.parts`): as the layer's whole weight if the engine holds that, which takes the place of
    the base's for a delta's rows.

    Args:
        name: its name in the model.
        layer: the layer.
        choice: whose rows a step has.
        runs: where each part of the layer's rows begins, and its number of rows.
        columns: of the matrix.
        memory: the memory of the operands' records.
    """

    def __init__(
        self,
        name: str,
        layer: Any,
        choice: Choice,
        runs: Sequence[tuple[int, int]],
        columns: int,
        memory: RecordMemory,
    ) -> None:
        super().__init__(name, layer, choice)
        self.runs = sorted(runs)
        self.columns = columns
        self.plain = type(layer.quant_method) in {seam.layer(kind) for kind in _PLAIN}
        self.table = OperandTable(choice.slots, [rows for _, rows in self.runs], columns, choice.device, memory)
        # What a graph that is captured from now on launches; empty where no kernel multiplies.
        self.prepared: set[tuple[int, TermLayout, int]] = set()
        self._parts: dict[int, LayerParts] = {}
        # The bias of every slot less the base's; captured graphs read it.
        self._biases: torch.Tensor | None = None

    def put(self, slot: int, parts: LayerParts, tensors: Mapping[str, DeviceTensor]) -> None:
        """Fill a slot with what a delta changes here."""
        self.clear(slot)
        if parts.packed:
            terms = {start: tensors[name].terms for start, name in parts.packed.items()}
            self.table.put(slot, [terms.get(start, ()) for start, _ in self.runs])
            self.table.prepare()
            self.prepared |= self.layouts(terms)
        self._parts[slot] = parts
        self.slots.add(slot)

    def plain_weight(self) -> torch.Tensor | None:
        """Return the weight that the layer computes with as it is; None if it is quantized, packed or dropped."""
        weight = getattr(self.layer, "weight", None)
        if not self.plain or not isinstance(weight, torch.Tensor) or weight.dtype not in RAW_NAMES:
            return None
        # As torch's own class: that of vLLM's parameters makes every call slow.
        weight = weight.detach().as_subclass(torch.Tensor)
        fits = weight.dim() == 2 and weight.shape[1] == self.columns and len(weight) >= sum(self.runs[-1])
        return weight if fits else None

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        if slot in self.slots:
            self.slots.discard(slot)
            del self._parts[slot]
            if any(self.table.operands(slot)):
                self.table.clear(slot)
                self.table.prepare()

    @abstractmethod
    def warm(self, tokens: int, dtype: torch.dtype) -> None:
        """Launch what a graph of so many tokens is going to hold of this layer."""

    @staticmethod
    def layouts(terms: Mapping[int, Sequence[Operand]]) -> set[tuple[int, TermLayout, int]]:
        """Return what graphs launch for terms: where they begin, their layout, and how many of it came before."""
        found: set[tuple[int, TermLayout, int]] = set()
        for start, operands in terms.items():
            seen: dict[TermLayout, int] = {}
            for operand in operands:
                layout = kernels_of(operand.layout).table_layout(operand.layout)
                number = seen[layout] = seen.get(layout, -1) + 1
                found.add((start, layout, number))
        return found


class LinearLayer(MatrixLayer):
    """A linear layer, or a head.

    Args:
        rows: what the rows of its input are.
    """

    def __init__(self, *args: Any, rows: Rows = Rows.TOKENS) -> None:
        super().__init__(*args)
        self.rows = rows
        self.key = operations.new_key(self, self.choice.device)
        # What the layer has added to its own output.
        self._bias: torch.Tensor | None = None

    def put(self, slot: int, parts: LayerParts, tensors: Mapping[str, DeviceTensor]) -> None:
        """Fill a slot with what a delta changes here."""
        super().put(slot, parts, tensors)
        if parts.bias is not None:
            if self._biases is None:
                with torch.inference_mode(mode=False):
                    shape = (self.choice.slots + 1, len(parts.bias))
                    self._biases = torch.zeros(shape, dtype=torch.float32, device=self.choice.device)
            self._biases[slot + 1] = parts.bias.to(self.choice.device)

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        super().clear(slot)
        if self._biases is not None:
            self._biases[slot + 1] = 0

    def computed(self, own: Callable[..., Any], layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the base's output with those of the deltas.

        Args:
            own: the product of the layer's method.
            layer: the layer, or what stands in front of it.
            x: the input.
            args: what else the method is given; the first is what the layer adds.
            kwargs: the same, by name.
        """
        if self.rows is Rows.LOGITS:
            self.choice.note_logits(x)
        if self.idle():
            return own(layer, x, *args, **kwargs)
        if torch.compiler.is_compiling():
            y = own(layer, x, *args, **kwargs)
            operations.multiply_([y], x, self.key)
            return y
        rows = self._rows_of_wholes(x)
        y = own(layer, x, *args, **kwargs) if rows is None else x.new_empty((*x.shape[:-1], rows))
        self._bias = args[0] if args else kwargs.get("bias")
        self.multiply([y], x)
        return y

    def _rows_of_wholes(self, x: torch.Tensor) -> int | None:
        """Return the layer's rows if each row of the input has a delta with the whole weight: nothing is the base's."""
        given = x.reshape(-1, x.shape[-1])
        segments = self.choice.segments(self.rows, given, self.name)
        if segments is None or segments.fixed:
            return None
        wholes = [self._whole(slot) for slot in segments.lengths()]
        if sum(segments.lengths().values()) != len(given) or any(whole is None for whole in wholes):
            return None
        return len(wholes[0]) if wholes and wholes[0] is not None else None

    def _whole(self, slot: int) -> torch.Tensor | None:
        parts = self._parts.get(slot)
        return None if parts is None else parts.whole

    def warm(self, tokens: int, dtype: torch.dtype) -> None:
        """Launch what a graph of so many tokens is going to hold of this layer; a head is in no graph."""
        if self.rows is Rows.TOKENS:
            wide = max(start + rows for start, rows in self.runs)
            y, x = (torch.zeros(tokens, n, dtype=dtype, device=self.table.device) for n in (wide, self.columns))
            self.multiply([y], x)

    def multiply(self, outputs: Sequence[torch.Tensor], given: torch.Tensor) -> None:
        """Add the products with the deltas of the step's rows, in place; what the custom operation does.

        Raises:
            UsageError: nobody knows whose rows these are.
        """
        self.ran = True
        y = outputs[0].view(-1, outputs[0].shape[-1])
        x = given.reshape(-1, given.shape[-1])
        segments = self.choice.segments(self.rows, x, self.name)
        if segments is None:
            return
        if self.prepared:
            matmul_([y[:, start : start + rows] for start, rows in self.runs], x, self.table, segments)
        if not segments.fixed:
            self._decoded(y, x, segments)
        if self._biases is not None:
            difference = self._biases[segments.slots.long() + 1]
            y[:, : difference.shape[1]] += difference.to(y.dtype)
        if self.rows is Rows.LOGITS and self.choice.lost:
            self._end_lost(y, segments)

    def _end_lost(self, y: torch.Tensor, segments: Segments) -> None:
        """Leave requests whose delta was lost nothing but the end of their text."""
        shard = self.layer.shard_indices
        at = (self.choice.end or 0) - shard.org_vocab_start_index
        for slot in self.choice.lost & set(segments.lengths()):
            tokens = segments.members(slot)
            y[tokens] = torch.finfo(y.dtype).min
            if 0 <= at < shard.org_vocab_end_index - shard.org_vocab_start_index:
                y[tokens, at] = 0

    def _decoded(self, y: torch.Tensor, x: torch.Tensor, segments: Segments) -> None:
        """Add products with dense matrices, or let them take the place of the base's; there are none on a GPU."""
        for slot, count in segments.lengths().items():
            parts = self._parts.get(slot)
            if parts is None or (parts.whole is None and not parts.decoded):
                continue
            tokens = slice(None) if count == len(x) else segments.members(slot)
            mine = x[tokens].float()
            if parts.whole is not None:
                bias = None if self._bias is None else self._bias.float()
                y[tokens] = functional.linear(mine, parts.whole, bias).to(y.dtype)
            for start, matrix in parts.decoded.items():
                columns = slice(start, start + len(matrix))
                y[tokens, columns] = (y[tokens, columns].float() + functional.linear(mine, matrix)).to(y.dtype)


class EmbeddingLayer(MatrixLayer):
    """An embedding, whose rows the tokens' ids choose."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.key = operations.new_key(self, self.choice.device)

    def added(self, y: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Return the base's rows with those of the deltas, added in place."""
        if self.idle():
            return y
        if torch.compiler.is_compiling():
            operations.multiply_([y], ids, self.key)
        else:
            self.multiply([y], ids)
        return y

    def warm(self, tokens: int, dtype: torch.dtype) -> None:
        """Launch what a graph of so many tokens is going to hold of this layer."""
        y = torch.zeros(tokens, self.columns, dtype=dtype, device=self.table.device)
        self.multiply([y], torch.zeros(tokens, dtype=torch.int64, device=self.table.device))

    def multiply(self, outputs: Sequence[torch.Tensor], given: torch.Tensor) -> None:
        """Add the rows of the deltas of the step's tokens, in place; what the custom operation does.

        Raises:
            UsageError: nobody knows whose tokens these are.
        """
        self.ran = True
        y = outputs[0].view(-1, outputs[0].shape[-1])
        ids = given.reshape(-1)
        segments = self.choice.segments(Rows.TOKENS, ids, self.name)
        if segments is None:
            return
        if self.prepared:
            embedding_(y, ids, self.table, segments)
        if segments.fixed:
            return
        for slot in segments.lengths():
            parts = self._parts.get(slot)
            if parts is None:
                continue
            tokens = segments.members(slot)
            if parts.whole is not None:
                y[tokens] = parts.whole[ids[tokens]].to(y.dtype)
            for matrix in parts.decoded.values():
                y[tokens] = (y[tokens].float() + matrix[ids[tokens]]).to(y.dtype)


def serving_method(layer: Any, linear: LinearLayer | None, embedding: EmbeddingLayer | None) -> None:
    """Give a layer a method that adds deltas behind what its own computes.

    Args:
        layer: the layer.
        linear: adds to what the layer multiplies, if deltas can change that.
        embedding: adds to what the layer looks up, if deltas can change that.

    Raises:
        UsageError: the layer has no method.
    """
    method = layer.quant_method
    if method is None:
        raise UsageError(f"a {type(layer).__name__} has no method that deltas could be added to")
    kind = type(method)

    class Serving(kind):  # type: ignore[misc, valid-type]
        """The layer's method, with deltas."""

        def apply(self, layer: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
            """Multiply, and add the deltas' products."""
            own = super().apply
            if linear is None:
                return own(layer, x, *args, **kwargs)
            return linear.computed(own, layer, x, *args, **kwargs)

        def embedding(self, layer: Any, input_: Any) -> Any:
            """Look rows up, and add the deltas' rows."""
            y = super().embedding(layer, input_)
            return y if embedding is None else embedding.added(y, input_)

    Serving.__name__ = Serving.__qualname__ = kind.__name__
    made = Serving.__new__(Serving)
    made.__dict__ = method.__dict__
    layer.quant_method = made
    if hasattr(layer, "use_fused_embedding"):
        layer.use_fused_embedding = False  # it looks rows up without the method
