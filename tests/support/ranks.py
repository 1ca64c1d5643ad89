"""Real gloo ranks for tests: a pool of processes that is started once and runs one function after another.

    results = ranks(4).run(function, *args)         # function(rank, world_size, *args) on every rank
    failures = ranks(4).exceptions(function, *args)  # the exception of every rank, None where there was none

Every call has a fresh default process group. A rank that dies or hangs takes the pool with it; the next call
starts a new one.
"""

from __future__ import annotations

import faulthandler
import functools
import gc
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import IO, Any, NamedTuple

import torch
import torch.distributed as dist

POOL_SIZE = 4
COLLECTIVE_TIMEOUT_S = 30
CALL_LIMIT_S = 90.0
PRELOADED = ["torch._dynamo", "torch.nn.parallel", "lgc_lab.training.train", "sklearn.model_selection", "lgc.elastic"]

# Emitted by torch itself, whatever the code under test does.
TORCH_WARNINGS = (r"`torch\.jit\.script(_method)?` is deprecated", r".*set_float32_matmul_precision.*")


class RankError(Exception):
    """A rank raised, died or did not answer; the message names the rank and has its traceback."""


class Outcome(NamedTuple):
    """What one rank answered: its result, or its exception with the traceback as text."""

    result: Any
    exception: BaseException | None
    trace: str


@functools.cache
def start_fork_server() -> IO[bytes]:
    """Start what forks the ranks of this process, those of the pool and those of `lgc`; their imports take seconds.

    Returns:
        The file that has what all of these ranks write to stderr.
    """
    errors, own = tempfile.TemporaryFile(), os.dup(2)  # noqa: SIM115 - open as long as the ranks write to it
    os.dup2(errors.fileno(), 2)
    try:
        multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
        forkserver.ensure_running()
    finally:
        os.dup2(own, 2)
        os.close(own)
    return errors


class RankPool:
    """Processes, each of which serves one rank number."""

    def __init__(self, size: int = POOL_SIZE) -> None:
        self.size = size
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        self._stacks: list[str] = []
        self._store: dist.TCPStore | None = None
        self._calls = 0

    def outcomes(
        self, world_size: int, function: Callable[..., Any], args: tuple[Any, ...], limit_s: float
    ) -> list[Outcome]:
        """Run `function(rank, world_size, *args)` on ranks 0 .. world_size - 1."""
        if not self._processes:
            self._start()
        self._calls += 1
        request = pickle.dumps((self._calls, world_size, function, args))
        for connection in self._connections[:world_size]:
            connection.send_bytes(request)
        answers = self._collect(world_size, limit_s)
        for connection in self._connections[:world_size]:
            connection.send_bytes(b"release")
        self._collect(world_size, limit_s)
        return [pickle.loads(answers[rank]) for rank in range(world_size)]

    def _collect(self, world_size: int, limit_s: float) -> dict[int, bytes]:
        """One answer of every rank; kills the pool when a rank dies or the limit passes."""
        deadline = time.monotonic() + limit_s
        answers: dict[int, bytes] = {}
        while len(answers) < world_size:
            waiting = {self._connections[rank]: rank for rank in range(world_size) if rank not in answers}
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                stacks = self._dump_stacks(sorted(waiting.values()))
                self.kill()
                raise RankError(f"ranks {sorted(waiting.values())} did not answer within {limit_s:g} s\n{stacks}")
            for connection in ready:
                rank = waiting[connection]  # type: ignore[index]
                try:
                    answers[rank] = connection.recv_bytes()  # type: ignore[union-attr]
                except (EOFError, OSError):
                    self._processes[rank].join(5)
                    code = self._processes[rank].exitcode
                    self.kill()
                    raise RankError(f"rank {rank} died (exit code {code})") from None
        return answers

    def _dump_stacks(self, ranks: list[int]) -> str:
        for rank in ranks:
            os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.5)
        texts = []
        for rank in ranks:
            with open(self._stacks[rank]) as file:
                texts.append(f"rank {rank}:\n{file.read()}")
        return "\n".join(texts)

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        start_fork_server()
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank in range(self.size):
            parent_end, child_end = context.Pipe()
            handle, path = tempfile.mkstemp(suffix=f".rank{rank}")
            os.close(handle)
            process = context.Process(target=_serve, args=(child_end, rank, self._store.port, path), daemon=True)
            process.start()
            child_end.close()
            self._processes.append(process)
            self._connections.append(parent_end)
            self._stacks.append(path)

    def kill(self) -> None:
        """End every process; the next call starts new ones."""
        for process in self._processes:
            process.kill()
            process.join()
        for connection in self._connections:
            connection.close()
        for path in self._stacks:
            os.unlink(path)
        self._processes, self._connections, self._stacks, self._store = [], [], [], None


