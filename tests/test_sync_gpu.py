"""Parameters on a GPU follow those of a publisher, on the stream of the caller."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from deltafmt.errors import InvalidFileError
from deltafmt.sync import Publisher, Subscriber

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.int8, torch.bool)
State = dict[str, torch.Tensor]


def state_of(step: int) -> State:
    """Return tensors of every dtype: of some nothing changes in a step, of some a little, of some all."""
    found: State = {}
    for number, dtype in enumerate(DTYPES):
        for share in (0.0, 0.02, 1.0):
            generator = torch.Generator().manual_seed(number)
            values = torch.randn(1_100_003 if dtype is torch.bfloat16 else 4_099, generator=generator)
            for past in range(step):
                moved = torch.Generator().manual_seed(1000 * number + past)
                chosen = torch.rand(values.shape, generator=moved) < share
                values = torch.where(chosen, torch.randn(values.shape, generator=moved), values)
            tensor = values > 0 if dtype is torch.bool else values.mul(40).to(dtype)
            found[f"{dtype}.{share}".removeprefix("torch.")] = tensor.cuda()
    found["transposed"] = found["bfloat16.0.02"][:1_100_000].reshape(1000, 1100).clone().t()
    found["experts"] = torch.stack([found["bfloat16.1.0"][:8192].reshape(64, 128).clone() for _ in range(4)])
    return found


def same(one: State, other: State) -> bool:
    return all(
        torch.equal(one[name].contiguous().view(torch.uint8), other[name].contiguous().view(torch.uint8))
        for name in other
    )


@pytest.mark.parametrize("side", [False, True], ids=["default stream", "stream of its own"])
def test_a_subscriber_on_a_gpu_follows(side: bool) -> None:
    stream = torch.cuda.Stream() if side else torch.cuda.current_stream()
    with torch.cuda.stream(stream):
        live = {name: tensor.zero_() for name, tensor in state_of(0).items()}
        places = {name: tensor.data_ptr() for name, tensor in live.items()}
        publisher, subscriber = Publisher(), Subscriber(live, "one")
        for step in range(6):
            state = state_of(step)
            message = publisher.publish(state)
            assert message.kind == ("patch" if step else "anchor")
            if side:
                torch.cuda._sleep(20_000_000)  # what the caller has begun is not over when workers start
            reply = subscriber.receive(message.data)
            assert reply.error is None
            assert publisher.receive(reply) is None
            assert same(live, state)
        assert places == {name: tensor.data_ptr() for name, tensor in live.items()}


def test_a_write_that_is_still_under_way_is_found() -> None:
    publisher, live = Publisher(), state_of(0)
    subscriber = Subscriber(live, "one")
    publisher.receive(subscriber.receive(publisher.publish(state_of(0)).data))
    message = publisher.publish(state_of(1))
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        live["bfloat16.0.02"].view(torch.int16)[17] ^= 1
        before = {name: tensor.clone() for name, tensor in live.items()}
        with pytest.raises(InvalidFileError, match="what it restores is not what was packed"):
            subscriber.apply(message.data)
        assert same(live, before)
