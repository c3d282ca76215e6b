"""LoRA adapters as delta files: the factors, what unpacks from them, and what is refused."""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import deltafmt
from conftest import (
    Cli,
    Raw,
    Tensors,
    expected_sum,
    normal,
    plain,
    raw,
    read_folder,
    refused,
    write_folder,
)
from deltafmt.checkpoint.adapter import Adapter
from deltafmt.errors import InvalidFileError, NonFiniteError, Remedy, UnsupportedError, UsageError, WrongBaseError
from deltafmt.terms.lowrank.layout import LowRankLayout
from lora_files import BASE_FILES, CONFIG, PREFIX, Files, base_tensors, pair_of, product, small_files, write_adapter
from strategies import examples

DTYPES = ("BF16", "F16", "F32")


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return small_files(tmp_path)


def layout_of(delta: Path, name: str) -> LowRankLayout:
    with deltafmt.open(delta) as opened:
        (term,) = opened[name].terms
        assert isinstance(term.layout, LowRankLayout)
        return term.layout


@st.composite
def adapters(draw: st.DrawFn) -> tuple[Tensors, Tensors, dict[str, Any], dict[str, float]]:
    """Give a base, factors, a configuration, and every module's scaling; modules named e are embeddings, t crossed."""
    config: dict[str, Any] = {"r": draw(st.integers(1, 9)), "lora_alpha": draw(st.integers(1, 40))}
    config["use_rslora"] = draw(st.booleans())
    ranks, alphas = {}, {}
    base: Tensors = {"anchor.weight": normal(90, (8, 8))}
    factors: Tensors = {}
    scalings = {}
    for number in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(("linear", "crossed", "embedding")))
        module = f"model.layers.{number}.{'embed_tokens' if kind == 'embedding' else kind}"
        rank, alpha = config["r"], config["lora_alpha"]
        if draw(st.booleans()):
            rank = ranks[f"layers.{number}.*"] = draw(st.integers(1, 9))
        if draw(st.booleans()):
            alpha = alphas[module] = draw(st.integers(1, 64))
        rows, columns = draw(st.integers(1, 40)), draw(st.integers(41, 70))
        dtype, of_a, of_b = (draw(st.sampled_from(DTYPES)) for _ in range(3))
        end = "lora_embedding_{}" if kind == "embedding" else "lora_{}.weight"
        base[f"{module}.weight"] = normal(number, (rows, columns) if kind == "linear" else (columns, rows), dtype)
        factors[f"{module}.{end.format('A')}"] = normal(number + 10, (rank, columns), of_a, 0.2)
        factors[f"{module}.{end.format('B')}"] = normal(number + 20, (rows, rank), of_b, 0.2)
        scalings[module] = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
    return base, factors, {**config, "rank_pattern": ranks, "alpha_pattern": alphas}, scalings


@examples(40)
@given(adapters(), st.sampled_from(("hot", "cold")))
def test_unpacked_is_base_plus_the_scaled_product(
    case: tuple[Tensors, Tensors, dict[str, Any], dict[str, float]], profile: str
) -> None:
    tensors, factors, config, scalings = case
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = write_folder(folder / "base", tensors)
        adapter = write_adapter(folder / "adapter", factors, **config)
        delta = folder / "d.deltafmt"
        result = deltafmt.import_lora(base, adapter, delta, profile=profile, threads=2)
        assert result.content_id == deltafmt.verify(delta, base, threads=1).content_id
        assert (result.size, sum(result.ranks.values()), result.same) == (delta.stat().st_size, len(scalings), 1)
        deltafmt.unpack(base, delta, folder / "out", threads=1)
        found = read_folder(folder / "out")
        assert found["anchor.weight"] == tensors["anchor.weight"]
        for module, scaling in scalings.items():
            ends = ("lora_embedding_A", "lora_embedding_B") if "embed" in module else ("lora_A.weight", "lora_B.weight")
            a, b = (factors[f"{module}.{end}"] for end in ends)
            dense = product(a, b, scaling)
            dense = dense if "linear" in module else dense.T
            old, new = tensors[f"{module}.weight"], found[f"{module}.weight"]
            layout = layout_of(delta, f"{module}.weight")
            if a.shape[0] <= b.shape[0]:
                assert layout.rank == a.shape[0]
                exact = a.dtype == b.dtype and math.frexp(scaling)[0] == 0.5
                assert not exact or layout.factors == a.dtype
                assert a.dtype == b.dtype or layout.factors == "F32"
                assert new.data == expected_sum(old, dense, old.dtype)
            else:
                # More vectors than rows: the product itself, which float64 sums.
                assert (layout.rank, layout.factors) == (b.shape[0], "F32")
                with deltafmt.open(delta) as opened:
                    decoded = opened.delta(f"{module}.weight")
                np.testing.assert_allclose(decoded, dense, rtol=1e-4, atol=1e-5)
                assert new.data == expected_sum(old, decoded, old.dtype)


