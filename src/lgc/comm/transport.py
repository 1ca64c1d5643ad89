"""Every collective of a round, of `attach` and of checkpoints, counted; those of torch's PowerSGD hook by its shapes.

Bytes are those of the buffers handed over, times what a rank sends and receives of them (K ranks, b bytes):

| collective   | sends                           | receives              | algorithm                      |
|--------------|---------------------------------|-----------------------|--------------------------------|
| all-reduce   | 2 (K-1)/K b                     | 2 (K-1)/K b           | ring                           |
| all-gather   | (K-1) b                         | (K-1) b               | direct                         |
| broadcast    | b for each child in the tree    | b, the source nothing | binomial tree                  |
| gather       | b, the destination nothing      | destination (K-1) b   | direct                         |
| all-to-all   | what is for others              | what others have sent | direct                         |

These are the algorithms under gloo, whose own all-gather is a ring: direct is every rank to every other at once, one
message in sequence in place of K-1. Other backends may spread the same totals differently over the ranks. Framing of
the network below (TCP, Ethernet) is not included.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future as Task
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lgc.comm.messages import Message, Post, ToAll, lockstep, to_all
from lgc.comm.traffic import SETUP, Traffic, Wire

SERVER = 0
ROUND = "a round of training"
FINISH = "handle.finish"  # where ranks may be at different steps; else it is a round like others
OPERATIONS = (
    ROUND,
    "lgc.attach",
    "handle.wire_summary",
    "handle.detach",
    "lgc.checkpoint",
    "handle.anchored",
    "handle.load_state_dict",
    FINISH,
)
OPERATION_BITS = 5  # that tell them apart
NUMBERS = 2  # of its own that each rank tells in the opening of a round
JSON_LIMIT = 2**28  # bytes
MESSAGE_LIMIT = 4096  # bytes of an error message
ANNOUNCEMENT_WAIT_S = 2.0
RELEASE_WAIT_S = 0.2
LEAST_TIMEOUT, MOST_TIMEOUT = 0.001, 1e6  # seconds; the backends count milliseconds, in 32 bits

T = TypeVar("T")


def clock(device: torch.device) -> float:
    """Seconds, once the device has computed what it was given; what is sent meanwhile is not waited for."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return time.perf_counter()


class Opening(NamedTuple):
    """Knowledge of all ranks once a round is open; one element a rank.

    `numbers` are what a rank has told of itself, as any 64 bits; 0 where it has told none. `pasts` differ where ranks
    know different things of earlier rounds, or have frozen different parameters.
    """

    finite: list[bool]
    votes: list[bool]
    numbers: list[tuple[int, int]]
    pasts: list[int]


_announced_here: set[str] = set()  # the keys of this process's errors in the store


class RankError(RuntimeError):
    """A rank could not take part in a round, or does not answer; raised on every rank, with what is known of it."""


