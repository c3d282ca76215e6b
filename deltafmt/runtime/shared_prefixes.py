"""Keys and values that requests of continuous batching share: those of a common beginning, for each delta by itself."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from types import SimpleNamespace
from typing import Any

from deltafmt.errors import UnsupportedError
from deltafmt.runtime.intake import Request, Source
from deltafmt.runtime.wrapping import wrap_method

# The first token of a prompt of a delta becomes a number from here on where blocks of keys and values are looked up.
# Tokens are lower, and transformers keeps them in 32 bits there.
_FIRST_SALT = 1 << 30


class SharedPrefixes:
    """What is wrapped of the cache of one manager.

    Args:
        server: the deltas of the manager's model.
        request_of: a function from a request's name to the request.
    """

    def __init__(self, server: Source, request_of: Callable[[str], Request]) -> None:
        self._server = server
        self._request_of = request_of
        self._salts: dict[Hashable, int] = {}

    def wrap(self, cache: Any) -> None:
        """Let a cache look up blocks by token and delta.

        Raises:
            UnsupportedError: this transformers has another cache.
        """
        wrap_method(cache, "search_prefix_match", self._search)
        # As transformers from 5.18 on calls it, and as it did before.
        names = [name for name in ("mark_complete_blocks", "mark_shareable_blocks_as_complete") if hasattr(cache, name)]
        if len(names) != 1:
            raise UnsupportedError("this transformers shares keys and values among requests in a way that is not known")
        wrap_method(cache, names[0], self._mark)

    def _search(self, original: Callable[..., int], request_id: str, prompt_ids: list[int]) -> int:
        return original(request_id, self._salted(request_id, prompt_ids))

    def _mark(self, original: Callable[..., None], state: Any, complete_blocks: Any) -> None:
        tokens = self._salted(state.request_id, state.initial_tokens)
        original(
            SimpleNamespace(
                request_id=state.request_id,
                status=state.status,
                initial_tokens=tokens,
                generated_tokens=state.generated_tokens,
            ),
            complete_blocks,
        )

    def _salted(self, request_id: str, tokens: list[int]) -> list[int]:
        """Return the tokens by which blocks of keys and values are found: others for each delta, mix and merge.

        A block's key is that of all tokens before it, so another first token makes all keys differ.
        """
        hold = self._request_of(request_id).hold
        merged = self._server.merged
        identity: Hashable = None
        if hold is not None and hold.serves:
            identity = hold.identity
        elif merged is not None:
            identity = "merged", self._server.known(merged).identity
        if identity is None or not tokens:
            return tokens
        salt = self._salts.setdefault((identity, tokens[0]), _FIRST_SALT + len(self._salts))
        return [salt, *tokens[1:]]
