"""Deltas in an engine of vLLM on the CPU: in one batch with the base and an adapter, evicted, replaced and refused.

``make vllm`` runs these in an environment that has vLLM. One engine of two slots serves all tests.
"""

from __future__ import annotations

import copy
import gc
import importlib.util
import json
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed; make vllm runs these tests", allow_module_level=True)

import torch
import vllm_files

import deltafmt
from deltafmt import methods

pytestmark = pytest.mark.filterwarnings("ignore")

METHODS = {
    "deltadq": methods.DeltaDQ(n=2, m=2, bits=4),
    "residual": methods.Residual(),
    "svd": methods.SVD(rank=16),
    "dare": methods.DARE(),
    "bitdelta": methods.BitDelta(),
}
PROMPTS, TOKENS = 8, 48
Text = list[int]


class Engine:
    """An engine, with deltas by name."""

    def __init__(self, nano: Path, folder: Path) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from tokenizers import Tokenizer
        from vllm import LLM
        from vllm.plugins import load_general_plugins

        load_general_plugins()
        self.folder = folder
        self.nano = nano
        self.paths: dict[str, Path] = {}
        self._numbers: dict[str, int] = {}
        for name, method in METHODS.items():
            self.paths[name] = folder / f"{name}.deltafmt"
            deltafmt.pack(nano / "base", nano / "math", self.paths[name], method=method)
        deltafmt.export_lora(self.paths["svd"], folder / "lora", base=nano / "base", reader="vllm")
        self.paths["lora"] = folder / "lora"
        tokenizer = Tokenizer.from_file(str(nano / "tokenizer.json"))
        rows = (nano / "eval.jsonl").read_text().splitlines()[:PROMPTS]
        self.prompts = [[0, *tokenizer.encode(json.loads(row)["question"]).ids] for row in rows]
        self.llm: Any = LLM(
            str(nano / "base"),
            skip_tokenizer_init=True,
            dtype="float32",
            enforce_eager=True,
            enable_lora=True,
            max_loras=6,
            max_cpu_loras=6,
            max_lora_rank=16,
            max_model_len=256,
            max_num_seqs=64,
            max_num_batched_tokens=2048,
            block_size=32,
            kv_cache_memory_bytes=1 << 28,
        )
        worker = self.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        self.manager: Any = worker.model_runner.lora_manager._adapter_manager

    def request(self, name: str | None, path: Path | None = None) -> Any:
        """Return vLLM's request for a name."""
        from vllm.lora.request import LoRARequest

        if name is None:
            return None
        number = self._numbers.setdefault(name, len(self._numbers) + 1)
        return LoRARequest(name, number, str(path or self.paths[name]))

    def generate(self, prompts: Sequence[Text], requests: Sequence[Any], **options: Any) -> list[Any]:
        """Return the outputs, one a prompt."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0, max_tokens=TOKENS, stop_token_ids=[1], detokenize=False, logprobs=1, **options
        )
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        found: list[Any] = self.llm.generate(given, params, lora_request=list(requests), use_tqdm=False)
        return found

    def texts(self, name: str | None, path: Path | None = None) -> list[Text]:
        """Return the tokens of all prompts with one name."""
        outputs = self.generate(self.prompts, [self.request(name, path)] * len(self.prompts))
        return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def engine(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    made = Engine(nano, tmp_path_factory.mktemp("engine"))
    yield made
    del made.llm, made.manager
    gc.collect()


@pytest.fixture(scope="module")
def mixed(engine: Engine) -> dict[str | None, list[Text]]:
    """The tokens of the base and all deltas, in one batch."""
    names = [None, *METHODS]
    prompts = [prompt for prompt in engine.prompts for _ in names]
    outputs = engine.generate(prompts, [engine.request(name) for name in names] * len(engine.prompts))
    texts = [list(output.outputs[0].token_ids) for output in outputs]
    return {name: texts[place :: len(names)] for place, name in enumerate(names)}


def test_every_layer_is_reached(engine: Engine) -> None:
    assert engine.manager.served.unused() == []
    assert not engine.manager.served.places.reasons


def test_a_mixed_batch_gives_the_tokens_of_attach(engine: Engine, mixed: dict[str | None, list[Text]]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(engine.nano / "base", dtype=torch.float32).eval()
    model = deltafmt.transformers.attach(model, {name: engine.paths[name] for name in METHODS})
    names = [None, *METHODS]
    prompts = [(prompt, name) for prompt in engine.prompts for name in names]
    width = max(len(prompt) for prompt, _ in prompts)
    ids = torch.tensor([[2] * (width - len(prompt)) + prompt for prompt, _ in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in prompts])
    with torch.no_grad():
        found = model.generate(
            input_ids=ids,
            attention_mask=mask,
            delta=[name for _, name in prompts],
            max_new_tokens=TOKENS,
            do_sample=False,
            eos_token_id=1,
            pad_token_id=2,
        )
    expected = [text[: text.index(1) + 1] if 1 in text else text for text in found[:, width:].tolist()]
    for place, name in enumerate(names):
        assert mixed[name] == expected[place :: len(names)], name
    assert len({json.dumps(texts) for texts in mixed.values()}) > 3


def test_an_adapter_serves_beside_deltas_as_it_does_alone(engine: Engine, mixed: dict[str | None, list[Text]]) -> None:
    names = ["lora", "deltadq", None]
    prompts = [prompt for prompt in engine.prompts for _ in names]
    alone = engine.texts("lora")
    outputs = engine.generate(prompts, [engine.request(name) for name in names] * len(engine.prompts))
    texts = [list(output.outputs[0].token_ids) for output in outputs]
    assert texts[0::3] == alone
    assert texts[1::3] == mixed["deltadq"]
    assert texts[2::3] == mixed[None]
    assert alone not in (mixed[None], mixed["svd"])


def test_log_probabilities_of_prompts_are_those_of_each_requests_delta(engine: Engine) -> None:
    def scores(output: Any) -> list[float]:
        return [max(one.logprob for one in each.values()) for each in output.prompt_logprobs[1:]]

    names = [None, "deltadq", "svd"]
    prompts = engine.prompts[:3]
    requests = [engine.request(name) for name in names]
    together = engine.generate(prompts, requests, prompt_logprobs=0)
    for place, request in enumerate(requests):
        (alone,) = engine.generate([prompts[place]], [request], prompt_logprobs=0)
        torch.testing.assert_close(
            torch.tensor(scores(together[place])), torch.tensor(scores(alone)), rtol=1e-4, atol=1e-4
        )
    (base,) = engine.generate([prompts[1]], [None], prompt_logprobs=0)
    assert max(abs(one - other) for one, other in zip(scores(together[1]), scores(base), strict=True)) > 0.01


def test_a_delta_whose_file_is_gone_comes_back_after_it_was_evicted(
    engine: Engine, mixed: dict[str | None, list[Text]], tmp_path: Path
) -> None:
    path = tmp_path / "gone.deltafmt"
    shutil.copy(engine.paths["residual"], path)
    assert engine.texts("gone", path) == mixed["residual"]
    path.unlink()
    for name in METHODS:
        assert engine.texts(name) == mixed[name]
    for number in range(3):  # more names than host memory holds
        shutil.copy(engine.paths["svd"], tmp_path / f"{number}.deltafmt")
        assert engine.texts(f"more{number}", tmp_path / f"{number}.deltafmt") == mixed["svd"]
    assert engine.texts("gone", path) == mixed["residual"]


def test_a_delta_that_was_overwritten_in_its_place_ends_its_requests_and_those_of_its_copies(
    engine: Engine, mixed: dict[str | None, list[Text]], tmp_path: Path
) -> None:
    path, twin = tmp_path / "cut.deltafmt", tmp_path / "twin.deltafmt"
    deltafmt.pack(engine.nano / "base", engine.nano / "math", path, method=methods.DeltaDQ(n=2, m=2, bits=3))
    shutil.copy(path, twin)
    prompt = [7, *engine.prompts[0], *engine.prompts[1]]  # no other test begins like this

    def text(name: str, path: Path) -> Text:
        (output,) = engine.generate([prompt], [engine.request(name, path)])
        return list(output.outputs[0].token_ids)

    right = engine.texts("cut", path)
    assert engine.texts("twin", twin) == right
    os.truncate(path, 1000)
    for number in range(7):
        shutil.copy(engine.paths["svd"], tmp_path / f"{number}.deltafmt")
        engine.texts(f"other{number}", tmp_path / f"{number}.deltafmt")
    # This step computes the prompt with the base; the engine knows its blocks by the content id that both have.
    requests = [engine.request("cut", path), engine.request("deltadq"), None]
    outputs = engine.generate([prompt, *engine.prompts[:1] * 2], requests)
    texts = [list(output.outputs[0].token_ids) for output in outputs]
    assert texts == [[1], mixed["deltadq"][0], mixed[None][0]]
    assert text("twin", twin) == [1]
    another = tmp_path / "another.deltafmt"
    shutil.copy(twin, another)
    with pytest.raises(Exception, match="load this one in place"):
        text("another", another)
    request = copy.copy(engine.request("twin", twin))
    request.load_inplace = True
    engine.llm.llm_engine.add_lora(request)
    assert engine.texts("twin", twin) == right
    fresh = text("twin", twin)
    assert len(fresh) > 4
    assert text("twin", twin) == fresh


def test_another_delta_at_a_path_never_finds_the_blocks_of_the_one_before(
    engine: Engine, mixed: dict[str | None, list[Text]], tmp_path: Path
) -> None:
    path = tmp_path / "moved.deltafmt"
    for place, name in enumerate(["deltadq", "svd", "deltadq"]):
        shutil.copy(engine.paths[name], tmp_path / "new.deltafmt")
        (tmp_path / "new.deltafmt").replace(path)
        assert engine.texts(f"moved{place}", path) == mixed[name]
    with pytest.raises(Exception, match="a number of its own"):
        engine.texts("moved0", engine.paths["dare"])
    assert engine.texts("moved0", path) == mixed["deltadq"]


def test_a_load_in_place_takes_the_name_and_one_that_fails_leaves_it(
    engine: Engine, mixed: dict[str | None, list[Text]], tmp_path: Path
) -> None:
    path = tmp_path / "place.deltafmt"
    shutil.copy(engine.paths["residual"], path)
    request = engine.request("place", path)
    assert engine.texts("place", path) == mixed["residual"]
    request.load_inplace = True
    path.unlink()
    path.write_bytes(engine.paths["svd"].read_bytes()[:4000])
    with pytest.raises(Exception, match="ends too early"):
        engine.llm.llm_engine.add_lora(request)
    for name in METHODS:
        engine.texts(name)
    for number in range(2):  # more names than host memory holds
        shutil.copy(engine.paths["svd"], tmp_path / f"{number}.deltafmt")
        engine.texts(f"beside{number}", tmp_path / f"{number}.deltafmt")
    assert engine.texts("place", path) == mixed["residual"]
    shutil.copy(engine.paths["bitdelta"], path)
    engine.llm.llm_engine.add_lora(request)
    assert engine.texts("place", path) == mixed["bitdelta"]


@pytest.mark.parametrize("kind", ["missing", "short", "text", "base"])
def test_what_cannot_be_loaded_is_refused_and_the_engine_goes_on(
    engine: Engine, mixed: dict[str | None, list[Text]], tmp_path: Path, kind: str
) -> None:
    path = tmp_path / f"{kind}.deltafmt"
    if kind == "short":
        path.write_bytes(engine.paths["svd"].read_bytes()[:5000])
    elif kind == "text":
        path.write_text("no delta")
    elif kind == "base":
        deltafmt.pack(engine.nano / "math", engine.nano / "base", path)
    message = {"missing": "No adapter found", "short": "truncated", "text": "not a deltafmt", "base": "wrong base"}
    with pytest.raises(Exception, match=message[kind]):
        engine.texts(kind, path)
    assert engine.texts("deltadq") == mixed["deltadq"]


def test_a_number_is_free_after_a_load_that_failed_and_after_its_adapter_was_removed(
    engine: Engine, mixed: dict[str | None, list[Text]], tmp_path: Path
) -> None:
    adapter = engine.texts("lora")
    with pytest.raises(Exception, match="No adapter found"):
        engine.texts("free", tmp_path / "missing.deltafmt")
    assert engine.texts("free", engine.paths["lora"]) == adapter
    with pytest.raises(Exception, match="is that of an adapter"):
        engine.texts("free", engine.paths["dare"])
    number = engine.request("free", engine.paths["dare"]).lora_int_id
    assert engine.llm.llm_engine.remove_lora(number)
    assert engine.texts("free", engine.paths["dare"]) == mixed["dare"]
    with pytest.raises(Exception, match="is that of a delta"):
        engine.texts("free", engine.paths["lora"])
    assert engine.llm.llm_engine.remove_lora(number)
    assert engine.texts("free", engine.paths["lora"]) == adapter


def test_two_names_of_one_delta_share_the_prefix_cache_and_two_deltas_never_do(engine: Engine, tmp_path: Path) -> None:
    prompt = [5, *engine.prompts[0], *engine.prompts[1]]  # no other test begins like this
    copy = tmp_path / "copy.deltafmt"
    shutil.copy(engine.paths["bitdelta"], copy)

    def cached(name: str | None, path: Path | None = None) -> int:
        (output,) = engine.generate([prompt], [engine.request(name, path)])
        return int(output.num_cached_tokens)

    assert cached("bitdelta") == 0
    assert cached("bitdelta") > 0
    assert cached("copied", copy) > 0
    assert cached("residual") == 0
    assert cached(None) == 0


def test_files_that_change_at_random_never_give_a_wrong_token(
    engine: Engine, mixed: dict[str | None, list[Text]], tmp_path: Path
) -> None:
    """``fuzz/vllm_files.py`` does this for minutes, over HTTP and while requests are under way."""

    def load(name: str, path: Path, *, in_place: bool) -> int:
        request = copy.copy(engine.request(name, path))
        request.load_inplace = in_place
        try:
            return 200 if engine.llm.llm_engine.add_lora(request) else 0
        except Exception:  # noqa: BLE001 - a server answers so, too
            return 500

    kinds = ("delete", "replace", "cut", "flip", "overwrite", "load", "refuse")
    variants = {name: engine.paths[name] for name in METHODS}
    mischief = vllm_files.Mischief(tmp_path, variants, random.Random(0), load, kinds)
    mischief.start()
    names = list(mischief.names.values())
    for _ in range(12):
        for _ in range(4):
            mischief.step()
        requests = [engine.request(one.path.stem, one.path) for one in names[:4]]
        outputs = engine.generate(engine.prompts[:4], requests)
        for place, (one, output) in enumerate(zip(names, outputs, strict=False)):
            text = list(output.outputs[0].token_ids)
            assert vllm_files.accepted(text, mixed[one.variant][place], changed=one.changed)
        names = [*names[3:], *names[:3]]
    assert mischief.wrong == []
    assert {*mischief.done} == {*kinds}
