"""A tiny model with two deltas, which tells the delta that a call has served."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from deltafmt.transformers import attach, detach
from tiny_models import Tiny, ids, logits

OUTSIDE = r"^the model is called outside of any block while {} serves \"one\"; name the delta in the call: model\("
ENDED = r"^the block of deltas that this thread or task was started in has ended; keep the block open until"


class Served:
    """A model with two deltas, and what each of them gives."""

    def __init__(self, tiny: Tiny) -> None:
        self.tokens = ids(1, 5)
        self.model = attach(tiny.load(), tiny.deltas)
        self.want = {None: logits(self.model, self.tokens)}
        for name in tiny.deltas:
            self.want[name] = logits(self.model, self.tokens, delta=name)
        assert not any(torch.equal(self.want[None], self.want[name]) for name in tiny.deltas)

    def run(self, **options: Any) -> str | None:
        """Return the name of the delta that a call serves."""
        found = logits(self.model, self.tokens, **options)
        return next(name for name, want in self.want.items() if torch.equal(found, want))

    def stream(self, name: str | None, steps: int = 3) -> Iterator[str | None]:
        """Serve one delta step by step."""
        with self.model.delta(name):
            for _ in range(steps):
                yield self.run()

    def check_clean(self) -> None:
        """Check that nothing is left behind."""
        assert torch.is_grad_enabled()
        assert self.run() is None
        assert self.model.deltas._open == 0
        detach(self.model)
