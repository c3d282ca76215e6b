"""Stream three fine-tunes of one base to three clients at once, each in a thread of its own.

The repository has one fine-tune, so it is packed three times, with three methods: three deltas stand for three
fine-tunes. Every client asks for its own, and prints what it is given as soon as it comes. Run it with
``python examples/stream.py``; ``docs/how-to/serve.md`` explains it.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import tempfile
from pathlib import Path
from threading import Thread
from typing import Any

from deltafmt.methods import RTN, DeltaDQ

NANO = Path(__file__).resolve().parent / "nano"
BOS, PAD = 0, 2
TOKENS = 56

# Rows of 128 columns are too short for random dropout, so nothing is dropped.
DELTAS = {
    "dropout-4bit": DeltaDQ(2, 2, 4),
    "dropout-3bit": DeltaDQ(2, 2, 3),
    "rounded-6bit": RTN(6),
}


def client(model: Any, tokenizer: Any, name: str, question: str, screen: queue.Queue[tuple[str, str | None]]) -> None:
    """Ask one fine-tune, and show each word when it comes; None ends."""
    import torch
    from transformers import TextIteratorStreamer

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=120)
    ids = torch.tensor([[BOS, *tokenizer.encode(question, add_special_tokens=False)]], device=model.device)
    options = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": TOKENS,
        "do_sample": False,
        "pad_token_id": PAD,
    }
    generation = Thread(target=model.generate, args=(ids,), kwargs={**options, "delta": name, "streamer": streamer})
    generation.start()
    for piece in streamer:
        if piece:
            screen.put((name, piece))
    generation.join()
    screen.put((name, None))


def main() -> None:
    """Run the example."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    import deltafmt
    import deltafmt.transformers

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = AutoModelForCausalLM.from_pretrained(NANO / "base", dtype=torch.bfloat16, trust_remote_code=False)
    base = base.eval().to(device)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(NANO / "tokenizer.json"))
    lines = (NANO / "eval.jsonl").read_text("utf-8").splitlines()[: len(DELTAS)]
    problems = dict(zip(DELTAS, map(json.loads, lines), strict=True))

    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.deltafmt" for name in DELTAS}
        for name, method in DELTAS.items():
            deltafmt.pack(NANO / "base", NANO / "math", files[name], method=method)
        model = deltafmt.transformers.attach(base, files)

        screen: queue.Queue[tuple[str, str | None]] = queue.Queue()
        clients = [
            Thread(target=client, args=(model, tokenizer, name, problem["question"], screen))
            for name, problem in problems.items()
        ]
        for thread in clients:
            thread.start()
        answers = dict.fromkeys(DELTAS, "")
        open_streams = set(DELTAS)
        while open_streams:
            name, piece = screen.get(timeout=240)
            if piece is None:
                open_streams.remove(name)
            else:
                answers[name] += piece
                print(f"{name}: {piece!r}", flush=True)
        for thread in clients:
            thread.join()
        deltafmt.transformers.detach(model)

    print()
    right = 0
    for name, problem in problems.items():
        solved = answers[name].strip() == problem["answer"].strip()
        right += solved
        print(f"{name} {'right' if solved else 'wrong'}: {answers[name].strip()!r}")
    if right < len(DELTAS):
        sys.exit("each fine-tune should solve its problem")


if __name__ == "__main__":
    main()