class Transport:
    """Counted collectives of one process group.

    Tensors may be on any device: they are staged where the backend takes them. At world size 1 nothing is sent.

    Args:
        group: whose collectives.
        device: that this rank computes on; None is what the group is for.
        member: what a rank of the group is called in messages.

    Attributes:
        device: where the collectives take tensors: the host under gloo, else this rank's GPU.
        wire: bytes of this rank by phase.
        seconds: that this rank has spent in collectives, waiting for other ranks included; but for asynchronous ones.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device | None = None, *, member: str = "rank") -> None:
        if not dist.is_initialized():
            raise RuntimeError("lgc: the process group is gone; what needs it comes before destroy_process_group().")
        self.group = group
        self.member = member
        self.device = _staging_device(group, device)
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self.wire = Wire()
        self.seconds = 0.0
        if self.device.type == "cpu":
            release_at_exit()
        self.begin(SETUP, steps=0)

    def called(self, rank: int) -> str:
        """What a rank of the group is called in messages."""
        return f"{self.member} {rank}"

    def of_new_group(self) -> Transport:
        """Another one, of a new group of the same ranks and timeout, with byte counts of its own; a collective."""
        ranks = dist.get_process_group_ranks(self.group)
        timeout, backend = self.group._get_backend(self.device).options._timeout, dist.get_backend_config(self.group)
        group = dist.new_group(ranks, timeout, backend, use_local_synchronization=True)
        return Transport(group, self.device, member=self.member)

    def uncounted(self) -> Transport:
        """Another one, of the same group, whose bytes nobody looks at."""
        return Transport(self.group, self.device, member=self.member)

    def set_timeout(self, seconds: float) -> None:
        """How long a rank waits for another in any collective of the group before it gives up."""
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), self.group)

    def announce(self, error: Exception) -> None:
        """Leave this rank's error where the others find it when their collectives fail."""
        text = _message(error).decode(errors="ignore")
        _announced_here.add(self._error_key(self.rank))
        _within(ANNOUNCEMENT_WAIT_S, lambda: self._store().set(self._error_key(self.rank), text))

    @contextlib.contextmanager
    def announcing(self, *known: type[Exception]) -> Iterator[None]:
        """Announce any error in here but those of types that all ranks raise."""
        try:
            yield
        except known:
            raise
        except Exception as error:
            self.announce(error)
            raise

    def begin(self, phase: str, *, steps: int = 1) -> None:
        """Count what follows under `phase`, as `steps` more steps of it."""
        self._traffic = self.wire.phases.setdefault(phase, Traffic())
        self._traffic.steps += steps

    def open_round(
        self,
        step: int,
        *,
        finite: bool,
        vote: bool = False,
        numbers: Sequence[int] = (),
        error: Exception | None = None,
        operation: str = ROUND,
        past: int = 0,
    ) -> Opening:
        """Tell all ranks this rank's state before anything else of the round is sent: 32 bytes a rank.

        Args:
            step: of the round.
            finite: whether this rank's gradient is.
            vote: what this rank has to say.
            numbers: of this rank, at most two: the lengths of the payloads that it has prepared, in bytes, or what it
                has done.
            error: why it could prepare none.
            operation: of `OPERATIONS`, where it is none of training.
            past: digest, in 32 bits, of what this rank knows of earlier rounds and codes by, or of what it has frozen.

        Raises:
            RankError: on every rank, if one passes an error, or the ranks are at different steps or operations.
        """
        message = b"" if error is None else _message(error)
        flags = finite | vote << 1 | (error is not None) << 2 | OPERATIONS.index(operation) << 3
        flags |= past << 3 + OPERATION_BITS
        own = [*([len(message)] if error else numbers), 0, 0][:NUMBERS]
        preamble = torch.tensor([step, flags, *own], device="cpu")
        rows = self.all_gather(preamble, "preamble").tolist()
        failed = [rank for rank, row in enumerate(rows) if row[1] & 4]
        if failed:
            message_lengths = [row[2] if rank in failed else 0 for rank, row in enumerate(rows)]
            payload = torch.tensor(list(message), dtype=torch.uint8, device="cpu")
            post = ToAll(content="errors", payload=payload, lengths=message_lengths, limit=MESSAGE_LIMIT)
            (messages,) = self.together([post])
            texts = [
                f"{self.called(rank)}: {bytes(messages[rank].tolist()).decode(errors='replace')}" for rank in failed
            ]
            raise RankError(f"lgc: step {step}: {'; '.join(texts)}") from error
        numbers_of = [row[1] >> 3 & 2**OPERATION_BITS - 1 for row in rows]
        operations = [OPERATIONS[number] if number < len(OPERATIONS) else "another" for number in numbers_of]
        if set(operations) != {operation}:
            texts = [f"{self.called(rank)} in {each}" for rank, each in enumerate(operations)]
            hint = (
                " Where ranks make different numbers of steps, end the loop by handle.progress, which all have alike."
            )
            raise RankError(
                f"lgc: every {self.member} must call the same collectives, and now there is {', '.join(texts)}."
                f"{hint if FINISH in operations else ''}"
            )
        steps = [row[0] for row in rows]
        if set(steps) != {step}:
            raise RankError(
                f"lgc: the {self.member}s are at different steps: {steps} (by {self.member}). All must go on from the "
                "same checkpoint and make as many steps: where one has fewer batches, stop all ranks with it, or, "
                "if every step is exchanged, use DDP's join()."
            )
        if (key := self._error_key(self.rank)) in _announced_here:  # and yet all go on: no reason for a later failure
            _announced_here.remove(key)
            _within(ANNOUNCEMENT_WAIT_S, lambda: self._store().delete_key(key))
        return Opening(
            [bool(row[1] & 1) for row in rows],
            [bool(row[1] & 2) for row in rows],
            [(row[2], row[3]) for row in rows],
            [row[1] >> 3 + OPERATION_BITS for row in rows],
        )

    @contextlib.contextmanager
    def failing_together(self, step: int = 0, operation: str = ROUND) -> Iterator[None]:
        """Raise an error in here on every rank: its own where a rank has one, else RankError; a collective."""
        try:
            yield
        except Exception as error:
            with contextlib.suppress(RankError):
                self.open_round(step, finite=True, error=error, operation=operation)
            raise
        self.open_round(step, finite=True, operation=operation)

    def meet(self, operation: str) -> None:
        """Have all ranks begin the same operation, of `OPERATIONS`; a collective.

        Raises:
            RankError: on every rank, if one is in another operation or a round.
        """
        self.open_round(0, finite=True, operation=operation)

    def all_reduce(self, tensor: Tensor, content: str) -> Tensor:
        """Sum over the ranks, the same bits on each; shape and dtype of `tensor`."""
        self.count_all_reduce(tensor.nbytes, content)
        return self._run(tensor.clone(), lambda buffer: dist.all_reduce(buffer, group=self.group))

    def all_reduce_async(self, tensor: Tensor, content: str) -> torch.futures.Future[Tensor]:
        """Sum over the ranks into `tensor`, in the background."""
        self.count_all_reduce(tensor.nbytes, content)
        work = dist.all_reduce(tensor, group=self.group, async_op=True)
        assert work is not None
        future: torch.futures.Future[Tensor] = work.get_future().then(self._summed)
        return future

    def _summed(self, done: torch.futures.Future[list[Tensor]]) -> Tensor:
        try:
            return done.value()[0]
        except RuntimeError as error:
            raise RankError(f"lgc: {self._lost(error)}") from error

    def count_all_reduce(self, size: int, content: str) -> None:
        """Count an all-reduce of `size` bytes, for one that is not performed here."""
        share = 2 * (self.world_size - 1) * size // self.world_size
        self._count(content, sent=share, received=share, upload=size)

    def all_gather(self, tensor: Tensor, content: str) -> Tensor:
        """The tensors of all ranks, which must have one shape and dtype: shape (K, *shape)."""
        others = (self.world_size - 1) * tensor.nbytes
        self._count(content, sent=others, received=others, upload=tensor.nbytes)
        staged = self._stage(tensor)
        gathered = staged.new_empty((self.world_size, *staged.shape))
        with self._timed():
            if self.device.type == "cpu":
                dist.all_to_all_single(gathered, staged.expand_as(gathered).contiguous(), group=self.group)
            else:
                dist.all_gather(list(gathered.unbind()), staged, group=self.group)
        return gathered.to(tensor.device)

    def broadcast(self, tensor: Tensor, content: str, *, source: int) -> Tensor:
        """The tensor of rank `source`; the others pass one of the same shape and dtype to receive into."""
        size = tensor.nbytes
        is_source = self.rank == source
        self._count(
            content,
            sent=size * _tree_children((self.rank - source) % self.world_size, self.world_size),
            received=0 if is_source else size,
            upload=size if is_source else 0,
        )
        return self._run(tensor, lambda buffer: dist.broadcast(buffer, group_src=source, group=self.group))

    def gather(self, tensor: Tensor, content: str) -> Tensor | None:
        """The tensors of all ranks at rank 0, shape (K, *shape); None elsewhere."""
        size, others = tensor.nbytes, self.world_size - 1
        staged = self._stage(tensor)
        gathered = [torch.empty_like(staged) for _ in range(self.world_size)] if self.rank == SERVER else None
        sent, received = (size, 0) if gathered is None else (0, others * size)
        self._count(content, sent=sent, received=received, upload=size)
        with self._timed():
            dist.gather(staged, gathered, group_dst=SERVER, group=self.group)
        return None if gathered is None else torch.stack(gathered).to(tensor.device)

    def together(self, posts: Sequence[Post]) -> list[list[Tensor]]:
        """Deliver what the exchanges of a round have posted, in the same messages; give the results, in the same order.

        All ranks pass as many posts, of the same kinds, in the same order.
        """
        for post in posts:
            self._count(post.content, sent=0, received=0, upload=post.upload(self.rank))
        return lockstep([post.messages(self.rank, self.world_size) for post in posts], self._deliver)

    def _deliver(self, messages: Sequence[Message]) -> list[list[Tensor]]:
        """What the ranks have for this one, by message and sender, by one all-to-all."""
        ranks, others = range(self.world_size), [rank for rank in range(self.world_size) if rank != self.rank]
        for message in messages:
            sent, received = (
                sum(sizes[rank] for rank in others)
                for sizes in ([p.numel() for p in message.payloads], message.lengths)
            )
            self._count(message.content, sent=sent, received=received, upload=0)
        if not others:
            return [list(message.payloads) for message in messages]
        outgoing = [[message.payloads[rank] for message in messages if rank != self.rank] for rank in ranks]
        incoming = [[message.lengths[rank] for message in messages if rank != self.rank] for rank in ranks]
        flat = torch.cat([payload.to(self.device) for payloads in outgoing for payload in payloads])
        buffer = flat.new_empty(sum(map(sum, incoming)))
        with self._timed():
            dist.all_to_all_single(
                buffer,
                flat,
                [sum(lengths) for lengths in incoming],
                [sum(payload.numel() for payload in payloads) for payloads in outgoing],
                group=self.group,
            )
        arrived = iter(buffer.split([length for lengths in incoming for length in lengths]))
        by_sender = [list(message.payloads) for message in messages]
        for rank in others:
            for number, message in enumerate(messages):
                by_sender[number][rank] = next(arrived).to(message.payloads[rank].device)
        return by_sender

    def origin(self, rank: int) -> int:
        """The rank that has sent what stands at the place of `rank` in what was gathered."""
        return rank

    def all_gather_json(self, value: object, content: str) -> list[Any]:
        """The JSON values of all ranks; PayloadError on every rank, if one announces more than there can be."""
        payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        (payloads,) = lockstep([to_all(self.world_size, payload, content, limit=JSON_LIMIT)], self.together)
        return [json.loads(payload.numpy().tobytes()) for payload in payloads]

    def _run(self, tensor: Tensor, collective: Callable[[Tensor], object]) -> Tensor:
        buffer = self._stage(tensor)
        with self._timed():
            collective(buffer)
        return buffer.to(tensor.device)

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        """A collective: its time, and in place of a lost connection the error that another rank has announced."""
        started = clock(self.device)
        try:
            yield
            clock(self.device)  # else NCCL would only have been told to
        except RuntimeError as error:
            raise RankError(f"lgc: {self._announced() or self._lost(error)}") from error
        finally:
            self.seconds += time.perf_counter() - started

    def _lost(self, error: RuntimeError) -> str:
        return (
            f"as seen by {self.called(self.rank)}, an exchange with the others has failed: {error}. If no rank has "
            "failed, one has left out a backward pass or a call that the others make, or ended before them; or it was "
            "waited for too long: give attach a timeout= longer than what one rank does alone, such as an evaluation."
        )

    def _announced(self) -> str | None:
        deadline = time.monotonic() + ANNOUNCEMENT_WAIT_S
        others = [rank for rank in range(self.world_size) if rank != self.rank]

        def look() -> str | None:
            while time.monotonic() < deadline:
                for rank in others:
                    if self._store().check([self._error_key(rank)]):
                        message = self._store().get(self._error_key(rank))[:MESSAGE_LIMIT]
                        return f"{self.called(rank)}: {message.decode(errors='replace')}"
                time.sleep(0.05)
            return None

        return _within(ANNOUNCEMENT_WAIT_S, look)

    def _store(self) -> dist.Store:
        return dist.distributed_c10d._get_default_store()

    def _error_key(self, rank: int) -> str:
        return f"lgc/{self.group.group_name}/error/{rank}"

    def _stage(self, tensor: Tensor) -> Tensor:
        return tensor.contiguous().to(self.device)

    def _count(self, content: str, *, sent: int, received: int, upload: int) -> None:
        alone = self.world_size == 1
        self._traffic.sent_bytes += sent
        self._traffic.received_bytes += received
        self._traffic.upload_bytes += 0 if alone else upload
        self._traffic.contents[content] = self._traffic.contents.get(content, 0) + sent


