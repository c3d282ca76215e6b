"""The steps of an engine without vLLM: the plugin's manager of slots, a model of layers as vLLM's, graphs of its steps.

What vLLM does with a worker is done here in its order: the manager is made, and with it the arena and the tables of
the deltas that are prepared; graphs are captured, of the longest step first; then each step activates the deltas that
it mixes, announces whose its rows are, and replays the graph of its length. The model has no attention, so the logits
of a token depend on its number and its delta alone.
"""

from __future__ import annotations

import itertools
import json
import random
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

import deltafmt
from deltafmt.methods.base import Method
from deltafmt.vllm.loading import load_delta
from deltafmt.vllm.manager import DeltaAdapter, DeltaModelManager
from fake_vllm import Llama
from fake_vllm import config as fake_config

# What a row of logits may differ by, as a share of its length: float32 sums are taken in another order.
BOUND = 1e-3


class Kind(Enum):
    """What the rows are of."""

    LANGUAGE = 1
    TOWER = 2


@dataclass
class Rows:
    """What vLLM says of a step: the number of the adapter of each token, and of each row of logits; 0 for none.

    Its type is another where the rows are those of an image.
    """

    index_mapping: tuple[int, ...]
    prompt_mapping: tuple[int, ...]
    type: Kind = Kind.LANGUAGE


class _Registered(dict[int, Any]):
    @property
    def cache(self) -> dict[int, Any]:
        return self


class _Slots:
    """Gives slots to adapters, and takes the one that was not used for longest; in the place of vLLM's manager."""

    def __init__(self, model: Any, slots: int, device: torch.device, *, vllm_config: Any) -> None:  # noqa: ARG002
        self.model, self.lora_slots, self.device = model, slots, device
        self.lora_index_to_id: list[int | None] = [None] * slots
        self.punica_wrapper_mapping: dict[str, Any] = {}
        self._registered_adapters = _Registered()
        self._used: OrderedDict[int, None] = OrderedDict()
        self._create_lora_modules()

    def _create_lora_modules(self) -> None:
        """Wrap nothing."""

    def activate_adapter(self, number: int) -> bool:
        new = number not in self._used
        if new:
            if len(self._used) == self.lora_slots:
                self._deactivate_adapter(next(iter(self._used)))
            self.lora_index_to_id[self.lora_index_to_id.index(None)] = number
        self._used[number] = None
        self._used.move_to_end(number)
        return new

    def deactivate_adapter(self, number: int) -> bool:
        self._deactivate_adapter(number)
        return True

    def _deactivate_adapter(self, number: int) -> None:
        self.lora_index_to_id[self.lora_index_to_id.index(number)] = None
        del self._used[number]

    def _set_adapter_mapping(self, mapping: Any) -> None:
        """Have no products with factors."""


class Manager(DeltaModelManager, _Slots):
    """The plugin's manager."""


class Adapter(DeltaAdapter):
    """The plugin's adapter."""

    def __init__(self, number: int, rank: int, loras: Any) -> None:  # noqa: ARG002 - as vLLM makes one
        self.id = number


def make(source: Path, folder: Path, methods: dict[str, tuple[Method, float, bool]]) -> None:
    """Write a base in float32 and a delta for each name, and unpack it.

    Args:
        source: the folder of a base and its fine-tune.
        folder: where they go.
        methods: by name: the method; what the fine-tune's difference is multiplied with; True if the embedding and
            the norms change, too.
    """
    old, new = (load_file(source / name / "model.safetensors") for name in ("base", "math"))
    _write(folder / "base", source / "base", {name: value.float() for name, value in old.items()})
    for seed, (name, (method, factor, everything)) in enumerate(methods.items()):
        tuned = {}
        for key, value in old.items():
            change = factor * (new[key].float() - value.float())
            tuned[key] = value.float() + (change if everything or "_proj" in key else 0)
        _write(folder / f"{name}-tuned", source / "base", tuned)
        path = folder / f"{name}.deltafmt"
        deltafmt.pack(folder / "base", folder / f"{name}-tuned", path, method=method, seed=seed)
        deltafmt.unpack(folder / "base", path, folder / name)


