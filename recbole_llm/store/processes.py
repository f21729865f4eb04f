"""The processes of one run, started by ``accelerate launch`` or ``torchrun``; without them there is one.

Every process runs the same program on the same data. Three kinds of work are divided: the parts of a training step, whose
gradients are added; batches of an LM without gradients, whose results all processes get; and files, which process 0 alone writes.
All else, such as the ranks of given scores, each process computes for itself, with equal results.

So all processes must reach the same calls of :class:`Processes`, in the same order. What process 0 alone does is inside
:func:`alone`, where a process is one of one. Before such a call, a process gives the others what they still need of it
(:func:`before_meeting`): its part of a sharded LM.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from recbole_llm import compat
from recbole_llm.store.contexts import holding
from recbole_llm.store.launcher import choose_accelerator, refuse
from recbole_llm.store.random_state import preserved_random_state

T = TypeVar("T")

PATIENCE = timedelta(hours=24)  # how long a process waits for one that lives, such as process 0 at the lock of another run
JOINING = timedelta(minutes=10)  # how long it waits at the start for one that may never come
GRACE = 1.0  # seconds in which process 0 reports an error that all have
_ENDED = "recbole_llm/ended"


class ProcessLostError(ConnectionError):
    """Another process of the run has ended."""

    def __init__(self) -> None:
        super().__init__(
            "another process of this run has ended, so this one ends too; its own message says why, if it could write one. The "
            "same command resumes from the last checkpoint"
        )


class NotJoinedError(ConnectionError):
    """This process has not met the others of the run."""

    def __init__(self, size: int, reason: str) -> None:
        address, port = (os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        super().__init__(
            f"the other processes of this run were not met at {address}:{port} ({reason}); one may have ended: start all {size} "
            f"within {JOINING.total_seconds() / 60:g} minutes, with an address and a port that all of them reach"
        )


@dataclass(frozen=True)
class Processes:
    """This process and its number among all; alone by default, and then every method returns at once what it is given.

    Attributes:
        divides: whether :meth:`compute` deals calls out.
    """

    rank: int = 0
    size: int = 1
    divides: bool = True

    @property
    def main(self) -> bool:
        """Whether this is process 0, which logs and writes."""
        return self.rank == 0

    def owns(self, number: int) -> bool:
        """Whether this process computes part ``number`` of work that is dealt out."""
        return number % self.size == self.rank

    # -- agreement -----------------------------------------------------------------------------------------------------

    def gather(self, value: T) -> list[T]:
        """The JSON-able values of all processes, in their order."""
        if self.size == 1:
            return [value]
        return [self._sent(value, owner) for owner in range(self.size)]

    def agree(self, value: T) -> T:
        """The JSON-able value of process 0."""
        return value if self.size == 1 else self._sent(value, 0)

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.gather(None)

    def equalise(self, tensors: Iterable[Tensor]) -> None:
        """Copy the tensors of process 0 to all."""
        if self.size > 1:
            with _meeting(), torch.no_grad():
                for tensor in tensors:
                    found = tensor.detach().contiguous()
                    dist.broadcast(found, 0)
                    tensor.copy_(found)

    # -- training ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def randomness(self, *part: int | str) -> Iterator[None]:
        """The random draws of a part of a step, which no other process makes: dropout.

        They follow from the seed of the stage or run and from ``part``. Afterwards, the state that all processes share is as it
        was. Alone, the part draws from it.
        """
        if self.size == 1:
            yield
            return
        with preserved_random_state():
            torch.manual_seed(crc32(f"{torch.initial_seed()}/{part}".encode()))
            yield

    def add_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace the gradients by their sums over all processes; a parameter without one in any process keeps none."""
        if self.size == 1:
            return
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        present = torch.tensor([float(parameter.grad is not None) for parameter in trained])
        self._add(present)
        groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for parameter, number in zip(trained, present.tolist(), strict=True):
            if number:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                groups.setdefault((parameter.dtype, parameter.device), []).append(parameter.grad)
        for gradients in groups.values():
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            self._add(flat)
            for gradient, total in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
                gradient.copy_(total.view_as(gradient))

    def add(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        if self.size > 1:
            value = value.detach().clone()
            self._add(value)
        return value

    # -- work without gradients ----------------------------------------------------------------------------------------

    def compute(self, calls: Sequence[Callable[[], Tensor]], device: torch.device) -> list[Tensor]:
        """The results of all calls, in fp32 on ``device``; each is computed by one process.

        With gradients, or :func:`undivided`, each process computes all of them.
        """
        if self.size == 1 or not self.divides or torch.is_grad_enabled():
            return [call() for call in calls]
        own = {number: call().float() for number, call in enumerate(calls) if self.owns(number)}
        found: dict[int, Tensor] = {}
        for owner, shapes in enumerate(self.gather([list(result.shape) for result in own.values()])):
            sizes = [torch.Size(shape).numel() for shape in shapes]
            mine = owner == self.rank
            flat = torch.cat([result.flatten().cpu() for result in own.values()]) if mine and own else torch.empty(sum(sizes))
            with _lost():
                dist.broadcast(flat, owner)
            for place, (part, shape) in enumerate(zip(flat.split(sizes), shapes, strict=True)):
                found[owner + place * self.size] = part.view(shape).to(device)
        return [found[number] for number in range(len(calls))]

    # -- messages ------------------------------------------------------------------------------------------------------

    def smallest(self, number: int) -> int:
        """The smallest of the numbers of all processes; it does not meet the others first, as it is how they meet."""
        found = torch.tensor([number])
        with _lost():
            dist.all_reduce(found, dist.ReduceOp.MIN)
        return int(found)

    def whole(self, part: Tensor) -> Tensor:
        """The parts [N] of all processes, in their order; as :meth:`smallest`, it does not meet the others first."""
        found = part.new_empty(self.size * len(part))
        with _lost():
            compat.all_gather(found, part)
        return found

    def _add(self, tensor: Tensor) -> None:
        with _meeting():
            dist.all_reduce(tensor)

    def _sent(self, value: Any, owner: int) -> Any:
        """The value of a process as JSON, since nothing is unpickled."""
        text = json.dumps(value).encode() if owner == self.rank else b""
        size = torch.tensor([len(text)])
        with _meeting():
            dist.broadcast(size, owner)
            data = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(int(size), dtype=torch.uint8)
            dist.broadcast(data, owner)
        return json.loads(bytes(data.tolist()))


ALONE = Processes()
_current: ContextVar[Processes] = ContextVar("processes", default=ALONE)
_helps: list[Callable[[], None]] = []  # what a process does for others before it meets them
_store: Any = None  # where the processes of this run say that they end; None: one process
_unmet = False  # whether this process has waited in vain for the others


def current() -> Processes:
    """The processes of the run."""
    return _current.get()


def alone() -> contextlib.AbstractContextManager[None]:
    """Within this block, the process divides no work and waits for no other."""
    return holding(_current, ALONE)


def undivided() -> contextlib.AbstractContextManager[None]:
    """Within this block, all processes compute the same, each for itself."""
    return holding(_current, replace(current(), divides=False))


def before_meeting(help_others: Callable[[], None]) -> None:
    """Call ``help_others``, which returns when no process needs help, before each exchange of the processes from now on."""
    _helps[:] = [help_others]


@contextlib.contextmanager
def joined(*, on_cpu: bool = False) -> Iterator[Processes]:
    """Join the other processes of the run, if a launcher started several; each then sees one accelerator, its own.

    Args:
        on_cpu: the run uses no accelerator (``use_gpu: False``).

    Raises:
        ValueError: the launcher asks for what is not supported, or only some processes have an accelerator.
    """
    global _store
    rank, size = compat.launched()
    refuse(os.environ, size)
    if size == 1 or current().size > 1:
        yield current()
        return
    if _store is None:
        choose_accelerator(os.environ, none=on_cpu)
        _store = _join(rank, size)
    processes = Processes(rank, size)
    with holding(_current, processes):
        if len(set(processes.gather(torch.cuda.is_available()))) > 1:
            raise ValueError(
                f"{size} processes: some have an accelerator and others none; start as many on a machine as it has "
                "accelerators, or give --use_gpu=False"
            )
        yield processes
        processes.wait()  # until process 0 has written its last file


def _join(rank: int, size: int) -> Any:
    from torch.distributed.rendezvous import rendezvous

    global _unmet
    try:
        store, _, _ = next(rendezvous("env://", timeout=JOINING))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        group: Any = dist.PrefixStore("recbole_llm", store)
        dist.init_process_group(backend, store=group, rank=rank, world_size=size, timeout=JOINING)
    except RuntimeError as error:  # of torch.distributed, such as a timeout
        _unmet = True
        raise NotJoinedError(size, str(error).splitlines()[0]) from error
    dist.distributed_c10d._set_pg_timeout(PATIENCE)
    return store


def first_to_end() -> bool:
    """Whether this process is the first that ends before the run does, and so the one to say why.

    Of an error that all processes have, process 0 tells.
    """
    rank, size = compat.launched()
    if size == 1 or _unmet:
        return True
    if rank:
        time.sleep(GRACE)
    if _store is None:  # before they have joined, all fail alike
        return rank == 0
    try:
        return int(_store.add(_ENDED, 1)) == 1
    except Exception:  # the process that holds the store has ended
        return rank == 0


@contextlib.contextmanager
def _meeting() -> Iterator[None]:
    for help_others in _helps:
        help_others()
    with _lost():
        yield


@contextlib.contextmanager
def _lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # of torch.distributed, when a connection is closed
        raise ProcessLostError from error
