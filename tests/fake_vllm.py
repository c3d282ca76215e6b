"""Layers as vLLM's, with the attributes that the plugin reads, and a Llama of them that loads a checkpoint.

They stand in where vLLM is not installed. A process of several has its share of heads, rows, columns and vocabulary,
cut as vLLM cuts them.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from deltafmt.vllm import seam


class Method:
    """Multiplies and looks up."""

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return the product with the layer's weight."""
        return functional.linear(x, layer.weight, bias)

    def embedding(self, layer: Any, input_: torch.Tensor) -> torch.Tensor:
        """Return rows of the layer's weight."""
        return functional.embedding(input_, layer.weight)


class LinearBase(nn.Module):
    """A linear layer of this process."""

    def __init__(self, rows: int, columns: int, cut: int, rank: int, *, bias: bool = False) -> None:
        super().__init__()
        self.tp_size, self.tp_rank = cut, rank
        self.output_size_per_partition, self.input_size_per_partition = rows, columns
        self.weight = nn.Parameter(torch.empty(rows, columns), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(rows), requires_grad=False) if bias else None
        for parameter in self.parameters():
            parameter.weight_loader = self.load
        self.quant_method = Method()

    def load(self, parameter: Any, loaded: torch.Tensor, *_: Any) -> None:
        """Write a whole tensor."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output of this process."""
        return self.quant_method.apply(self, x, self.bias)


class ReplicatedLinear(LinearBase):
    """Every process has it whole."""

    def load(self, parameter: Any, loaded: torch.Tensor, *_: Any) -> None:
        """Write a whole tensor."""
        parameter.data.copy_(loaded)


class ColumnParallelLinear(LinearBase):
    """Every process has some rows."""

    def load(self, parameter: Any, loaded: torch.Tensor, *_: Any) -> None:
        """Write this process's rows."""
        rows = len(parameter)
        parameter.data.copy_(loaded[self.tp_rank * rows : (self.tp_rank + 1) * rows])


