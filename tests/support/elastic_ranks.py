"""Ranks that come and go, for tests: processes that can be killed, stopped and started, and their lighthouse."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ranks import start_fork_server
from torch import nn

from lgc.checkpoint.state import from_bytes, to_bytes
from lgc_lab.recipes.digits import DIGITS

TINY = dataclasses.replace(DIGITS, name="tiny", model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))

LIMIT_S = 90.0
HEARTBEAT_TIMEOUT_MS = 1000
JOIN_TIMEOUT_MS = 1500
EVERY = 4
SAMPLES = 512
Told = Callable[[Any], bool]


class Ended(NamedTuple):
    """What a process tells last: the exception that has ended it, None if it is done."""

    exception: Exception | None


class Process:
    """A process of a test, which tells what happens in it.

    Args:
        function: what it runs, `function(tell, *args)`; `tell` sends anything to the test.
        args: of it.

    Attributes:
        told: by it until now.
    """

    def __init__(self, function: Callable[..., None], *args: Any) -> None:
        start_fork_server()
        context = multiprocessing.get_context("forkserver")
        connection, child = context.Pipe()
        self.process = context.Process(target=_run, args=(child, function, *args), daemon=True)
        self.process.start()
        child.close()
        self.told: list[Any] = []
        self._news = threading.Condition()
        threading.Thread(target=self._listen, args=(connection,), daemon=True).start()

    def _listen(self, connection: Connection) -> None:
        while not (self.told and isinstance(self.told[-1], Ended)):
            try:
                each = connection.recv()
            except (EOFError, OSError):
                each = Ended(ProcessLookupError("was killed"))
            with self._news:
                self.told.append(each)
                self._news.notify_all()

    def wait_for(self, what: Told) -> Any:
        """The first that it has told, or tells, that is so; if it ends before, its exception is raised."""
        with self._news:
            self._news.wait_for(lambda: self._found(what) is not None, LIMIT_S)
            found = self._found(what)
            assert found is not None, f"told nothing of the kind within {LIMIT_S:g} s; the last was {self.told[-3:]}"
        if isinstance(found, Ended):
            raise found.exception or AssertionError(f"ended without having told it; the last was {self.told[-3:]}")
        return found

    def _found(self, what: Told) -> Any:
        return next((each for each in self.told if isinstance(each, Ended) or what(each)), None)

    def result(self) -> Any:
        """What it has told last, once it has ended; its exception is raised."""
        with self._news:
            ended = self._news.wait_for(lambda: bool(self.told) and isinstance(self.told[-1], Ended), LIMIT_S)
            assert ended, f"has not ended within {LIMIT_S:g} s; the last was {self.told[-3:]}"
        if self.told[-1].exception is not None:
            raise self.told[-1].exception
        return self.told[-2]

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def _run(connection: Connection, function: Callable[..., None], *args: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    ended: Exception | None = None
    try:
        function(connection.send, *args)
    except Exception as error:
        ended = type(error)(str(error))
    connection.send(Ended(ended))


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"is not so after {LIMIT_S:g} s"
        time.sleep(0.05)


def serve_lighthouse(tell: Callable[[Any], None], least: int, bind: str = "127.0.0.1:0") -> None:
    """Be a lighthouse until the end of the process."""
    from torchft.coordination import LighthouseServer

    server = LighthouseServer(
        bind=bind,
        min_replicas=least,
        join_timeout_ms=JOIN_TIMEOUT_MS,
        quorum_tick_ms=20,
        heartbeat_timeout_ms=HEARTBEAT_TIMEOUT_MS,
    )
    tell(f"127.0.0.1:{server.address().rpartition(':')[2]}")
    signal.pause()


class Crew:
    """Ranks that train together until they are told to end, and their lighthouse.

    Attributes:
        address: of the lighthouse.
        ranks: that have been started and not been killed.
    """

    def __init__(self, least: int, job: Callable[..., None], options: dict[str, Any]) -> None:
        self._job, self._options = job, options
        self._total = multiprocessing.get_context("forkserver").RawValue(
            "i", 10**9
        )  # a lock might be held by a rank that is killed
        self.lighthouse = Process(serve_lighthouse, least)
        self.address = self.lighthouse.wait_for(lambda each: isinstance(each, str))
        self.ranks: list[Process] = []
        self._seed = 0

    def start(self, **options: Any) -> Process:
        """Start another rank, with weights of its own."""
        self._seed += 1
        rank = Process(self._job, self.address, self._seed, self._total, {**self._options, **options})
        self.ranks.append(rank)
        return rank

    def kill(self, rank: Process) -> None:
        """Kill a rank as SIGKILL does."""
        self.ranks.remove(rank)
        rank.kill()

    def wait_for_ranks(self, number: int) -> None:
        """Wait until the ranks make a round more of so many."""
        for rank in self.ranks:
            rounds = max((each["rounds"] for each in rank.told if "rounds" in each), default=0)
            rank.wait_for(lambda each, after=rounds: each.get("ranks") == number and each["rounds"] > after)  # type: ignore[misc]

    def end(self) -> list[dict[str, Any]]:
        """Let the ranks train two rounds more; what each has at the end."""
        step = max(each["step"] for rank in self.ranks for each in rank.told if "step" in each)
        self.total = step + 2 * EVERY
        return [rank.result() for rank in self.ranks]

    @property
    def total(self) -> int:
        """Steps after which the ranks end."""
        return int(self._total.value)

    @total.setter
    def total(self, steps: int) -> None:
        self._total.value = steps


@contextmanager
def crew(number: int, *, least: int, job: Callable[..., None] | None = None, **options: Any) -> Iterator[Crew]:
    """Ranks that train together, with `least` to make a round; killed at the end of the `with` block."""
    made = Crew(least, job or train, {"attach": {"ranks": number, "min_ranks": least}} | options)
    try:
        for _ in range(number):
            made.start()
        yield made
    finally:
        for each in (*made.ranks, made.lighthouse):
            each.kill()


def digest_of(handle: Any) -> str:
    """A digest of what all ranks have alike after a round."""
    state = handle.state_dict()["aggregator"]["replicated"]
    alike = [tensor for part in ("anchor", "outer_momentum", "buffers") for tensor in state[part].values()]
    return hashlib.sha256(b"".join(each.numpy().tobytes() for each in alike)).hexdigest()[:12]


class Recorder:
    """Takes what every round takes in, and what is owed before it."""

    def __init__(self, handle: Any, tell: Callable[[Any], None]) -> None:
        self._feedback, self._tell = handle.synchronizer.aggregator.feedback, tell
        handle.synchronizer.observers.append(self)

    def before_round(self, step: int, gradient: torch.Tensor) -> None:
        self._tell({"round": step, "moved": norm(gradient), "owed": norm(self._feedback.residual)})

    def after_round(self, step: int, result: Any) -> None:
        pass


def norm(tensor: torch.Tensor) -> float:
    return float(tensor.double().norm())


def dies_in_round(handle: Any, tell: Callable[[Any], None], is_due: Callable[[], bool]) -> None:
    """Have this rank end by force in a round, when the others wait for its payload."""
    transport, deliver = handle.transport, handle.transport.together

    def together(posts: Any) -> Any:
        if is_due():
            tell({"dies": handle.rounds - 1})
            os.kill(os.getpid(), signal.SIGKILL)
        return deliver(posts)

    transport.together = together


def loses_sight(handle: Any, tell: Callable[[Any], None], is_due: Callable[[], bool]) -> None:
    """Have this rank lose the others when they have what they need of it, and cannot know that."""
    from lgc.elastic.transport import LostError

    transport, commit = handle.transport, handle.transport.commit

    def then_lost() -> None:
        commit()
        if is_due():
            transport.commit = commit
            tell({"after": norm(handle.synchronizer.aggregator.feedback.residual), "in": handle.rounds - 1})
            raise LostError("the others were lost sight of, for a test")

    transport.commit = then_lost


def trains_apart(handle: Any, tell: Callable[[Any], None], is_due: Callable[[], bool]) -> None:
    """Have this rank commit a round that the others do not, and come back when they have made another of its number."""
    transport, commit = handle.transport, handle.transport.commit

    def alone() -> None:
        if not is_due():
            return commit()  # type: ignore[no-any-return]
        transport.commit = commit
        transport.disconnect()
        time.sleep(2 * JOIN_TIMEOUT_MS / 1000)
        tell({"apart": handle.rounds})
        return None

    transport.commit = alone


def train(tell: Callable[[Any], None], address: str, seed: int, total: Any, options: dict[str, Any]) -> None:
    """Train until the run is at `total` steps; tells of every step."""
    import lgc
    import lgc.elastic

    torch.manual_seed(seed)
    width = options.get("width", 16)
    model = nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    x = torch.randn(SAMPLES, 6, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    sampler = lgc.elastic.Sampler(SAMPLES)
    data = torch.utils.data.TensorDataset(x, y, torch.arange(SAMPLES))
    loader = torch.utils.data.DataLoader(data, batch_size=8, sampler=sampler)
    waits = {"timeout": 5.0, "connect_timeout": 5.0, "quorum_timeout": 20.0, "heartbeat_every": 0.1}
    handle = lgc.elastic.attach(
        model,
        options.get("scheme", f"local:every={EVERY}:start_steps=0+quantized"),
        optimizer,
        lighthouse=address,
        carried={"schedule": schedule, "sampler": sampler if options.get("carries_sampler", True) else schedule},
        **waits | options["attach"],
    )
    if "state" in options:
        state = from_bytes(options["state"])
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        handle.load_state_dict(state["handle"])
        schedule.load_state_dict(state["schedule"])
        sampler.load_state_dict(state["sampler"])
    Recorder(handle, tell)

    met: list[int] = []  # rounds of three ranks that this one has made to the end: in its first one it counts nothing

    def together() -> bool:
        return bool(met and handle.rounds > 4 and len(handle.ranks) == 3)

    def ends() -> bool:
        return bool(handle.step >= total.value)

    if "fault" in options:
        options["fault"](handle, tell, ends if options.get("last") else together)
    for inputs, labels, places in loader:
        loss = nn.functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        owed = norm(handle.synchronizer.aggregator.feedback.residual)  # type: ignore[union-attr]
        made = {"step": handle.step, "rounds": handle.rounds, "ranks": len(handle.ranks), "owed": owed}
        made |= {"places": places.tolist(), "taken": sampler.taken}
        tell(made | {"digest": digest_of(handle), "rate": schedule.get_last_lr()[0]})
        if len(handle.ranks) == 3:
            met.append(handle.rounds)
        time.sleep(options.get("pause", 0.01))
        if handle.step >= total.value:
            break
    handle.finish()
    with handle.anchored():
        parts: dict[str, Any] = {
            "model": model,
            "optimizer": optimizer,
            "handle": handle,
            "schedule": schedule,
            "sampler": sampler,
        }
        tell({"state": to_bytes({name: part.state_dict() for name, part in parts.items()})[0]})
    tell(
        {
            "step": handle.step,
            "rounds": handle.rounds,
            "ranks": len(handle.ranks),
            "digest": digest_of(handle),
            "rate": schedule.get_last_lr()[0],
            "loss": loss.item(),
            "taken": sampler.taken,
        }
    )
    handle.detach()


def breaks(handle: Any, tell: Callable[[Any], None], is_due: Callable[[], bool]) -> None:
    """Have this rank's weights be none any more."""

    def spoil(module: nn.Module, inputs: Any) -> None:
        if is_due():
            next(module.parameters()).data.fill_(torch.nan)

    handle._model().register_forward_pre_hook(spoil)


