"""The owners of tensors, compared with tensors whose values are their owners."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from deltafmt.runtime.follow import Follower
from deltafmt.runtime.owners import LOST, Owners, in_order, owners_along


def moved(draw: Any, x: Any) -> Any:
    """Move values in some way that torch has."""
    dims = x.dim()
    dim = draw(st.integers(0, dims - 1))
    index = torch.tensor(draw(st.lists(st.integers(0, x.shape[dim] - 1), min_size=1, max_size=5)))
    mask = torch.arange(x.shape[0]) % 2 == 0
    size = x.shape[dim]
    ways = [
        lambda: x.transpose(0, dim),
        lambda: x.reshape(-1, *x.shape[2:]) if dims > 1 else x,
        lambda: x.reshape(-1, x.shape[-1]),
        lambda: x.unsqueeze(dim),
        lambda: x[:, None].expand(-1, 2, *x.shape[1:]).reshape(-1, *x.shape[1:]),
        lambda: x.reshape(*x.shape[:dim], 2, size // 2, *x.shape[dim + 1 :]) if size % 2 == 0 else x,
        lambda: x.index_select(dim, index),
        lambda: x[index % x.shape[0]],
        lambda: x[mask],
        lambda: torch.cat([x, x], dim),
        lambda: torch.stack([x, x], dim),
        lambda: torch.cat(list(x.split(1, dim)), dim),
        lambda: x.flip(dim),
        lambda: x.repeat(*[1 + (place == dim) for place in range(dims)]),
        lambda: x.narrow(dim, 0, (size + 1) // 2),
        lambda: x.sort(dim).values,
        lambda: torch.zeros_like(x).index_copy_(dim, torch.arange(size), x),
        lambda: torch.zeros_like(x).copy_(x) + x - x,
        lambda: x.gather(dim, torch.zeros_like(x)),
    ]
    return ways[draw(st.integers(0, len(ways) - 1))]()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_owners_follow_the_values(data: Any) -> None:
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    dim = data.draw(st.integers(0, len(shape) - 1))
    x = owners_along(shape, dim, torch.arange(shape[dim])).items.clone()
    follower = Follower()
    follower.mark(x, owners_along(shape, dim, torch.arange(shape[dim])))
    with follower:
        for _ in range(data.draw(st.integers(1, 5))):
            x = moved(data.draw, x)
    found = follower.owners(x)
    if found is not LOST:
        assert isinstance(found, Owners)
        assert torch.equal(found.items, x)


def test_what_is_lost_and_what_is_not() -> None:
    x = torch.randn(3, 3, 4)
    weight = torch.randn(4, 4)

    def after(function: Any) -> Any:
        follower = Follower()
        follower.mark(x, owners_along(x.shape, 0, torch.arange(3)))
        with follower:
            return follower.owners(function(x))

    for function in (
        lambda x: x @ weight,
        lambda x: torch.softmax(x, -1).cumsum(1),
        lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x),
        lambda x: (x.view(9, 4) @ weight).view(3, 3, 4) + x,
        lambda x: torch.nn.functional.layer_norm(x, (4,)),
    ):
        kept = after(function)
        assert isinstance(kept, Owners)
        assert kept.line()[0] == 0
        assert in_order(kept.line()[1], 3)
        assert not kept.routed
    assert after(lambda x: x.transpose(0, 1) + x) is LOST
    assert after(lambda x: x + x.flip(0)) is LOST
    assert after(lambda x: torch.softmax(x, 0)) is LOST
    assert after(lambda x: x.transpose(0, 2) @ x.transpose(0, 1)[:1]) is LOST
    assert after(lambda x: x.mean(0)) is None
    assert after(torch.zeros_like) is None
    assert after(lambda x: x[torch.tensor([2, 0, 1])]).routed