def test_the_scaling_is_exact_where_the_dtype_holds_it(tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base", {"q.weight": normal(1, (48, 24))})
    for dtype, alpha, kept in (("BF16", 8, "BF16"), ("F16", 1, "F16"), ("BF16", 3, "F32"), ("F32", 3, "F32")):
        adapter = write_adapter(tmp_path / f"{dtype}-{alpha}", pair_of("q", 48, 24, dtype=dtype), lora_alpha=alpha)
        out = tmp_path / f"{dtype}-{alpha}.deltafmt"
        deltafmt.import_lora(base, adapter, out)
        assert layout_of(out, "q.weight").factors == kept
    tiny = {**pair_of("q", 48, 24, dtype="F16"), "q.lora_B.weight": raw(np.full((48, 4), 2.0**-24), "F16")}
    deltafmt.import_lora(base, write_adapter(tmp_path / "tiny", tiny, lora_alpha=2), tmp_path / "tiny.deltafmt")
    assert layout_of(tmp_path / "tiny.deltafmt", "q.weight").factors == "F32"


@pytest.mark.parametrize(
    ("model_type", "module", "flag", "crossed"),
    [
        ("gpt2", "h.0.attn.c_proj", False, True),
        ("gpt_bigcode", "h.0.attn.c_proj", False, False),
        ("tiny", "h.0.odd", True, True),
        ("llama", "h.0.q", False, False),
    ],
)
def test_square_matrices_are_crossed_where_the_model_or_the_adapter_says_so(
    tmp_path: Path, model_type: str, module: str, flag: bool, crossed: bool
) -> None:
    config = {"config.json": json.dumps({"model_type": model_type}).encode()}
    base = write_folder(tmp_path / "base", {f"{module}.weight": normal(1, (24, 24))}, files=config)
    factors = pair_of(module, 24, 24)
    adapter = write_adapter(tmp_path / "adapter", factors, fan_in_fan_out=flag)
    deltafmt.import_lora(base, adapter, tmp_path / "d.deltafmt")
    dense = product(factors[f"{module}.lora_A.weight"], factors[f"{module}.lora_B.weight"], 2)
    with deltafmt.open(tmp_path / "d.deltafmt") as opened:
        assert np.array_equal(opened.delta(f"{module}.weight"), dense.T if crossed else dense)


def test_whole_tensors(tmp_path: Path) -> None:
    """Heads, biases and norms are replaced, what has the base's bytes is not, a head of its own is added."""
    tensors = base_tensors()
    base = write_folder(tmp_path / "base", tensors)
    whole = {
        "lm_head.weight": normal(50, (40, 24)),
        "model.norm.weight": tensors["model.norm.weight"],
        "model.layers.0.q.base_layer.weight": tensors["model.layers.0.q.weight"],
        "model.layers.0.q.base_layer.bias": normal(51, (48,)),
        "classifier.dense.weight": normal(52, (3, 24), "F32"),
    }
    adapter = write_adapter(
        tmp_path / "a", {**pair_of("model.layers.0.q", 48, 24), **whole}, modules_to_save=["lm_head", "classifier"]
    )
    result = deltafmt.import_lora(base, adapter, tmp_path / "d.deltafmt")
    assert result.replaced == ["classifier.dense.weight", "lm_head.weight", "model.layers.0.q.bias"]
    assert (result.ranks, result.same) == ({4: 1}, 4)
    deltafmt.verify(tmp_path / "d.deltafmt", base)
    deltafmt.unpack(base, tmp_path / "d.deltafmt", tmp_path / "out")
    found = read_folder(tmp_path / "out")
    assert found.keys() == {*tensors, "classifier.dense.weight"}
    assert found["lm_head.weight"] == whole["lm_head.weight"]
    assert found["model.layers.0.q.bias"] == whole["model.layers.0.q.base_layer.bias"]
    assert found["classifier.dense.weight"] == whole["classifier.dense.weight"]


@pytest.mark.parametrize("prefixes", [("model.", ""), ("", "model."), ("transformer.", "transformer.")])
def test_names_with_a_part_in_front(tmp_path: Path, prefixes: tuple[str, str]) -> None:
    of_adapter, of_base = prefixes
    base = write_folder(tmp_path / "base", {f"{of_base}layers.0.q.weight": normal(1, (48, 24))})
    adapter = write_adapter(tmp_path / "a", pair_of(f"{of_adapter}layers.0.q", 48, 24))
    assert deltafmt.import_lora(base, adapter, tmp_path / "d.deltafmt").ranks == {4: 1}


def test_the_unpacked_folder_has_the_bases_configuration(files: Files, tmp_path: Path, cli: Cli) -> None:
    for name, data in (("README.md", b"the adapter\n"), ("config.json", b"{}"), ("training_args.bin", b"0")):
        (files.adapter / name).write_bytes(data)
    (files.adapter / "checkpoint-5").mkdir()
    out = tmp_path / "d.deltafmt"
    result = cli("import-lora", files.base, files.adapter, "-o", out)
    assert result.code == 0
    assert result.err.count("does not travel") == 2
    with deltafmt.open(out) as opened:
        attached = {name: opened.attachment(name) for name in opened.container.attachments}
        assert opened.metadata["lora.base_model_name_or_path"] == "somebody/tiny"
    assert attached == {**BASE_FILES, "README.md": b"the adapter\n"}
    (files.adapter / "tokenizer.json").write_bytes(b'{"of": "the adapter"}')
    deltafmt.import_lora(files.base, files.adapter, out, force=True)
    with deltafmt.open(out) as opened:
        assert set(opened.container.attachments) == {*BASE_FILES} - {"vocab.json"}
        assert opened.attachment("tokenizer.json") == b'{"of": "the adapter"}'


def test_the_same_bytes_whatever_the_number_of_threads(files: Files, tmp_path: Path) -> None:
    for threads in (1, 5):
        deltafmt.import_lora(files.base, files.adapter, tmp_path / str(threads), threads=threads)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "5").read_bytes()