class MergedColumnParallelLinear(ColumnParallelLinear):
    """Several matrices, one below the other; every process has some rows of each."""

    def __init__(self, sizes: list[int], columns: int, cut: int, rank: int) -> None:
        self.output_sizes = sizes
        super().__init__(sum(sizes) // cut, columns, cut, rank)

    def load(self, parameter: Any, loaded: torch.Tensor, *shards: Any) -> None:
        """Write this process's rows of one matrix."""
        (shard,) = shards
        start, size = sum(self.output_sizes[:shard]) // self.tp_size, self.output_sizes[shard] // self.tp_size
        parameter.data[start : start + size] = loaded[self.tp_rank * size : (self.tp_rank + 1) * size]


class QKVParallelLinear(ColumnParallelLinear):
    """Queries, keys and values; several processes may have the same heads of keys and values."""

    def __init__(self, columns: int, size: int, heads: int, kv_heads: int, cut: int, rank: int) -> None:
        self.head_size = self.v_head_size = size
        self.total_num_heads, self.total_num_kv_heads = heads, kv_heads
        self.num_heads = heads // cut
        self.num_kv_heads = max(kv_heads // cut, 1)
        self.num_kv_head_replicas = max(cut // kv_heads, 1)
        super().__init__((self.num_heads + 2 * self.num_kv_heads) * size, columns, cut, rank)

    def load(self, parameter: Any, loaded: torch.Tensor, *shards: Any) -> None:
        """Write this process's rows of queries, keys or values."""
        (shard,) = shards
        sizes = {"q": self.num_heads * self.head_size, "k": self.num_kv_heads * self.head_size}
        sizes["v"] = sizes["k"]
        start = {"q": 0, "k": sizes["q"], "v": sizes["q"] + sizes["k"]}[shard]
        rank = self.tp_rank if shard == "q" else self.tp_rank // self.num_kv_head_replicas
        size = sizes[shard]
        parameter.data[start : start + size] = loaded[rank * size : (rank + 1) * size]


class RowParallelLinear(LinearBase):
    """Every process has some columns, and the outputs are added up."""

    def load(self, parameter: Any, loaded: torch.Tensor, *_: Any) -> None:
        """Write this process's columns."""
        if parameter.dim() == 1:
            parameter.data.copy_(loaded)
            return
        columns = parameter.shape[1]
        parameter.data.copy_(loaded[:, self.tp_rank * columns : (self.tp_rank + 1) * columns])


class VocabParallelEmbedding(nn.Module):
    """An embedding; every process has some rows, with padding behind the last."""

    def __init__(self, vocabulary: int, columns: int, cut: int, rank: int) -> None:
        super().__init__()
        self.org_vocab_size, self.embedding_dim, self.num_added_embeddings = vocabulary, columns, 0
        self.tp_size, self.tp_rank = cut, rank
        rows = -(-vocabulary // 64) * 64 // cut
        first, stop = min(rank * rows, vocabulary), min((rank + 1) * rows, vocabulary)
        self.shard_indices = SimpleNamespace(org_vocab_start_index=first, org_vocab_end_index=stop)
        self.weight = nn.Parameter(torch.zeros(rows, columns), requires_grad=False)
        self.weight.weight_loader = self.load
        self.quant_method = Method()

    def load(self, parameter: Any, loaded: torch.Tensor) -> None:
        """Write this process's rows."""
        mine = self.shard_indices
        rows = loaded[mine.org_vocab_start_index : mine.org_vocab_end_index]
        parameter.data[: len(rows)] = rows


class ParallelLMHead(VocabParallelEmbedding):
    """A head."""


class RMSNorm(nn.Module):
    """A norm that adds a residual, and writes to both of its arguments, as fused kernels do."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(columns), requires_grad=False)
        self.variance_epsilon = 1e-6

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        """Return the normalized rows, and the sum if a residual was given."""
        if residual is not None:
            residual += x
            x.copy_(residual)
        found = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon) * self.weight
        if residual is None:
            return found
        x.copy_(found)
        return x, residual


class GemmaRMSNorm(RMSNorm):
    """A norm whose weight is added to one."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        """Return the normalized rows, and the sum if a residual was given."""
        given = x if residual is None else x + residual
        found = given * torch.rsqrt(given.pow(2).mean(-1, keepdim=True) + self.variance_epsilon) * (1 + self.weight)
        return found if residual is None else (found, given)


class LayerNorm(nn.LayerNorm):
    """A norm with a bias."""


class RoutedExperts(nn.Module):
    """Experts."""


CLASSES = {
    kind.__name__: kind
    for kind in (
        ColumnParallelLinear,
        GemmaRMSNorm,
        LayerNorm,
        LinearBase,
        MergedColumnParallelLinear,
        ParallelLMHead,
        QKVParallelLinear,
        RMSNorm,
        ReplicatedLinear,
        RoutedExperts,
        RowParallelLinear,
        VocabParallelEmbedding,
    )
} | {"UnquantizedLinearMethod": Method, "UnquantizedEmbeddingMethod": Method}


class _Block(nn.Module):
    def __init__(self, sizes: SimpleNamespace, cut: int, rank: int) -> None:
        super().__init__()
        self.self_attn = nn.Module()
        self.self_attn.qkv_proj = QKVParallelLinear(sizes.hidden, sizes.head, sizes.heads, sizes.kv_heads, cut, rank)
        self.self_attn.o_proj = RowParallelLinear(sizes.hidden, sizes.heads * sizes.head // cut, cut, rank)
        self.mlp = nn.Module()
        self.mlp.gate_up_proj = MergedColumnParallelLinear([sizes.inner, sizes.inner], sizes.hidden, cut, rank)
        self.mlp.down_proj = RowParallelLinear(sizes.hidden, sizes.inner // cut, cut, rank)
        self.input_layernorm = RMSNorm(sizes.hidden)
        self.post_attention_layernorm = RMSNorm(sizes.hidden)


STACKED: tuple[tuple[str, str, Any], ...] = (
    ("q_proj", "qkv_proj", "q"),
    ("k_proj", "qkv_proj", "k"),
    ("v_proj", "qkv_proj", "v"),
    ("gate_proj", "gate_up_proj", 0),
    ("up_proj", "gate_up_proj", 1),
)


class Llama(nn.Module):
    """The layers of a Llama whose head is tied, as one of several processes has them."""

    def __init__(self, sizes: SimpleNamespace, cut: int = 1, rank: int = 0) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = VocabParallelEmbedding(sizes.vocabulary, sizes.hidden, cut, rank)
        self.model.layers = nn.ModuleList(_Block(sizes, cut, rank) for _ in range(sizes.layers))
        self.model.norm = RMSNorm(sizes.hidden)
        self.lm_head = ParallelLMHead(sizes.vocabulary, sizes.hidden, cut, rank)
        self.lm_head.weight = self.model.embed_tokens.weight

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Give every tensor to the loader of its parameter."""
        parameters = dict(self.named_parameters())
        for name, loaded in weights:
            if name.startswith("lm_head."):
                continue
            for part, whole, shard in STACKED:
                if f".{part}." in name:
                    parameter = parameters[name.replace(part, whole)]
                    parameter.weight_loader(parameter, loaded, shard)
                    break
            else:
                parameter = parameters[name]
                loader = getattr(parameter, "weight_loader", lambda held, given: held.data.copy_(given))
                loader(parameter, loaded)


@pytest.fixture
def classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the plugin take these classes for vLLM's."""
    monkeypatch.setattr(seam, "layer", CLASSES.__getitem__)


_MODEL = {"is_encoder_decoder": False, "use_mla": False, "enable_prompt_embeds": False, "enforce_eager": True}


def config(**model: Any) -> SimpleNamespace:
    """Return what the plugin reads of an engine's configuration."""
    return SimpleNamespace(model_config=SimpleNamespace(**_MODEL | model))
