"""How often a restored model agrees with the fine-tune, over a text: the quickest measure of what packing cost.

    python docs/examples/agreement.py FINETUNED RESTORED TEXT [TOKENIZER]

FINETUNED and RESTORED are folders that transformers loads as causal language models. TEXT is plain text, one example a
line, or ``.jsonl`` with ``question`` and ``answer``. TOKENIZER is a ``tokenizer.json``; without it, that of FINETUNED.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

LINES = 32


def examples(text: Path) -> list[str]:
    """Return the first lines of a text."""
    lines = text.read_text("utf-8").splitlines()[:LINES]
    if text.suffix != ".jsonl":
        return lines
    rows = [json.loads(line) for line in lines]
    return [row["question"] + row["answer"] for row in rows]


def main(finetuned: str, restored: str, text: str, tokenizer_file: str = "") -> None:
    """Print the share of equal most likely tokens, and the mean Kullback-Leibler divergence in nats."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = Tokenizer.from_file(tokenizer_file or str(Path(finetuned) / "tokenizer.json"))
    models = [
        AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32, trust_remote_code=False).eval()
        for one in (finetuned, restored)
    ]
    tokens, same, divergence = 0, 0.0, 0.0
    for line in examples(Path(text)):
        ids = torch.tensor([tokenizer.encode(line).ids])
        with torch.no_grad():
            wanted, found = (torch.log_softmax(model(ids).logits[0].double(), dim=-1) for model in models)
        tokens += len(wanted)
        same += float((wanted.argmax(-1) == found.argmax(-1)).sum())
        divergence += float((wanted.exp() * (wanted - found)).sum())
    print(
        f"{tokens} tokens: {same / tokens:.3f} with the same most likely next token, mean KL {divergence / tokens:.4f}"
    )


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