WRONG_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another type": ({"peft_type": "LOHA"}, "peft_type 'LOHA'"),
    "dora without lengths": ({"use_dora": True}, "no lora_magnitude_vector"),
    "replicated layers": ({"layer_replication": [[0, 2], [1, 2]]}, "more layers than its base"),
    "a part of the tokens": ({"alora_invocation_tokens": [1]}, "serve the adapter with PEFT"),
    "a changed base": ({"kasa_config": {"beta": 1}}, "merge_and_unload"),
    "a saved module that is not there": ({"modules_to_save": ["lm_head"]}, 'names "lm_head"'),
    "rows that are not there": ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    "rows in words": ({"trainable_token_indices": ["one"]}, "token numbers"),
    "an endless expression": ({"rank_pattern": {"(.+)+x": 4}}, "300,000 ways"),
    "a look ahead": ({"alpha_pattern": {"(?!v)q": 4}}, "name the modules in plain words"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4'"),
    "a key to come": ({"use_magic": [1]}, "use_magic"),
    "another rank": ({"r": 5}, "rank 5"),
    "no rank": ({"r": 0}, "r is 0"),
    "a rank in words": ({"rank_pattern": {"q": "four"}}, "'four'"),
    "no number": ({"lora_alpha": math.nan}, "lora_alpha is nan"),
    "a huge number": ({"lora_alpha": 10**400}, "lora_alpha"),
    "no map": ({"alpha_pattern": [1]}, "alpha_pattern [1]"),
    "no expression": ({"rank_pattern": {"(": 4}}, "rank_pattern '('"),
    "no names": ({"modules_to_save": "lm_head"}, "modules_to_save"),
}


@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_wrong_configurations(files: Files, tmp_path: Path, cli: Cli, case: str) -> None:
    changes, word = WRONG_CONFIGS[case]
    adapter = write_adapter(tmp_path / "wrong", files.factors, **changes)
    refused(cli("import-lora", files.base, adapter, "-o", tmp_path / "d.deltafmt"), 3, word, "wrong")
    assert not list(tmp_path.glob("*d.deltafmt*"))


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just(10**400)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=4,
)


