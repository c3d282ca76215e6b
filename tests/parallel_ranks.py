"""One of several processes that share a model; ``tests/test_parallel.py`` starts them.

It reads a list of questions from a file, asks its model and writes what it found beside it.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

from deltafmt.errors import DeltafmtError
from deltafmt.transformers import attach, detach
from tiny_models import generate, ids, logits


def load(folder: Path) -> Any:
    """Load a folder, cut over the processes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the older spelling works in all releases
        return transformers.AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float32).eval()


def refusal(do: Any) -> str:
    """Return the message of an error."""
    try:
        do()
    except DeltafmtError as error:
        return str(error)
    return "nothing was refused"


def served(folder: Path, deltas: dict[str, Path], selections: list[Any]) -> dict[str, Any]:
    """Return what a model with deltas gives for each selection, and what it gave without."""
    model = load(folder)
    tokens = ids(4, 6)
    before = logits(model, tokens)
    attach(model, deltas)
    found: dict[str, Any] = {"unchecked": model.deltas.unchecked, "base": before}
    found["same"] = torch.equal(logits(model, tokens), before)
    found["outputs"] = [logits(model, tokens, delta=names) for names in selections]
    found["text"] = generate(model, tokens, delta=next(iter(deltas)))
    found["unused"] = model.deltas.unused()
    (delta,) = model.deltas.residency.acquire(["one"]).values.values()
    found["shapes"] = {name: [(term.rows, term.columns) for term in tensor.terms] for name, tensor in delta.items()}
    with torch.enable_grad():
        found["trained"] = bool(torch.allclose(model(input_ids=tokens).logits.detach(), before, atol=1e-5))
    return found


def detached(folder: Path, deltas: dict[str, Path]) -> dict[str, Any]:
    """Attach and detach, and tell whether the model is as it was."""
    model = load(folder)
    tokens = ids(2, 5)
    before = logits(model, tokens)
    attach(model, deltas)
    message = refusal(lambda: model.deltas.merge("one"))
    changed = logits(model, tokens, delta="one")
    detach(model)
    cells = [
        cell.cell_contents
        for module in model.modules()
        for cell in getattr(module.__dict__.get("forward"), "__closure__", None) or ()
    ]
    return {
        "same": torch.equal(logits(model, tokens), before),
        "changed": not torch.equal(changed, before),
        "merge": message,
        "left": [type(cell).__name__ for cell in cells if type(cell).__module__.startswith("deltafmt")],
    }


def changed(folder: Path, deltas: dict[str, Path]) -> dict[str, Any]:
    """Change a model that has deltas, with the same values and with others."""
    model = attach(load(folder), deltas)
    tokens = ids(2, 5)
    before = logits(model, tokens, delta="one")
    module = model.model.layers[1].self_attn.o_proj
    module.weight = torch.nn.Parameter(module.weight.detach().clone(), requires_grad=False)
    found: dict[str, Any] = {"replaced": torch.equal(logits(model, tokens, delta="one"), before)}
    query = model.model.layers[0].self_attn.q_proj
    with model.model.norm.register_forward_hook(lambda *_: torch.sum(query.weight)):
        found["read"] = refusal(lambda: logits(model, ids(1, 3), delta="one", use_cache=True))
    with torch.no_grad():
        module.weight += 1
    found["written"] = refusal(lambda: logits(model, tokens, delta="one"))
    return found


def wrong(folder: Path, deltas: dict[str, Path]) -> dict[str, Any]:
    """Return the message for another base."""
    model = load(folder)
    with torch.no_grad():
        # One element of one process's part.
        part = model.model.layers[1].mlp.down_proj.weight.to_local()
        if dist.get_rank() == 1:
            part[0, 0] += 1
    return {"error": refusal(lambda: attach(model, deltas))}


def refused(folder: Path, deltas: dict[str, Path]) -> dict[str, Any]:
    """Return the message for deltas that cannot be cut."""
    return {"error": refusal(lambda: attach(load(folder), deltas))}


def main() -> None:
    """Answer all questions."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    where = Path(sys.argv[1])
    questions = torch.load(where / "questions.pt", weights_only=False)
    answers = {name: globals()[what](*arguments) for name, (what, *arguments) in questions.items()}
    torch.save(answers, where / f"answers-{os.environ['RANK']}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