class Ranks:
    """The first `world_size` ranks of a pool."""

    def __init__(self, pool: RankPool, world_size: int) -> None:
        if not 1 <= world_size <= pool.size:
            raise ValueError(f"ranks(world_size) must be in 1 .. {pool.size}, got {world_size}.")
        self._pool = pool
        self._world_size = world_size

    def run(self, function: Callable[..., Any], *args: Any, limit_s: float = CALL_LIMIT_S) -> list[Any]:
        """The result of `function(rank, world_size, *args)` on every rank, by rank.

        Raises:
            RankError: a rank raised (the message has the traceback of every rank that did), died, or hung.
        """
        outcomes = self._pool.outcomes(self._world_size, function, args, limit_s)
        failed = [(rank, outcome) for rank, outcome in enumerate(outcomes) if outcome.exception is not None]
        if failed:
            text = "\n".join(f"rank {rank} of {self._world_size}:\n{outcome.trace}" for rank, outcome in failed)
            raise RankError(text) from failed[0][1].exception
        return [outcome.result for outcome in outcomes]

    def exceptions(
        self, function: Callable[..., Any], *args: Any, limit_s: float = CALL_LIMIT_S
    ) -> list[BaseException | None]:
        """The exception that `function` raised on every rank, None where it returned."""
        return [outcome.exception for outcome in self._pool.outcomes(self._world_size, function, args, limit_s)]


def _serve(connection: Connection, rank: int, port: int, stack_path: str) -> None:
    """The main function of one process of the pool."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ["TORCH_DIST_INIT_BARRIER"] = "1"  # no rank fails and leaves while another still connects to it
    stack_file = open(stack_path, "w")  # noqa: SIM115 - open as long as the process lives
    faulthandler.register(signal.SIGUSR1, file=stack_file)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    gc.freeze()  # what torch has imported is not looked through after every call
    while True:
        try:
            call, world_size, function, args = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore(str(call), store),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
        )
        answer = _call(function, rank, world_size, args)
        gc.collect()
        if answer.exception is not None:  # at once, so that no other rank waits for this one
            dist.destroy_process_group()
        connection.send_bytes(_dumps(answer))
        connection.recv_bytes()  # every rank is done: nobody needs this rank's sockets any more
        if answer.exception is None:
            dist.destroy_process_group()
        connection.send_bytes(b"released")


def _call(function: Callable[..., Any], rank: int, world_size: int, args: tuple[Any, ...]) -> Outcome:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for message in TORCH_WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            return Outcome(function(rank, world_size, *args), None, "")
    except BaseException as exception:
        trace = traceback.format_exc()
        cause: BaseException | None = exception
        while cause is not None:  # its frames hold the model, and with it the process group
            cause.__traceback__ = None
            cause = cause.__cause__ or cause.__context__
        return Outcome(None, exception, trace)


def _dumps(outcome: Outcome) -> bytes:
    try:
        data = pickle.dumps(outcome)
        pickle.loads(data)
        return data
    except Exception as error:
        if outcome.exception is None:
            return _dumps(Outcome(None, TypeError(f"the result cannot be sent: {error}"), f"cannot be sent: {error!r}"))
        return pickle.dumps(Outcome(None, RuntimeError(repr(outcome.exception)), outcome.trace))