@examples(100)
@given(st.dictionaries(st.sampled_from(sorted(CONFIG)), VALUES, max_size=4))
def test_any_configuration_is_read_or_refused(changes: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        adapter = write_adapter(Path(name) / "a", pair_of("q", 6, 5), **changes)
        with contextlib.suppress(InvalidFileError):
            Adapter(adapter).close()


Q = "model.layers.0.q"
WRONG_TENSORS: dict[str, tuple[dict[str, Raw | None], int, str]] = {
    "no B": ({f"{Q}.lora_B.weight": None}, 3, "lora_A.weight"),
    "an unknown module": (pair_of("model.layers.3.q", 48, 24), 4, "model.layers.3.q.lora_A.weight"),
    "an unknown tensor": ({"model.layers.0.k.bias": normal(1, (3,))}, 4, "model.layers.0.k.bias"),
    "another shape": (pair_of(Q, 48, 32), 4, "[48, 24]"),
    "a whole tensor of another shape": ({"lm_head.weight": normal(1, (40, 25))}, 4, "[40, 25]"),
    "a head with other rows": ({"lm_head.weight": normal(1, (41, 24))}, 4, "embed_tokens"),
    "a base layer of another shape": ({f"{Q}.base_layer.weight": normal(9, (48, 25))}, 4, "[48, 25]"),
    "a magnitude": ({f"{Q}.lora_magnitude_vector": normal(9, (48,))}, 3, "lora_magnitude_vector"),
    "a bias": ({f"{Q}.lora_B.bias": normal(9, (48,))}, 3, "lora_bias is not set"),
    "one convolution": ({f"{Q}.lora_A.weight": normal(9, (4, 24, 1, 1))}, 3, "[4, 24, 1, 1]"),
    "several adapters": ({f"{Q}.lora_A.one.weight": normal(1, (4, 24))}, 3, "several adapters"),
    "what ZeRO-3 leaves": ({f"{Q}.lora_A.weight": normal(1, (0,))}, 3, "ZeRO-3"),
    "the same tensor by two names": (
        {"module.lm_head.weight": normal(1, (40, 24)), "lm_head.weight": normal(2, (40, 24))},
        3,
        "differ",
    ),
    "integers": ({f"{Q}.lora_A.weight": plain(np.zeros((4, 24), np.int8))}, 3, "I8"),
    "not a number": ({f"{Q}.lora_A.weight": raw(np.full((4, 24), np.nan), "BF16")}, 2, f"{Q}.lora_A.weight"),
    "an embedding that is none": (
        {"lm_head.lora_embedding_A": normal(1, (4, 24)), "lm_head.lora_embedding_B": normal(1, (40, 4))},
        4,
        "lm_head",
    ),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_wrong_tensors(files: Files, tmp_path: Path, cli: Cli, case: str) -> None:
    changes, code, word = WRONG_TENSORS[case]
    tensors = {name: tensor for name, tensor in {**files.factors, **changes}.items() if tensor is not None}
    adapter = write_adapter(tmp_path / "wrong", tensors)
    refused(cli("import-lora", files.base, adapter, "-o", tmp_path / "d.deltafmt"), code, word)
    assert not list(tmp_path.glob("*d.deltafmt*"))


def test_wrong_folders(files: Files, tmp_path: Path, cli: Cli) -> None:
    def fails(adapter: Path, code: int, *words: str) -> None:
        refused(cli("import-lora", files.base, adapter, "-o", tmp_path / "d.deltafmt"), code, *words)

    fails(tmp_path / "nowhere", 5, "nowhere")
    fails(files.adapter / "adapter_model.safetensors", 3, "not a folder")
    fails(files.base, 3, "no adapter_model.safetensors")
    (files.adapter / "adapter_config.json").write_text("[")
    fails(files.adapter, 3, "adapter_config.json", "not valid JSON")
    (files.adapter / "adapter_config.json").unlink()
    fails(files.adapter, 5, "adapter_config.json")
    (files.adapter / "adapter_model.safetensors").rename(files.adapter / "adapter_model.bin")
    fails(files.adapter, 3, "adapter_model.bin cannot be read", "save_pretrained")
    write_adapter(tmp_path / "outer" / "math", files.factors)
    fails(tmp_path / "outer", 3, "its subfolder math holds an adapter", str(tmp_path / "outer" / "math"))


def test_bases_without_a_delta(tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base", {"q.weight": plain(np.zeros((48, 24), np.int8))})
    with pytest.raises(UnsupportedError, match="I8"):
        deltafmt.import_lora(base, write_adapter(tmp_path / "a", pair_of("q", 48, 24)), tmp_path / "d.deltafmt")


def test_two_of_one_tensor(tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base", {"q.weight": normal(1, (48, 24)), "norm.bias": normal(2, (24,))})
    twice = {
        "modules": {**pair_of("q", 48, 24), **pair_of("model.q", 48, 24)},
        "tensors": {"norm.bias": normal(3, (24,)), "model.norm.bias": normal(4, (24,))},
    }
    for what, tensors in twice.items():
        with pytest.raises(InvalidFileError, match=f"two {what}"):
            deltafmt.import_lora(base, write_adapter(tmp_path / what, tensors), tmp_path / "d.deltafmt")


def test_an_adapter_in_the_folder_of_its_base(files: Files, tmp_path: Path) -> None:
    """Beside merged weights, its configuration would have transformers load the adapter once more."""
    for path in files.adapter.iterdir():
        path.rename(files.base / path.name)
    deltafmt.import_lora(files.base, files.base, tmp_path / "d.deltafmt")
    with deltafmt.open(tmp_path / "d.deltafmt") as opened:
        assert "adapter_config.json" not in opened.container.attachments


def test_outputs_that_exist(files: Files, tmp_path: Path) -> None:
    out = tmp_path / "d.deltafmt"
    deltafmt.import_lora(files.base, files.adapter, out)
    before = out.read_bytes()
    with pytest.raises(UsageError, match=r"exists$") as caught:
        deltafmt.import_lora(files.base, files.adapter, out)
    assert caught.value.remedy == Remedy("force")
    bad = write_adapter(tmp_path / "bad", {**files.factors, f"{Q}.lora_B.weight": raw(np.full((48, 4), np.inf), "F32")})
    with pytest.raises(NonFiniteError, match="lora_B"):
        deltafmt.import_lora(files.base, bad, out, force=True)
    assert out.read_bytes() == before
    for path in (files.base / "model.safetensors", files.adapter / "adapter_model.safetensors"):
        with pytest.raises(UsageError):
            deltafmt.import_lora(files.base, files.adapter, path, force=True)
    with pytest.raises(UsageError, match="'warm'"):
        deltafmt.import_lora(files.base, files.adapter, out, profile="warm")


def test_an_error_names_the_base_that_the_adapter_names(files: Files, tmp_path: Path) -> None:
    other = write_folder(tmp_path / "other", {"x.weight": normal(1, (4, 4))})
    with pytest.raises(WrongBaseError, match="somebody/tiny"):
        deltafmt.import_lora(other, files.adapter, tmp_path / "d.deltafmt")


def test_json(files: Files, tmp_path: Path, cli: Cli) -> None:
    found = cli("import-lora", files.base, files.adapter, "-o", tmp_path / "d.deltafmt", "--json").json()
    assert (found["ranks"], found["same"], found["replaced"]) == ({"4": 2}, 5, [])
    assert found["base_name"] == "somebody/tiny"
    assert found["bytes"] == (tmp_path / "d.deltafmt").stat().st_size
    text = cli("import-lora", files.base, files.adapter, "-o", tmp_path / "e.deltafmt").out
    assert "2 deltas of rank 4, 5 same as the base" in text
    assert PREFIX not in text


def test_an_imported_adapter_is_served(tmp_path: Path) -> None:
    """The logits of attached factors are those of the unpacked checkpoint."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tiny_models import close, ids, logits, new_model

    model = new_model("gpt2")
    model.save_pretrained(tmp_path / "base")
    factors: Tensors = {}
    for number, block in enumerate(("transformer.h.0", "transformer.h.1")):
        factors |= pair_of(f"{block}.attn.c_attn", 96, 32, dtype="F32", seed=number)
        factors |= pair_of(f"{block}.attn.c_proj", 32, 32, dtype="F16", seed=number + 10)
    adapter = write_adapter(tmp_path / "a", factors, fan_in_fan_out=True, lora_alpha=60)
    delta = deltafmt.import_lora(tmp_path / "base", adapter, tmp_path / "d.deltafmt").path
    deltafmt.unpack(tmp_path / "base", delta, tmp_path / "merged")
    tokens = ids(2, 9)
    expected = logits(type(model).from_pretrained(tmp_path / "merged").eval(), tokens)
    attached = deltafmt.transformers.attach(type(model).from_pretrained(tmp_path / "base").eval(), {"a": delta})
    with torch.no_grad(), attached.delta("a"):
        assert close(logits(attached, tokens), expected)
    assert not close(logits(type(model).from_pretrained(tmp_path / "base").eval(), tokens), expected)
