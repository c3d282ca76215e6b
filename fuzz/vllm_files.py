"""Delete, replace, cut short, overwrite and half-write delta files while a server of vLLM serves them.

    python fuzz/vllm_files.py [--seconds 300] [--clients 4] [--seed 0]

Run it in the environment of ``make vllm``. The server is vLLM's own over HTTP, in float32 on the CPU, with fewer slots
and less host memory than there are names, so that deltas leave and are loaded again all the time. Clients ask for the
base and for deltas; every answer is compared with the tokens of ``deltafmt.transformers.attach``. What must hold:

- The server lives.
- A delta whose file was deleted or replaced gives the tokens of the file that was loaded.
- A delta whose file was changed in its place may end early, behind right tokens. It never gives another token.
- After a load in place, a name gives the new delta's tokens. A load that is refused leaves the name as it was.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deltafmt
from deltafmt.methods import DARE, SVD, BitDelta, DeltaDQ, Residual

NANO = Path(__file__).resolve().parent.parent / "examples" / "nano"
METHODS = {"deltadq": DeltaDQ(2, 2, 4), "residual": Residual(), "svd": SVD(rank=16), "dare": DARE(), "bit": BitDelta()}
KINDS = ("delete", "replace", "cut", "flip", "overwrite", "kill", "load", "load", "refuse")
NAMES, PROMPTS, TOKENS, END = 8, 4, 40, 1
Texts = list[list[int]]


class Name:
    """A name that clients ask for, and what may be answered.

    Attributes:
        path: its file.
        variant: the delta that was loaded.
        file: the file that was loaded, whatever the path leads to now: its number in the file system.
        changed: True if that file was changed in its place since, or that of another name which shares its blocks.
        shares: True if the prefix cache knows its blocks by the content id; not so once it was loaded in place.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.variant = ""
        self.file = 0
        self.changed = False
        self.shares = True
        self._asking = 0
        self._condition = threading.Condition()

    def loaded(self, variant: str) -> None:
        """Note that the file at the path was loaded."""
        self.variant, self.file, self.changed = variant, self.path.stat().st_ino, False

    def change(self, names: Iterable[Name]) -> bool:
        """Note that the file at the path is changed in its place; return False if there is none."""
        if not self.path.exists():
            return False
        if self.path.stat().st_ino == self.file:
            self.changed = True
            for other in names:
                other.changed |= self.shares and other.shares and other.variant == self.variant
        return True

    @contextlib.contextmanager
    def asked(self) -> Iterator[None]:
        """Within the block a request for the name is under way."""
        with self._condition:
            self._asking += 1
        try:
            yield
        finally:
            with self._condition:
                self._asking -= 1
                self._condition.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Within the block no request for the name is under way: another delta takes the name."""
        with self._condition:
            self._condition.wait_for(lambda: not self._asking)
            yield


def accepted(text: Sequence[int], right: Sequence[int], *, changed: bool) -> bool:
    """Tell whether a text is right, or, where the file was changed in its place, ends early behind right tokens."""
    if list(text) == list(right):
        return True
    return changed and text[-1:] == [END] and list(text[:-1]) == list(right[: len(text) - 1])


class Mischief:
    """What happens to files, each time to that of a random name.

    Args:
        folder: the folder of all files.
        variants: delta files by name; copies of them are served.
        choose: random choices.
        load: loads a path by a name, perhaps in its place; returns the status of HTTP.
        kinds: what happens; all of ``KINDS`` if not given.
    """

    def __init__(
        self,
        folder: Path,
        variants: dict[str, Path],
        choose: random.Random,
        load: Callable[..., int],
        kinds: Sequence[str] = KINDS,
    ) -> None:
        self.folder, self.variants, self.choose, self.load, self.kinds = folder, variants, choose, load, kinds
        self.names: dict[str, Name] = {}
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []

    def start(self) -> None:
        """Make and load all names."""
        for number in range(NAMES):
            variant = self.choose.choice(list(self.variants))
            made = self.names[f"n{number}"] = Name(self.folder / f"n{number}.deltafmt")
            shutil.copy(self.variants[variant], made.path)
            made.loaded(variant)
            if (status := self.load(f"n{number}", made.path, in_place=False)) != 200:
                raise SystemExit(f"n{number} could not be loaded: {status}")

    def step(self) -> None:
        """Do one thing to one file."""
        kind = self.choose.choice(self.kinds)
        name = self.choose.choice(list(self.names))
        getattr(self, f"_{kind}")(name, self.names[name])
        self.done[kind] += 1

    def _place(self, path: Path, data: bytes) -> None:
        """Put a file in the place of another, as ``deltafmt pack`` does."""
        made = path.with_suffix(".new")
        made.write_bytes(data)
        made.replace(path)

    def _any(self) -> tuple[str, bytes]:
        variant = self.choose.choice(list(self.variants))
        return variant, self.variants[variant].read_bytes()

    def _delete(self, _: str, one: Name) -> None:
        one.path.unlink(missing_ok=True)

    def _replace(self, _: str, one: Name) -> None:
        self._place(one.path, self._any()[1])

    def _cut(self, _: str, one: Name) -> None:
        if one.change(self.names.values()):
            os.truncate(one.path, self.choose.randrange(one.path.stat().st_size + 1))

    def _flip(self, _: str, one: Name) -> None:
        if one.change(self.names.values()) and (size := one.path.stat().st_size):
            with one.path.open("r+b") as file:
                place = self.choose.randrange(size)
                file.seek(place)
                byte = file.read(1)[0] ^ 1 << self.choose.randrange(8)
                file.seek(place)
                file.write(bytes([byte]))

    def _overwrite(self, _: str, one: Name) -> None:
        if one.change(self.names.values()):
            one.path.write_bytes(self._any()[1])

    def _kill(self, _: str, one: Name) -> None:
        """Kill a command that packs a file to the name's path."""
        command = [sys.executable, "-m", "deltafmt", "pack", NANO / "base", NANO / "math", "-o", one.path, "--force"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            time.sleep(self.choose.uniform(0.1, 3))
            process.kill()

    def _load(self, name: str, one: Name) -> None:
        variant, data = self._any()
        with one.alone():
            self._place(one.path, data)
            status = self.load(name, one.path, in_place=True)
            if status != 200:
                self.wrong.append(f"{name}: a good file gave {status} when it was loaded")
            one.shares = False
            one.loaded(variant)

    def _refuse(self, name: str, one: Name) -> None:
        data = self._any()[1]
        self._place(one.path, data[: self.choose.randrange(len(data))])
        if (status := self.load(name, one.path, in_place=True)) == 200:
            self.wrong.append(f"{name}: a file that was cut short gave {status} when it was loaded")


@dataclass
class Seen:
    """What the clients have seen: answers by kind, and what was wrong."""

    answers: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def expected(variants: dict[str, Path], prompts: Texts) -> dict[str | None, Texts]:
    """Return the tokens of every prompt by every delta and the base, computed without vLLM."""
    import torch
    from transformers import AutoModelForCausalLM

    import deltafmt.transformers

    model = AutoModelForCausalLM.from_pretrained(NANO / "base", dtype=torch.float32).eval()
    model = deltafmt.transformers.attach(model, variants)
    found: dict[str | None, Texts] = {}
    for name in (None, *variants):
        found[name] = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            with torch.no_grad(), model.delta([name]):
                text = model.generate(ids, max_new_tokens=TOKENS, do_sample=False, eos_token_id=END, pad_token_id=2)
            found[name].append(text[0, len(prompt) :].tolist())
    return found


def read_prompts() -> Texts:
    """Return the tokens of the first questions."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(NANO / "tokenizer.json"))
    rows = (NANO / "eval.jsonl").read_text("utf-8").splitlines()[:PROMPTS]
    return [[0, *tokenizer.encode(json.loads(row)["question"]).ids] for row in rows]


class Server:
    """vLLM's server in a process of its own, with two slots and room for three adapters in host memory."""

    def __init__(self, folder: Path) -> None:
        base = folder / "base"
        shutil.copytree(NANO / "base", base)
        shutil.copy(NANO / "tokenizer.json", base)
        (base / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        more = "--dtype float32 --enforce-eager --enable-lora --max-loras 2 --max-cpu-loras 3 --max-lora-rank 1"
        words = [*more.split(), "--block-size", "32", "--max-model-len", "256", "--kv-cache-memory-bytes", str(1 << 27)]
        words += ["--model", str(base), "--served-model-name", "base", "--port", str(self.port)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
        environment["VLLM_LOGGING_LEVEL"] = "WARNING"
        self.log = folder / "server.log"
        with self.log.open("wb") as log:
            command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words]
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        while self.ask("GET", "/health")[0] != 200:
            if self.process.poll() is not None:
                raise SystemExit("the server did not start:\n" + self.log.read_text(errors="replace")[-3000:])
            time.sleep(1)

    def ask(self, method: str, path: str, body: Any = None, timeout: float = 300) -> tuple[int, str]:
        """Return the status and the text of an answer; status 0 if there was none."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        except (OSError, http.client.HTTPException) as error:
            return 0, repr(error)
        finally:
            connection.close()

    def load(self, name: str, path: Path, *, in_place: bool) -> int:
        """Load a delta by a name; return the status."""
        body = {"lora_name": name, "lora_path": str(path), "load_inplace": in_place}
        return self.ask("POST", "/v1/load_lora_adapter", body)[0]

    def complete(self, model: str, prompt: list[int], timeout: float = 300) -> tuple[int, list[int] | str]:
        """Return the status and the tokens of a model, or what was said in their place."""
        body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "return_token_ids": True}
        status, text = self.ask("POST", "/v1/completions", body, timeout)
        return status, json.loads(text)["choices"][0]["token_ids"] if status == 200 else text


def client(
    server: Server, names: dict[str, Name], right: dict[str | None, Texts], until: float, seed: int, seen: Seen
) -> None:
    """Ask for random names until a moment, and compare every answer; leave some answers unread."""
    choose = random.Random(seed)
    prompts = read_prompts()
    while time.monotonic() < until:
        number = choose.randrange(PROMPTS)
        name = choose.choice([*names, "base"])
        leaves = choose.random() < 0.05
        one = names.get(name)
        with one.asked() if one is not None else contextlib.nullcontext():
            status, text = server.complete(name, prompts[number], choose.uniform(0.001, 0.1) if leaves else 300)
            wanted = right[one.variant if one is not None else None][number]
            changed = one is not None and one.changed
        if leaves and status == 0:
            seen.answers["left unread"] += 1
        elif isinstance(text, str):
            seen.wrong.append(f"{name}: {status} {text[:300]}")
        elif not accepted(text, wanted, changed=changed):
            seen.wrong.append(f"{name}: prompt {number} gave {text}, not {wanted}, changed: {changed}")
        elif text != wanted:
            seen.answers["ended early"] += 1
        else:
            seen.answers["base" if one is None else "delta"] += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300, help="how long files are changed (300)")
    parser.add_argument("--clients", type=int, default=4, help="clients that ask at the same time (4)")
    parser.add_argument("--seed", type=int, default=0, help="of the random choices (0)")
    parser.add_argument("--pause", type=float, default=0.1, help="seconds between two changes of files (0.1)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        variants = {name: folder / f"{name}.deltafmt" for name in METHODS}
        for name, path in variants.items():
            deltafmt.pack(NANO / "base", NANO / "math", path, method=METHODS[name])
        right = expected(variants, read_prompts())
        (folder / "served").mkdir()
        server = Server(folder)
        try:
            return run(
                server, Mischief(folder / "served", variants, random.Random(options.seed), server.load), right, options
            )
        finally:
            server.process.terminate()
            server.process.wait()


def run(server: Server, mischief: Mischief, right: dict[str | None, Texts], options: argparse.Namespace) -> int:
    """Change files while clients ask; return 1 if the server has ended or an answer was wrong."""
    mischief.start()
    seen = Seen()
    until = time.monotonic() + options.seconds
    clients = [
        threading.Thread(target=client, args=(server, mischief.names, right, until, options.seed + 1 + number, seen))
        for number in range(options.clients)
    ]
    for thread in clients:
        thread.start()
    while time.monotonic() < until and server.process.poll() is None:
        mischief.step()
        time.sleep(options.pause)
    for thread in clients:
        thread.join()
    health = server.ask("GET", "/health")[0]
    wrong = [*seen.wrong, *mischief.wrong, *([] if health == 200 else [f"the server's health is {health}"])]
    print("changes:", ", ".join(f"{count} {kind}" for kind, count in sorted(mischief.done.items())))
    print("answers:", ", ".join(f"{count} {kind}" for kind, count in sorted(seen.answers.items())))
    print(f"wrong: {len(wrong)}", *wrong[:20], sep="\n  ")
    if wrong:
        print(server.log.read_text(errors="replace")[-3000:])
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