def _write(folder: Path, like: Path, tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir()
    (folder / "config.json").write_bytes((like / "config.json").read_bytes())
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")


def model_of(folder: Path, device: torch.device) -> Llama:
    """Return the model of a checkpoint."""
    sizes = json.loads((folder / "config.json").read_text())
    made = Llama(
        SimpleNamespace(
            hidden=sizes["hidden_size"],
            head=sizes["head_dim"],
            heads=sizes["num_attention_heads"],
            kv_heads=sizes["num_key_value_heads"],
            inner=sizes["intermediate_size"],
            layers=sizes["num_hidden_layers"],
            vocabulary=sizes["vocab_size"],
        )
    )
    made.load_weights(load_file(folder / "model.safetensors").items())
    return made.to(device)


def hidden_of(model: Llama, ids: torch.Tensor) -> torch.Tensor:
    """Return what the head is given for each token: the layers of a Llama; q, k and v mixed, for attention."""
    embedding = model.model.embed_tokens
    x, residual = embedding.quant_method.embedding(embedding, ids), None
    for block in model.model.layers:
        attention = block.self_attn
        x, residual = (block.input_layernorm(x), x) if residual is None else block.input_layernorm(x, residual)
        qkv = attention.qkv_proj
        size, groups = qkv.head_size, qkv.num_heads // qkv.num_kv_heads
        parts = qkv(x).split([qkv.num_heads * size, qkv.num_kv_heads * size, qkv.num_kv_heads * size], -1)
        q, k, v = (part.unflatten(-1, (-1, size)) for part in parts)
        mixed = q * torch.sigmoid(k.repeat_interleave(groups, 1)) + v.repeat_interleave(groups, 1)
        x, residual = block.post_attention_layernorm(attention.o_proj(mixed.flatten(1)), residual)
        gate, up = block.mlp.gate_up_proj(x).chunk(2, -1)
        x = block.mlp.down_proj(functional.silu(gate) * up)
    return model.model.norm(x, residual)[0]


def logits_of(model: Llama, hidden: torch.Tensor) -> torch.Tensor:
    """Return the logits of rows."""
    return model.lm_head.quant_method.apply(model.lm_head, hidden)[:, : model.lm_head.org_vocab_size]


class Steps:
    """A worker: its model, its manager, and graphs of its steps.

    Args:
        folder: with ``base`` and deltas.
        device: of the model.
        slots: deltas that one step can mix.
        longest: the most tokens of a step.
        sizes: the tokens of the graphs; none to capture none.
        prepare: the names of the deltas whose layouts graphs are captured for.
        largest: bytes of a slot's block in the arena; 0 for those of the largest delta that is prepared.
        model: options of the model's configuration.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        *,
        slots: int,
        longest: int,
        sizes: Sequence[int] = (),
        prepare: Sequence[str] = (),
        largest: int = 0,
        **model: Any,
    ) -> None:
        self.folder, self.device = folder, device
        options = {"prepare": [str(folder / f"{name}.deltafmt") for name in prepare], "largest": largest}
        config = SimpleNamespace(
            model_config=fake_config(
                enforce_eager=not sizes,
                model=str(folder / "base"),
                revision=None,
                dtype=torch.float32,
                hf_text_config=SimpleNamespace(eos_token_id=1),
                **model,
            ).model_config,
            compilation_config=SimpleNamespace(mode=0, cudagraph_capture_sizes=list(sizes)),
            scheduler_config=SimpleNamespace(max_num_batched_tokens=longest),
            load_config=SimpleNamespace(load_format="auto"),
            speculative_config=None,
            additional_config={"deltafmt": options},
        )
        self.model = model_of(folder / "base", device)
        self.manager = Manager(self.model, slots, device, vllm_config=config)
        self._numbers: dict[str, int] = {}
        self._ids = torch.zeros(longest, dtype=torch.int64, device=device)
        self._graphs: dict[int, tuple[Any, torch.Tensor]] = {}
        with torch.inference_mode():
            self._announce([None] * longest, [0])
            logits_of(self.model, hidden_of(self.model, self._ids)[:1])
            pool = None
            for size in sorted(sizes, reverse=True):
                self._announce([None] * size, [0])
                hidden_of(self.model, self._ids[:size])
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    output = hidden_of(self.model, self._ids[:size])
                pool = pool or graph.pool()
                self._graphs[size] = graph, output

    def load(self, name: str) -> None:
        """Load a delta to host memory, as the worker does when a request names it."""
        number = self._numbers.setdefault(name, len(self._numbers) + 1)
        delta = load_delta(str(self.folder / f"{name}.deltafmt"), self.manager.served, self.manager.base)
        self.manager._add_adapter(Adapter.of(number, delta))

    def drop(self, name: str) -> None:
        """Forget a delta, in its slot and in host memory."""
        number = self._numbers[name]
        if number in self.manager._used:
            self.manager._deactivate_adapter(number)
        self.manager._registered_adapters.pop(number, None)

    def loaded(self) -> list[str]:
        """Return the names of the deltas in host memory."""
        return [name for name, number in self._numbers.items() if number in self.manager._registered_adapters]

    def resident(self) -> list[str]:
        """Return the names of the deltas that have a slot."""
        return [name for name, number in self._numbers.items() if number in self.manager.lora_index_to_id]

    def _announce(self, names: Sequence[str | None], rows: Sequence[int]) -> None:
        numbers = tuple(0 if name is None else self._numbers[name] for name in names)
        self.manager._set_adapter_mapping(Rows(numbers, tuple(numbers[row] for row in rows)))

    def start(
        self,
        ids: Sequence[int],
        names: Sequence[str | None],
        rows: Sequence[int],
        *,
        eager: bool = False,
        delay: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Start a step, and return its hidden rows and the logits of some; nobody waits for the device.

        Args:
            ids: its tokens.
            names: the delta of each; None for the base.
            rows: the tokens whose logits are wanted.
            eager: True to replay no graph.
            delay: clocks of the device that pass before the step begins.
        """
        with torch.inference_mode():
            for name in dict.fromkeys(names):
                if name is not None:
                    if name not in self.loaded():
                        self.load(name)
                    self.manager.activate_adapter(self._numbers[name])
            self._announce(names, rows)
            count = len(ids)
            self._ids.zero_()
            self._ids[:count] = torch.tensor(ids, device=self.device)
            at = torch.tensor(rows, device=self.device)
            if delay:
                torch.cuda._sleep(delay)
            size = min((size for size in self._graphs if size >= count), default=0)
            if eager or not size:
                hidden = hidden_of(self.model, self._ids[:count])
            else:
                graph, output = self._graphs[size]
                graph.replay()
                hidden = output[:count].clone()
            return hidden, logits_of(self.model, hidden[at])


class Played:
    """Steps of mixtures that are drawn, each compared with the unpacked checkpoints.

    Args:
        steps: the worker.
        names: of the deltas.
        seed: of what is drawn.

    Attributes:
        loads: how often a delta was loaded to host memory.
        wrong: the rows that differ: the step, the delta, and by how much, as a share of the row's length.
    """

    IDS = 64

    def __init__(self, steps: Steps, names: Sequence[str], seed: int) -> None:
        self.steps, self.names = steps, names
        self.loads = 0
        self.wrong: list[tuple[int, str | None, float]] = []
        self._random = random.Random(seed)
        self._number = 0
        ids = torch.arange(self.IDS, device=steps.device)
        self.right: dict[str | None, torch.Tensor] = {}
        with torch.inference_mode():
            for name in (None, *names):
                model = model_of(steps.folder / (name or "base"), steps.device)
                self.right[name] = logits_of(model, hidden_of(model, ids))

    def nearest(self) -> float:
        """Return by how much the logits of the two names differ that differ least."""
        pairs = itertools.combinations(self.right.values(), 2)
        return min(float((torch.linalg.norm(a - b, dim=1) / torch.linalg.norm(a, dim=1)).min()) for a, b in pairs)

    def draw(self, longest: int) -> tuple[list[int], list[str | None], list[int]]:
        """Draw tokens, their deltas, and the rows whose logits are wanted; some deltas leave host memory."""
        self._number += 1
        draw, steps = self._random, self.steps
        mixed = draw.sample(self.names, draw.randint(0, min(steps.manager.lora_slots, len(self.names))))
        count = draw.randint(1, longest)
        names = [draw.choice([None, *mixed]) for _ in range(count)]
        for name in steps.loaded():
            if draw.random() < 0.4:
                steps.drop(name)
        self.loads += len({*names} - {None, *steps.loaded()})
        rows = sorted(draw.sample(range(count), draw.randint(1, count)))
        return [draw.randrange(self.IDS) for _ in range(count)], names, rows

    def compare(
        self, ids: Sequence[int], names: Sequence[str | None], rows: Sequence[int], logits: torch.Tensor
    ) -> None:
        """Compare rows of logits with those of the checkpoints."""
        right = torch.stack([self.right[names[row]][ids[row]] for row in rows])
        errors = torch.linalg.norm(logits - right, dim=1) / torch.linalg.norm(right, dim=1)
        self.wrong += [
            (self._number, names[row], error)
            for row, error in zip(rows, errors.tolist(), strict=True)
            if not error <= BOUND  # no number is near
        ]

    def step(self, longest: int, *, eager: bool = False) -> None:
        """Make a step of at most so many tokens."""
        ids, names, rows = self.draw(longest)
        self.compare(ids, names, rows, self.steps.start(ids, names, rows, eager=eager)[1])
