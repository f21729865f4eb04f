"""Several processes: forks of this one, which has imported everything, joined by gloo as a launcher would join them."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from recbole_llm.store.processes import Processes

PROCESSES = 2


class Pretended(Processes):
    """One of several processes that hears nothing from the others."""

    def _sent(self, value: Any, owner: int) -> Any:
        return value

    def _add(self, tensor: Tensor) -> None:
        pass

    def compute(self, calls: Sequence[Callable[[], Tensor]], device: Any) -> list[Tensor]:
        return [call() for call in calls]


def start(work: Callable[[], Any], size: int = PROCESSES, before: Callable[[int], None] = lambda rank: None) -> Sequence[Any]:
    """Start ``work`` in so many processes; ``before(rank)`` is called first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")

    def child(rank: int) -> None:
        given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in given.items()})
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # a run in this process has set it
        before(rank)
        work()

    found = [context.Process(target=child, args=(rank,)) for rank in range(size)]
    for process in found:
        process.start()
    return found


def exit_codes(processes: Sequence[Any], seconds: float = 300) -> list[int | None]:
    """Their exit codes; None for one that still lives after so many seconds, which is killed."""
    for process in processes:
        process.join(seconds)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes
