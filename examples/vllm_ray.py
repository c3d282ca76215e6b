"""Serve deltas from several replicas of vLLM with Ray Serve, which routes each name to a replica that has it loaded.

    pip install 'ray[serve]' beside vLLM and deltafmt, then
    python examples/vllm_ray.py                  two replicas on this machine's CPU, asked for three names
    python examples/vllm_ray.py --keep --base BASE --deltas FOLDER    go on until it is stopped

Each replica is an engine of vLLM with a few deltas. A name that none has is loaded by one of them, from FOLDER, and the
delta that was not asked for longest leaves. So all replicas together keep more names at hand than one could. Requests
are those of the OpenAI API: ``POST /v1/completions`` with ``model``, ``prompt`` (a text or tokens) and ``max_tokens``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

NANO = Path(__file__).resolve().parent / "nano"
# Deltas that each replica keeps.
RESIDENT = 2


@serve.deployment
class Engine:
    """A replica: an engine of vLLM, and the deltas that it has loaded.

    Args:
        base: the base's checkpoint.
        folder: where the name ``math`` is ``math.deltafmt``.
        more: settings of vLLM's engine.
    """

    def __init__(self, base: str, folder: str, more: dict[str, Any]) -> None:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        settings = AsyncEngineArgs(base, enable_lora=True, max_loras=RESIDENT, max_cpu_loras=RESIDENT, **more)
        self._engine = AsyncLLM.from_engine_args(settings)
        self._folder = folder
        self._numbers = itertools.count(1)

    @serve.multiplexed(max_num_models_per_replica=RESIDENT)
    async def adapter(self, name: str) -> Any:
        """Load a delta; Ray Serve calls this once for a name that this replica does not have."""
        from vllm.lora.request import LoRARequest

        from deltafmt.vllm.resolver import find

        path = find(self._folder, name)
        if path is None:
            raise LookupError(f'there is no delta "{name}"')
        request = LoRARequest(name, next(self._numbers), path)
        await self._engine.add_lora(request)
        return request

    async def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """Answer one request."""
        from vllm import SamplingParams

        name = serve.get_multiplexed_model_id()
        request = await self.adapter(name) if name else None
        given = body["prompt"]
        prompt = given if isinstance(given, str) else {"prompt_token_ids": given}
        params = SamplingParams(temperature=body.get("temperature", 0), max_tokens=body.get("max_tokens", 16))
        number = os.urandom(8).hex()
        outputs = [output async for output in self._engine.generate(prompt, params, number, lora_request=request)]
        text = outputs[-1].outputs[0]
        replica = serve.get_replica_context().replica_id.unique_id
        return {
            "model": body["model"],
            "replica": replica,
            "choices": [{"index": 0, "text": text.text, "finish_reason": text.finish_reason}],
        }


# It computes nothing, so every processor is left to an engine.
@serve.deployment(ray_actor_options={"num_cpus": 0})
class Front:
    """The part that speaks HTTP: it says to Ray Serve which name each request needs.

    Args:
        engines: the replicas.
        base: the name of the base.
    """

    def __init__(self, engines: Any, base: str) -> None:
        self._engines, self._base = engines, base

    async def __call__(self, request: Request) -> JSONResponse:
        """Answer ``POST /v1/completions``."""
        try:
            body = await request.json()
            name = body["model"]
        except (ValueError, KeyError, TypeError):
            return JSONResponse({"error": "the body is JSON with model and prompt"}, 400)
        engines = self._engines if name == self._base else self._engines.options(multiplexed_model_id=name)
        try:
            return JSONResponse(await engines.complete.remote(body))
        except ray.exceptions.RayTaskError as error:
            return JSONResponse({"error": str(error.cause)}, 404 if isinstance(error.cause, LookupError) else 400)


def ask(model: str, prompt: str | list[int], tokens: int = 48) -> dict[str, Any]:
    """Return the answer to a prompt."""
    body = json.dumps({"model": model, "prompt": prompt, "max_tokens": tokens}).encode()
    request = urllib.request.Request("http://127.0.0.1:8000/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def demo(folder: Path) -> tuple[Path, Path]:
    """Make a base with a tokenizer and a folder of three deltas; return both."""
    import deltafmt
    from deltafmt.methods import DARE, BitDelta, DeltaDQ

    base, deltas = folder / "base", folder / "deltas"
    shutil.copytree(NANO / "base", base)
    shutil.copy(NANO / "tokenizer.json", base)
    (base / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    deltas.mkdir()
    for name, method in (("math", DeltaDQ(2, 2, 4)), ("bit", BitDelta()), ("dare", DARE(0.5))):
        deltafmt.pack(NANO / "base", NANO / "math", deltas / f"{name}.deltafmt", method=method)
    return base, deltas


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="the base's checkpoint (a small one of the repository)")
    parser.add_argument("--deltas", help="the folder of the deltas (three of the small one)")
    parser.add_argument("--replicas", type=int, default=2, help="engines (2)")
    parser.add_argument("--keep", action="store_true", help="go on until the program is stopped")
    parser.add_argument("--engine", type=json.loads, default={}, help="settings of vLLM's engine, in JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        base, deltas = options.base, options.deltas
        if base is None or deltas is None:
            base, deltas = map(str, demo(Path(made)))
            options.engine = {
                "max_model_len": 256,
                "block_size": 32,
                "kv_cache_memory_bytes": 1 << 27,
                **options.engine,
            }
        engines = Engine.options(num_replicas=options.replicas).bind(base, deltas, options.engine)
        serve.run(Front.bind(engines, "base"))
        question = json.loads((NANO / "eval.jsonl").read_text("utf-8").splitlines()[0])["question"]
        from tokenizers import Tokenizer

        prompt = [0, *Tokenizer.from_file(str(NANO / "tokenizer.json")).encode(question).ids]
        for name in () if options.keep else ("base", "math", "bit", "math", "dare", "math", "bit", "dare"):
            answer = ask(name, prompt)
            print(f"{name:5} {answer['replica']}  {answer['choices'][0]['text'].strip()[:60]!r}", flush=True)
        if options.keep:
            serve.run(Front.bind(engines, "base"), blocking=True)
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
