"""An engine's model with its layers prepared for deltas: what it was asked at start-up, and what it refuses."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from deltafmt.errors import UsageError
from deltafmt.kernels.devices import usable_on
from deltafmt.kernels.record_memory import RecordMemory
from deltafmt.kernels.registry import kernels_of
from deltafmt.runtime.delta_store import copy_delta
from deltafmt.runtime.device_delta import DeviceDelta, DeviceTensor
from deltafmt.vllm import seam
from deltafmt.vllm.arena import Arena
from deltafmt.vllm.choice import Choice, Rows
from deltafmt.vllm.experts import ExpertsLayer, refusal
from deltafmt.vllm.layers import EmbeddingLayer, LinearLayer, MatrixLayer, ServedLayer, serving_method
from deltafmt.vllm.norms import NormLayer
from deltafmt.vllm.parts import LayerParts
from deltafmt.vllm.tensor_places import Place, Places, find_places

_log = logging.getLogger("deltafmt")

# A layer that deltas are added to, or why there is none.
Served = ServedLayer | str


def _prefixes_of_text(model: Any) -> tuple[str, ...] | None:
    """Return how the names of layers begin that read tokens, in a model that reads something else too."""
    if not hasattr(model, "get_mm_mapping"):
        return None
    mapping = model.get_mm_mapping()
    language = mapping.language_model
    found = [language] if isinstance(language, str) else list(language)
    return (*(f"{prefix.rstrip('.')}." for prefix in found), "lm_head")


# What is behind the name of an embedding that multiplies, too, as the head of some models does.
AS_HEAD = " as the head"
_EAGER = "start the engine with --enforce-eager"


def _captured_tokens(config: Any) -> int:
    """Return the tokens of the largest CUDA graph that the engine captures."""
    sizes = getattr(getattr(config, "compilation_config", None), "cudagraph_capture_sizes", None)
    return 0 if config.model_config.enforce_eager else max(sizes or (0,))


class ServedModel:
    """A model whose layers are prepared.

    Args:
        model: vLLM's model, loaded, before its layers are wrapped for LoRA.
        shapes: the shapes of the base's tensors by name.
        choice: whose rows a step has.
        config: of the engine.

    Attributes:
        modules: the model's layers by name.
        places: where the base's tensors lie.
        layers: what serves each layer that has a tensor of the base, or why nothing does.
        heads: the places of heads that the base ties to its embedding, by the name that an own tensor would have.
        refusals: why layers refuse deltas whatever these are, by the layer's name.
        shapes: of the base's tensors.
        has_kernels: True if kernels multiply with packed terms here.
        arena: the memory of slots on a GPU; None if it is taken for each delta.
        compiled: True if the engine compiles the model.
        captured_tokens: the tokens of the largest CUDA graph; 0 if none is captured.
        weights_changed: True once the model was given other weights than it started with.
    """

    def __init__(self, model: Any, shapes: Mapping[str, tuple[int, ...]], choice: Choice, config: Any) -> None:
        self.choice = choice
        self.shapes = dict(shapes)
        self.has_kernels = usable_on(choice.device)
        self.modules: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
        self.places: Places = find_places(model, shapes)
        self.heads: dict[str, tuple[Place, ...]] = {}
        self.refusals: dict[str, str] = {}
        self.layers: dict[str, Served] = {}
        self.arena: Arena | None = None
        self.compiled = bool(getattr(getattr(config, "compilation_config", None), "mode", 0))
        self.captured_tokens = _captured_tokens(config) if self.has_kernels else 0
        self._memory = RecordMemory(choice.device)
        self.weights_changed = self._gave_logits = False
        self._note_calls(model)
        self._follow_ties()
        self._prepare()
        self._refuse(model, config)

    def _note_calls(self, model: Any) -> None:
        """Note when the model computes logits, and when it is given other weights."""
        load = model.load_weights

        def replaced(*args: Any, **kwargs: Any) -> Any:
            self.weights_changed = True
            return load(*args, **kwargs)

        model.load_weights = replaced
        compute = getattr(model, "compute_logits", None)
        if compute is not None:

            def noted(*args: Any, **kwargs: Any) -> Any:
                logits = compute(*args, **kwargs)
                self._gave_logits = True
                return logits

            model.compute_logits = noted

    def _follow_ties(self) -> None:
        """Note which heads compute with the embedding's weight, without a tensor of their own."""
        self._follow_embeddings()
        for head_name, head in self.modules.items():
            if not isinstance(head, seam.layer("ParallelLMHead")):
                continue
            for name, places in list(self.places.found.items()):
                layers = [place.layer for place in places if place.parameter == "weight"]
                other = next((self.modules[layer] for layer in layers if self.modules[layer] is not head), None)
                if other is None or not isinstance(other, seam.layer("VocabParallelEmbedding")):
                    continue
                if seam.tied(head, other):
                    place = next(place for place in places if self.modules[place.layer] is other)
                    own = Place(head_name, "weight", place.pieces)
                    self.heads[f"{head_name}.weight"] = (own,)
                    if head_name not in layers:
                        found = dict(self.places.found)
                        found[name] = (*places, own)
                        self.places = Places(found, self.places.reasons)

    def _follow_embeddings(self) -> None:
        """Give what an embedding looks up in to its product, too: any model may take it for the head."""
        seen: set[int] = set()
        found = dict(self.places.found)
        for layer_name, layer in list(self.modules.items()):
            kinds = seam.layer("VocabParallelEmbedding"), seam.layer("ParallelLMHead")
            if not isinstance(layer, kinds[0]) or isinstance(layer, kinds[1]) or id(layer) in seen:
                continue
            seen.add(id(layer))
            self.modules[layer_name + AS_HEAD] = layer
            for name, places in found.items():
                mine = [place for place in places if place.layer == layer_name and place.parameter == "weight"]
                own = tuple(Place(layer_name + AS_HEAD, "weight", place.pieces) for place in mine)
                found[name] = (*places, *own)
        self.places = Places(found, self.places.reasons)

    def follows(self, name: str) -> bool:
        """Tell whether a tensor that a fine-tune lacks is another name of one that it has: a tied head."""
        return name in self.heads

    def _prepare(self) -> None:
        """Prepare every layer that has a tensor of the base."""
        by_layer: dict[str, list[Place]] = {}
        for places in self.places.found.values():
            for place in places:
                by_layer.setdefault(place.layer, []).append(place)
        made: dict[int, dict[str, Served]] = {}
        norms = tuple(seam.layer(kind) for kind in ("RMSNorm", "GemmaRMSNorm", "LayerNorm"))
        for name, held in by_layer.items():
            if name.endswith(AS_HEAD):
                continue  # prepared with the embedding
            layer = self.modules[name]
            known = made.setdefault(id(layer), {})
            if not known:
                if isinstance(layer, seam.layer("VocabParallelEmbedding")):
                    self._prepare_vocabulary(name, layer, held)
                elif isinstance(layer, seam.layer("LinearBase")):
                    self._prepare_linear(name, layer, held)
                elif isinstance(layer, seam.layer("RoutedExperts")):
                    reason = refusal(layer, self.choice.device)
                    self.layers[name] = reason or ExpertsLayer(name, layer, self.choice)
                elif isinstance(layer, (*norms, torch.nn.LayerNorm, torch.nn.Embedding)):
                    self.layers[name] = self._norm(name, layer)
                else:
                    kind = type(layer).__name__
                    self.layers[name] = f"it belongs to a {kind}, to which deltas cannot be added"
                known[""] = self.layers[name]
            self.layers[name] = known[""]

    def _norm(self, name: str, layer: Any) -> Served:
        compiled = self.compiled or self.captured_tokens > 0
        served = NormLayer(name, layer, self.choice, compiled=compiled)
        if compiled and not served.can_compile:
            self.refusals[name] = f"the formula of a {type(layer).__name__} is not known to compiled code; {_EAGER}"
        return served

    def _prepare_vocabulary(self, name: str, layer: Any, places: list[Place]) -> None:
        runs = sorted({(piece.start, len(piece.rows)) for place in places for piece in place.pieces})
        columns = int(layer.embedding_dim)
        linear = LinearLayer(name, layer, self.choice, runs, columns, self._memory, rows=Rows.LOGITS)
        if isinstance(layer, seam.layer("ParallelLMHead")):
            serving_method(layer, linear, None)
            self.layers[name] = linear
            return
        embedding = EmbeddingLayer(name, layer, self.choice, runs, columns, self._memory)
        serving_method(layer, linear, embedding)
        self.layers[name] = embedding
        self.layers[name + AS_HEAD] = linear

    def _prepare_linear(self, name: str, layer: Any, places: list[Place]) -> None:
        weights = [place for place in places if place.parameter == "weight"]
        runs = sorted({(piece.start, len(piece.rows)) for place in weights for piece in place.pieces})
        ends = [start + rows for start, rows in runs]
        if not runs or any(end > start for end, (start, _) in zip(ends, runs[1:], strict=False)):
            self.layers[name] = "its layer holds parts that overlap"
            return
        columns = {len(piece.columns) for place in weights for piece in place.pieces}
        if len(columns) != 1 or layer.quant_method is None:
            self.layers[name] = f"its layer, a {type(layer).__name__}, multiplies in a way of its own"
            return
        served = LinearLayer(name, layer, self.choice, runs, columns.pop(), self._memory)
        serving_method(layer, served, None)
        self.layers[name] = served

    def _refuse(self, model: Any, config: Any) -> None:
        """Note the layers whose rows are not the tokens of requests, or that compute past their method."""
        of_text = _prefixes_of_text(model)
        pooler = getattr(model, "pooler", None)
        pooled = {id(layer) for layer in pooler.modules()} if isinstance(pooler, torch.nn.Module) else set()
        for name, served in self.layers.items():
            if isinstance(served, str):
                continue
            if config.model_config.is_encoder_decoder:
                self.refusals[name] = "an encoder's rows are not those of the tokens"
            elif id(served.layer) in pooled:
                self.refusals[name] = "it computes what a pooler gives it, whose rows are those of requests"
            elif of_text is not None and not name.startswith(of_text):
                self.refusals[name] = "it is a part of the model that reads images or sound"
            elif config.model_config.enable_prompt_embeds and isinstance(served, EmbeddingLayer):
                self.refusals[name] = "prompts may be embeddings (--enable-prompt-embeds), of which no token is known"
            elif config.model_config.use_mla and name.endswith("kv_b_proj"):
                self.refusals[name] = "latent attention takes the weight without computing the layer"

    def is_matrix(self, layer: str) -> bool:
        """Tell whether a layer multiplies or looks up."""
        return isinstance(self.layers[layer], LinearLayer | EmbeddingLayer)

    def is_norm(self, layer: str) -> bool:
        """Tell whether a layer is a norm, or a table of positions: it computes once more, with other values."""
        return isinstance(self.layers[layer], NormLayer)

    def plain_weight(self, layer: str) -> torch.Tensor | None:
        """Return the weight that a layer multiplies with or looks up in as it is; None if there is no such."""
        served = self.layers[layer]
        if not isinstance(served, MatrixLayer) or self.has_kernels or self.compiled:
            return None
        return served.plain_weight()

    def adds_no_bias(self, layer: str) -> bool:
        """Tell whether another process adds the bias of a layer."""
        module = self.modules[layer]
        return isinstance(module, seam.layer("RowParallelLinear")) and module.tp_size > 1 and module.tp_rank > 0

    def computes(self, name: str) -> bool:
        """Tell whether a layer has computed with the method that deltas are added in.

        An embedding need not multiply, if some head has computed the logits or if there are none.
        """
        served = self.layers[name]
        if isinstance(served, str):
            return False
        if served.ran or not name.endswith(AS_HEAD):
            return served.ran
        heads = (one for one in self.layers.values() if isinstance(one, LinearLayer) and one.rows is Rows.LOGITS)
        return not self._gave_logits or any(one.ran for one in heads)

    def unused(self) -> list[str]:
        """Return the layers that cannot be changed for a request, with the reason; sorted by name."""
        found = {}
        for name, served in self.layers.items():
            if isinstance(served, str):
                found[name] = served
            elif not self.computes(name):
                found[name] = "it computed without the method that deltas are added in"
        found |= self.refusals
        return [f"{name}: {reason}" for name, reason in sorted(found.items())]

    def check(self, parts: Mapping[str, LayerParts], tensors: DeviceDelta, *, starting: bool) -> None:
        """Refuse a delta that does not fit the memory or the graphs of this engine.

        Args:
            parts: what it changes.
            tensors: its tensors in host memory.
            starting: True before graphs are captured.

        Raises:
            UsageError: it is larger than a slot, or graphs that were captured do not launch its kernels.
        """
        if self.arena is not None and not starting:
            self.arena.check("the delta", tensors.nbytes)
        if not self.captured_tokens:
            return
        for name, one in parts.items():
            served = self.layers[name]
            if not isinstance(served, MatrixLayer):
                continue
            terms = {start: tensors[tensor].terms for start, tensor in one.packed.items()}
            for operand in itertools.chain.from_iterable(terms.values()):
                most = kernels_of(operand.layout).most_tokens(operand.layout)
                if most is not None and most < self.captured_tokens:
                    raise UsageError(
                        f"{name} changes by {operand.layout.kind} terms, whose kernels take {most} tokens where graphs "
                        f"are captured for {self.captured_tokens}; {_EAGER}"
                    )
                if isinstance(served, EmbeddingLayer) and not kernels_of(operand.layout).embeds:
                    raise UsageError(
                        f"{name} changes by {operand.layout.kind} terms, of which no kernel looks rows up in a graph; "
                        f"{_EAGER}"
                    )
            if not starting and not served.layouts(terms) <= served.prepared:
                raise UsageError(
                    f"{name} changes in a layout that no graph was captured for; name a delta of this layout when the "
                    f'engine starts, in additional config {{"deltafmt": {{"prepare": ["a.deltafmt"]}}}}, or {_EAGER}'
                )

    def put(self, slot: int, parts: Mapping[str, LayerParts], host: DeviceDelta | None) -> None:
        """Fill a slot of every layer that a delta changes.

        Args:
            slot: the slot.
            parts: what the delta changes.
            host: its packed tensors in host memory; None where no kernel runs.
        """
        tensors: Mapping[str, DeviceTensor] = {}
        if host is not None:
            arena = self.arena
            tensors = copy_delta(
                host,
                lambda size: (
                    torch.empty(size, dtype=torch.uint8, device=self.choice.device)
                    if arena is None
                    else arena.take(slot, size)
                ),
            )
        for name, one in parts.items():
            served = self.layers[name]
            assert not isinstance(served, str)
            served.put(slot, one, tensors)
        self._bring()

    def clear(self, slot: int) -> None:
        """Empty a slot of every layer."""
        for served in self.layers.values():
            if not isinstance(served, str):
                served.clear(slot)
        self._bring()

    def _bring(self) -> None:
        """Bring changed records to the device, behind the steps that are under way: these read what is there."""
        if self.choice.device.type == "cuda":
            torch.cuda.current_stream(self.choice.device).synchronize()
        self._memory.flush()

    def warm(self, sizes: Iterable[int], dtype: torch.dtype) -> None:
        """Launch what graphs are going to hold, for rows of the base: no kernel is compiled while one is captured.

        Args:
            sizes: the tokens of each graph.
            dtype: that the model computes in.
        """
        layers = {id(one): one for one in self.layers.values() if isinstance(one, MatrixLayer) and one.prepared}
        with self.choice.warming(), torch.inference_mode():
            for size in sorted(set(sizes)):
                for served in layers.values():
                    served.warm(size, dtype)
