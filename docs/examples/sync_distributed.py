"""Rank 0 trains and publishes; every other rank follows. Messages are broadcast, replies are gathered.

torchrun --nproc-per-node 3 docs/examples/sync_distributed.py
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys

import torch
import torch.distributed as dist
from torch import nn

from deltafmt.sync import Publisher, Reply, Subscriber


def broadcast(data: bytes | None) -> bytes:
    """Send bytes from rank 0 to all ranks."""
    size = torch.tensor([len(data or b"")])
    dist.broadcast(size, src=0)
    buffer = (
        torch.empty(int(size), dtype=torch.uint8)
        if data is None
        else torch.frombuffer(bytearray(data), dtype=torch.uint8)
    )
    dist.broadcast(buffer, src=0)
    return bytes(buffer.numpy())


def gather(reply: Reply | None) -> list[Reply]:
    """Collect the replies of all other ranks on rank 0."""
    replies: list[bytes | None] = [None] * dist.get_world_size()
    dist.gather_object(None if reply is None else reply.to_bytes(), replies if reply is None else None)
    return [Reply.from_bytes(data) for data in replies if data is not None]


def main() -> None:
    """Train for some steps, and compare the parameters of all ranks."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)  # every rank starts with other parameters
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    publisher = Publisher(subscribers=[f"rank-{other}" for other in range(1, ranks)]) if rank == 0 else None
    subscriber = Subscriber(model.state_dict(), f"rank-{rank}") if rank else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(5):
        if publisher is not None:
            loss = (model(torch.randn(8, 64)) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            broadcast(publisher.publish(model.state_dict()).data)
            for reply in gather(None):
                assert publisher.receive(reply) is None, reply.error
        elif subscriber is not None:
            gather(subscriber.receive(broadcast(None)))
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    everywhere = [torch.empty_like(flat) for _ in range(ranks)]
    dist.all_gather(everywhere, flat)
    assert all(torch.equal(flat, other) for other in everywhere)
    if publisher is not None:
        print(f"version {publisher.version} is the same on {ranks} ranks")
    dist.destroy_process_group()


def process(rank: int, ranks: int, port: int) -> None:
    """Be one rank of several on this machine."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": ranks}
    os.environ.update({name: str(value) for name, value in address.items()})
    main()


if __name__ == "__main__":
    if "RANK" in os.environ:
        main()
    else:
        torch.set_num_threads(1)  # a process that forks has no other threads
        with socket.create_server(("127.0.0.1", 0)) as server:
            free = server.getsockname()[1]
        workers = [
            multiprocessing.get_context("fork").Process(target=process, args=(rank, 3, free)) for rank in range(3)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        sys.exit(any(worker.exitcode for worker in workers))