def cannot_connect(handle: Any, tell: Callable[[Any], None], is_due: Callable[[], bool]) -> None:
    """Have this rank meet the others and not reach them, as behind a firewall."""

    def made(*_: Any) -> None:
        raise RuntimeError("no route to host")

    handle.transport.group.made = made


def shows_sockets(handle: Any, tell: Callable[[Any], None], is_due: Callable[[], bool]) -> None:
    """Have this rank tell on which addresses it listens once it is amid its rounds."""
    commit = handle.transport.commit

    def look() -> None:
        commit()
        tell({"listens": listening()})

    handle.transport.commit = look


def listening() -> set[str]:
    """The addresses on which this process listens, as the kernel writes them."""
    own = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the listing itself
            own.add(os.readlink(f"/proc/self/fd/{descriptor}"))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
                found.add(fields[1].partition(":")[0])
    return found


def hold_store(tell: Callable[[Any], None]) -> None:
    """Have a store at which a group may meet, until the end of the process; tells its port."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    tell(store.port)
    signal.pause()


def run_script(tell: Callable[[Any], None], script: str, address: str, folder: Path) -> None:
    """Run a script as one of its ranks, with checkpoints in a folder; tells what it prints."""
    os.environ |= {"LIGHTHOUSE": address, "CHECKPOINTS": str(folder)}
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(script, "script", "exec"), {"__name__": "__main__"})
    tell(output.getvalue().strip())