def _staging_device(group: dist.ProcessGroup, device: torch.device | None) -> torch.device:
    host = torch.device("cpu")
    backends = dict(pair.split(":") for pair in dist.get_backend_config(group).split(","))  # by type of device
    if device is None:
        if host.type in backends:
            return host
        device = group.bound_device_id or torch.device("cuda", torch.cuda.current_device())
    return host if backends.get(device.type, "gloo") == "gloo" else device


@functools.cache
def release_at_exit() -> None:
    """Have this process wait a moment before it ends."""
    # gloo's threads drop the tensors of the last collective a little after it has returned, and need the GIL for that:
    # in an interpreter that is ending by then, they abort the process (seen in one of ten short scripts).
    atexit.register(time.sleep, RELEASE_WAIT_S)


def within(seconds: float, action: Callable[[], T]) -> T:
    """The result of an action; TimeoutError if it takes longer, when it is left to itself.

    For torch's store, which does not answer when the rank that hosts it is stopped or cut off, and whose calls have no
    timeout then.
    """
    task: Task[T] = Task()

    def run() -> None:
        try:
            task.set_result(action())
        except Exception as error:
            task.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return task.result(seconds)


def _within(seconds: float, action: Callable[[], T]) -> T | None:
    """As `within`, and None if it fails, as it does where the store is gone with its rank, or takes longer."""
    with contextlib.suppress(Exception):
        return within(seconds, action)
    return None


def _message(error: Exception) -> bytes:
    return f"{type(error).__name__}: {error}".encode()[:MESSAGE_LIMIT]


def _tree_children(position: int, world_size: int) -> int:
    """How many ranks the one at `position` (0 the source) sends to in a binomial tree."""
    children = 0
    stride = 1
    while stride < world_size:
        children += position < stride and position + stride < world_size
        stride *= 2
    return children
