"""The managers of adapters in a worker of vLLM, with deltas beside LoRA adapters.

A delta is an adapter without factors. vLLM decides when it is loaded, which slot it has and when it leaves, as for
every adapter; these classes fill and empty the slots. They stand in front of vLLM's own classes, which they extend.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch

from deltafmt.errors import DeltafmtError, StorageError, UsageError
from deltafmt.vllm import seam
from deltafmt.vllm.arena import Arena
from deltafmt.vllm.base import EngineBase, folder_of
from deltafmt.vllm.choice import BASE, Choice
from deltafmt.vllm.files import FileHandles
from deltafmt.vllm.loading import LoadedDelta, load_delta
from deltafmt.vllm.names import delta_path, is_delta
from deltafmt.vllm.options import Options
from deltafmt.vllm.served import ServedModel

_log = logging.getLogger("deltafmt")


class DeltaAdapter:
    """An adapter without factors, whose changes are those of a delta.

    Attributes:
        delta: the delta; None if it was lost while requests for it were under way.
    """

    delta: LoadedDelta | None

    @classmethod
    def of(cls, number: int, delta: LoadedDelta | None) -> Any:
        """Return the adapter of a number."""
        made: Any = cls(number, 1, {})  # type: ignore[call-arg]
        made.delta = delta
        return made


class DeltaModelManager:
    """Fills and empties slots of a model's layers, as vLLM gives and takes them."""

    model: Any
    device: Any
    lora_slots: int
    lora_index_to_id: list[int | None]
    punica_wrapper_mapping: Mapping[str, Any]
    _registered_adapters: Any

    def __init__(self, *args: Any, vllm_config: Any, **kwargs: Any) -> None:
        self._config = vllm_config
        # The numbers of adapters whose requests end; see DeltaWorkerManager._lose.
        self.ended: set[int] = set()
        super().__init__(*args, vllm_config=vllm_config, **kwargs)  # type: ignore[call-arg]

    def _create_lora_modules(self) -> None:
        config = self._config
        options = Options.of(config)
        tokens = config.scheduler_config.max_num_batched_tokens
        self.choice = Choice(self.lora_slots, torch.device(self.device), tokens)
        self.choice.lenient = config.speculative_config is not None
        self.choice.end = _end_of_text(config.model_config)
        self.base: EngineBase | None = None
        self.refusal = ""
        try:
            self.base = _base_of(config)
            self.served = ServedModel(self.model, self.base.shapes(), self.choice, config)
        except Exception as error:  # noqa: BLE001 - an engine that serves adapters alone must start
            self.base, self.refusal = None, str(error)
            self.served = ServedModel(self.model, {}, self.choice, config)
            _log.warning("no delta can be served by this engine: %s", error)
        self._reserve(options)
        if getattr(self.model, "supports_multimodal", False):
            # Such a model is given embeddings in the place of tokens when the engine starts.
            with torch.inference_mode():
                self.model.embed_input_ids(torch.zeros(1, dtype=torch.int64, device=self.device))
        super()._create_lora_modules()  # type: ignore[misc]

    def _reserve(self, options: Options) -> None:
        """Take the memory of slots before the engine sizes its cache, and prepare tables and kernels for graphs."""
        if not self.served.has_kernels or self.base is None:
            return
        paths = [delta_path(path) for path in options.prepare]
        prepared = [load_delta(path, self.served, self.base, starting=True) for path in paths]
        most = max((delta.nbytes for delta in prepared), default=self.base.checkpoint.nbytes // 8)
        self.served.arena = Arena(self.choice.device, self.lora_slots, options.largest or most)
        for delta in prepared:
            self.served.put(0, delta.parts, delta.tensors)
            self.served.clear(0)
        if self.served.captured_tokens:
            self.served.warm(self._config.compilation_config.cudagraph_capture_sizes, self._config.model_config.dtype)

    def _add_adapter(self, lora: Any) -> None:
        if isinstance(lora, DeltaAdapter):
            self._registered_adapters[lora.id] = lora  # type: ignore[attr-defined]
        else:
            super()._add_adapter(lora)  # type: ignore[misc]

    def activate_adapter(self, lora_id: int) -> bool:
        """Give an adapter a slot, and fill the slot if it is a delta."""
        activated = bool(super().activate_adapter(lora_id))  # type: ignore[misc]
        adapter = self._registered_adapters.cache[lora_id]
        if activated and isinstance(adapter, DeltaAdapter) and adapter.delta is not None:
            slot = self.lora_index_to_id.index(lora_id)
            try:
                self.served.put(slot, adapter.delta.parts, adapter.delta.tensors)
            except BaseException:
                self.deactivate_adapter(lora_id)  # type: ignore[attr-defined]  # or its next rows would be the base's
                raise
        return activated

    def _deactivate_adapter(self, lora_id: int) -> None:
        if lora_id in self.lora_index_to_id:
            self.served.clear(self.lora_index_to_id.index(lora_id))
        super()._deactivate_adapter(lora_id)  # type: ignore[misc]

    def remove_all_adapters(self) -> None:
        """Empty all slots."""
        for slot in range(self.lora_slots):
            self.served.clear(slot)
        self.choice.show((), ())
        super().remove_all_adapters()  # type: ignore[misc]

    def _set_adapter_mapping(self, mapping: Any) -> None:
        adapters: Mapping[int, Any] = self._registered_adapters.cache
        slots = {
            number: slot
            for slot, number in enumerate(self.lora_index_to_id)
            if number is not None and isinstance(adapters.get(number), DeltaAdapter)
        }
        self.choice.lost = {
            slot for number, slot in slots.items() if number in self.ended or self.served.weights_changed
        }
        if mapping.type.name == "LANGUAGE":  # the others are of rows of images
            self.choice.show(_slots(slots, mapping.index_mapping), _slots(slots, mapping.prompt_mapping))
        if slots:
            # To vLLM's own products with factors, rows of deltas are rows of the base.
            tokens, logits = (
                tuple(0 if number in slots else number for number in numbers)
                for numbers in (mapping.index_mapping, mapping.prompt_mapping)
            )
            mapping = dataclasses.replace(mapping, index_mapping=tokens, prompt_mapping=logits)
        super()._set_adapter_mapping(mapping)  # type: ignore[misc]
        if len(self.punica_wrapper_mapping) == 1:
            (wrapper,) = self.punica_wrapper_mapping.values()
            wrapper.deltafmt_idle = not any(mapping.index_mapping) and not any(mapping.prompt_mapping)


def _base_of(config: Any) -> EngineBase:
    """Return the base's checkpoint.

    Raises:
        DeltafmtError: there is none, or it cannot be read.
    """
    if config.load_config.load_format == "dummy":
        raise UsageError("its weights are random (--load-format dummy)")
    if getattr(config.model_config, "enable_sleep_mode", False):
        raise UsageError("its memory may be given away (--enable-sleep-mode), and with it what its deltas lie in")
    return EngineBase(folder_of(config.model_config.model, config.model_config.revision))


def _slots(slots: Mapping[int, int], numbers: Iterable[int]) -> list[int]:
    """Return the slot of each row's delta, given the number of its adapter."""
    return [slots.get(number, BASE) for number in numbers] if slots else [BASE for _ in numbers]


def _end_of_text(model_config: Any) -> int | None:
    """Return the number of the token that ends a text, if the model's configuration says it."""
    found = getattr(model_config.hf_text_config, "eos_token_id", None)
    return found[0] if isinstance(found, list) and found else found if isinstance(found, int) else None


class DeltaWorkerManager:
    """Loads deltas when vLLM asks for an adapter whose path is that of a delta."""

    _manager_cls: ClassVar[Any] = None
    _adapter_cls: ClassVar[Any] = None
    _adapter_manager: Any

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)  # type: ignore[call-arg]
        self._files = FileHandles(Options.of(vllm_config).open_files)
        self._several = vllm_config.parallel_config.tensor_parallel_size > 1
        self._stepping = False
        # The content ids of deltas that were lost, and the adapters that were loaded in the place of others: the prefix
        # cache has blocks of their own for these.
        self._lost: set[str] = set()
        self._apart: set[int] = set()

    def _apply_adapters(self, lora_requests: Any) -> None:
        # What a step asks for was loaded before, when its request came.
        self._stepping = True
        try:
            super()._apply_adapters(lora_requests)  # type: ignore[misc]
        finally:
            self._stepping = False

    def add_adapter(self, lora_request: Any) -> bool:
        """Load an adapter and give it a slot, or note that it was used."""
        held = self._adapter_manager.list_adapters().get(lora_request.lora_int_id)
        if held is not None and isinstance(held, DeltaAdapter) != is_delta(lora_request.lora_path):
            # A load that failed late has left it, and the engine gave its number to another adapter.
            self._adapter_manager.remove_adapter(lora_request.lora_int_id)
        if is_delta(lora_request.lora_path) and self._stepping and lora_request.load_inplace:
            # vLLM repeats the wish with every request; it was granted when the adapter was loaded.
            lora_request = copy.copy(lora_request)
            lora_request.load_inplace = False
        elif is_delta(lora_request.lora_path) and not self._stepping and not lora_request.load_inplace:
            try:
                self._files.check(lora_request.lora_int_id, delta_path(lora_request.lora_path))
            except UsageError as error:
                raise ValueError(str(error)) from None
        return bool(super().add_adapter(lora_request))  # type: ignore[misc]

    def _load_adapter(self, lora_request: Any) -> Any:
        if not is_delta(lora_request.lora_path):
            return super()._load_adapter(lora_request)  # type: ignore[misc]
        path = delta_path(lora_request.lora_path)
        if self._stepping:
            # Another path may have been loaded in the place of the one that this request came with.
            path = self._files.path(lora_request.lora_int_id, path)
        try:
            delta = self._load(lora_request, path)
        except (DeltafmtError, OSError, MemoryError) as error:
            if self._stepping and self._adapter_manager.choice.end is not None:
                # An error here would end the engine. Whoever asked for the delta gets no more text.
                _log.error('delta "%s" is lost, its requests end: %s', lora_request.lora_name, error)
                self._lose(lora_request.lora_int_id)
                return self._adapter_cls.of(lora_request.lora_int_id, None)
            if isinstance(error, StorageError) and not os.path.exists(path):
                missing = seam.name("vllm.exceptions", "LoRAAdapterNotFoundError")
                raise missing(lora_request.lora_name, lora_request.lora_path) from None
            # An error of ours may not travel between processes; its sentence does.
            raise ValueError(str(error)) from None
        if not self._stepping and lora_request.load_inplace:
            self._adapter_manager.ended.discard(lora_request.lora_int_id)
            self._apart.add(lora_request.lora_int_id)
        _log.info('delta "%s" loaded: %s, content id %s', lora_request.lora_name, path, delta.content_id[:16])
        return self._adapter_cls.of(lora_request.lora_int_id, delta)

    def _lose(self, number: int) -> None:
        """End the requests of an adapter that was lost in a step, until another delta is loaded in its place.

        The step computes their rows with the base, and the prefix cache has the blocks already, by the content id. So
        the requests of all adapters end that share these blocks: none of them may go on behind them.
        """
        self._adapter_manager.ended.add(number)
        if number not in self._apart:
            content_id, numbers = self._files.sharing(number)
            self._lost.add(content_id)
            self._adapter_manager.ended |= numbers - self._apart

    def _load(self, lora_request: Any, path: str) -> LoadedDelta:
        manager = self._adapter_manager

        def load(source: str) -> LoadedDelta:
            # Refusals stand here, because the other processes of the engine wait for what this one has loaded.
            if manager.base is None:
                raise UsageError(f"{path}: no delta can be served by this engine: {manager.refusal}")
            if manager.served.weights_changed:
                raise UsageError(
                    f"{path}: the engine's weights were replaced, and deltas are of those that it started with"
                )
            found = load_delta(source, manager.served, manager.base, path)
            if found.content_id in self._lost and not (self._stepping or lora_request.load_inplace):
                raise UsageError(
                    f"{path}: the file of an adapter of the same delta changed while it was served, and what the "
                    "engine has computed since may be wrong; load this one in place"
                )
            return found

        again = bool(lora_request.load_inplace)
        return self._files.load(lora_request.lora_int_id, path, load, again=again, agree=self._agree)

    def _agree(self, content_id: str) -> bool:
        """Tell whether every process that holds a part of the model has loaded the same delta.

        All of them load an adapter at the same time, because all have the same adapters and are given the same steps.

        Args:
            content_id: of what this one has loaded; "" if it could not.
        """
        group = seam.name("vllm.distributed.parallel_state", "get_tp_group")() if self._several else None
        if group is None:
            return True
        found = [""] * group.world_size
        torch.distributed.all_gather_object(found, content_id, group=group.cpu_group)
        return len(set(found)) == 1


def managers() -> Any:
    """Return the class of a worker's manager, made of ours and of vLLM's."""
    adapter = seam.name("vllm.lora.lora_model", "LoRAModel")
    model = seam.name("vllm.lora.model_manager", "LRUCacheLoRAModelManager")
    worker = seam.name("vllm.lora.worker_manager", "LRUCacheWorkerLoRAManager")
    classes = {
        "_adapter_cls": type("DeltaAdapter", (DeltaAdapter, adapter), {}),
        "_manager_cls": type("DeltaModelManager", (DeltaModelManager, model), {}),
    }
    return type("DeltaWorkerManager", (DeltaWorkerManager, worker), classes)
