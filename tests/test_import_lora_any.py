"""Whatever an adapter holds: it is imported and the delta is valid, or it is refused with one of our errors."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

import deltafmt
from conftest import normal, safetensors_bytes, write_folder
from deltafmt.errors import DeltafmtError
from lora_files import PREFIX, base_tensors
from strategies import examples

CONFIG = b'{"vocab_size": 40, "tie_word_embeddings": true}'
EXPERTS = "model.layers.0.mlp.experts"
PAIRS: dict[str, dict[str, tuple[int, ...]]] = {
    "q": {"model.layers.0.q.lora_A.weight": (4, 24), "model.layers.0.q.lora_B.weight": (48, 4)},
    "o": {"model.layers.0.o.lora_A.weight": (4, 24), "model.layers.0.o.lora_B.weight": (24, 4)},
    "head": {"lm_head.lora_A.weight": (4, 24), "lm_head.lora_B.weight": (40, 4)},
    "table": {"model.embed_tokens.lora_embedding_A": (4, 40), "model.embed_tokens.lora_embedding_B": (24, 4)},
    "experts": {f"{EXPERTS}.lora_A.weight": (12, 6), f"{EXPERTS}.lora_B.weight": (8, 12)},
    "kernel": {"conv.lora_A.weight": (4, 3, 2), "conv.lora_B.weight": (4, 4, 1)},
}
MODULES = (
    "model.layers.0.q",
    "model.embed_tokens",
    "lm_head",
    EXPERTS,
    f"{EXPERTS}.base_layer",
    "conv",
    "model.norm",
    "s",
)
ENDS = (
    "lora_A.weight",
    "lora_B.weight",
    "lora_B.bias",
    "lora_magnitude_vector",
    "base_layer.weight",
    "base_layer.bias",
)
ENDS += (
    "token_adapter.trainable_tokens_delta",
    "weight",
    "bias",
    "modules_to_save.weight",
    "original_module.weight",
    "lora_x",
)
SHAPES: tuple[tuple[int, ...], ...] = (
    (),
    (0,),
    (24,),
    (40,),
    (48,),
    (40, 24),
    (42, 24),
    (4, 42),
    (48, 24),
    (2, 24),
    (4, 3, 2),
)
SETTINGS: dict[str, Any] = {
    "use_dora": True,
    "lora_bias": True,
    "use_rslora": True,
    "fan_in_fan_out": True,
    "trainable_token_indices": [1, 2],
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "modules_to_save": ["lm_head"],
    "rank_pattern": {"o": 2},
}


@examples(80)
@given(
    st.lists(st.sampled_from(sorted(PAIRS)), min_size=1, max_size=3, unique=True),
    st.dictionaries(st.tuples(st.sampled_from(MODULES), st.sampled_from(ENDS)), st.sampled_from(SHAPES), max_size=2),
    st.sets(st.sampled_from(sorted(SETTINGS)), max_size=3),
    st.sampled_from(("BF16", "F16", "F32")),
)
def test_any_adapter_is_imported_or_refused(
    pairs: list[str], odd: dict[tuple[str, str], tuple[int, ...]], settings: set[str], dtype: str
) -> None:
    shapes = {name: shape for pair in pairs for name, shape in PAIRS[pair].items()}
    shapes |= {f"{module}.{end}": shape for (module, end), shape in odd.items()}
    tensors = {PREFIX + name: normal(len(name), shape, dtype) for name, shape in shapes.items()}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **{key: SETTINGS[key] for key in settings}}
    more = {
        f"{EXPERTS}.gate_up_proj": normal(9, (3, 8, 6)),
        "conv.weight": normal(8, (4, 3, 2)),
        "s": normal(1, (), "F32"),
    }
    with tempfile.TemporaryDirectory() as name, contextlib.suppress(DeltafmtError):
        folder = Path(name)
        base = write_folder(folder / "base", {**base_tensors(), **more}, files={"config.json": CONFIG})
        (folder / "a").mkdir()
        (folder / "a" / "adapter_model.safetensors").write_bytes(safetensors_bytes(tensors, {}))
        (folder / "a" / "adapter_config.json").write_text(json.dumps(config))
        deltafmt.import_lora(base, folder / "a", folder / "d.deltafmt", threads=1)
        deltafmt.verify(folder / "d.deltafmt", base, threads=1)
        deltafmt.unpack(base, folder / "d.deltafmt", folder / "out", threads=1)
        deltafmt.export_lora(folder / "d.deltafmt", folder / "again", base=base)
