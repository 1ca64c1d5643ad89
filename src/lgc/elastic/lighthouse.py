"""Who takes part in a round, as torchft's lighthouse finds it out."""

from __future__ import annotations

import threading
import time
import uuid
import weakref
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, NamedTuple

from lgc.comm.transport import LEAST_TIMEOUT, RankError

try:
    from torchft.coordination import LighthouseClient
except ImportError as error:
    raise ImportError(
        "lgc.elastic needs torchft 0.2: pip install 'lgc[elastic]'. It has wheels for Linux on x86-64 and Python up to "
        "3.13; elsewhere build it from its sources, which needs Rust and protoc, or train with a fixed number of ranks "
        "by lgc.attach."
    ) from error

PAUSE_S = 0.2  # between two tries to reach a lighthouse
LONGER = 1.35  # times as long as torchft was told it may try to connect, by its pauses in between
ANSWER_S = 5.0  # within which one that is there can be connected to, and answers a heartbeat
TOLD = {"digest": str, "form": str, "group": str, "closing": bool, "step": int, "steps": int, "drawn": list}
MOST_TOLD = 2**53  # of a number, which JSON has exactly
MOST_DRAWN = 2**24  # samples that a rank may have taken since the last round: each is a place to be used up


def is_told(data: object) -> bool:
    """Whether this is what a rank may say of itself: all fields, of their types, and numbers within their bounds."""
    if not isinstance(data, dict) or any(type(data.get(name)) is not kind for name, kind in TOLD.items()):
        return False
    if not all(0 <= data[name] < MOST_TOLD for name in ("step", "steps")):
        return False
    return all(
        isinstance(pair, list)
        and len(pair) == 2
        and all(type(number) is int and 0 <= number < MOST_DRAWN for number in pair)
        for pair in data["drawn"]
    )


class Member(NamedTuple):
    """A rank that takes part.

    Attributes:
        name: of its process, like no other.
        store: where its store is, as host:port.
        rounds: that it has made.
        told: what else it says of itself.
    """

    name: str
    store: str
    rounds: int
    told: Mapping[str, Any]


class Meeting(NamedTuple):
    """Members, in order of rank, and a text that no other meeting has."""

    members: list[Member]
    identity: str


class NoQuorumError(RankError):
    """No round can be made: the lighthouse is gone, or too few ranks have come."""


class Lighthouse:
    """This process's connection to the lighthouse, which knows of it as long as heartbeats come.

    Args:
        address: of the lighthouse, as host:port.
        name: of this process; something that no other has is added to it.
        least: fewer ranks make no round.
        heartbeat_every: seconds.
        connect_timeout: seconds, of one try to reach the lighthouse.
        quorum_timeout: seconds, to wait for the others, those tries included.
    """

    def __init__(
        self,
        address: str,
        name: str,
        least: int,
        *,
        heartbeat_every: float,
        connect_timeout: float,
        quorum_timeout: float,
    ) -> None:
        self.address = address if "://" in address else f"http://{address}"
        self.name = f"{name}:{uuid.uuid4()}"
        self.least = least
        self._connect_timeout = connect_timeout
        self._quorum_timeout = quorum_timeout
        self._client: Any = None
        self._beat = _Heart(self.address, self.name, heartbeat_every, min(connect_timeout, ANSWER_S))
        weakref.finalize(self, self._beat.end)

    def meet(self, store: str, rounds: int, told: Mapping[str, Any]) -> Meeting:
        """Wait until the ranks that are there meet; a collective.

        Args:
            store: of this rank, as host:port.
            rounds: that this rank has made.
            told: what else it says of itself: JSON, of few bytes, as `is_told` has it.

        Raises:
            NoQuorumError: if they do not within the timeout.
        """
        self._beat.start()
        deadline = time.monotonic() + self._quorum_timeout
        failure: Exception | None = None
        connected = True
        while (left := deadline - time.monotonic()) > 0:
            try:
                found = self._connected(left).quorum(
                    self.name,
                    timedelta(seconds=max(LEAST_TIMEOUT, deadline - time.monotonic())),
                    address="",
                    store_address=store,
                    step=rounds,
                    world_size=1,
                    shrink_only=False,
                    data=dict(told),
                )
            except (RuntimeError, TimeoutError) as error:
                connected, self._client, failure = self._client is not None, None, error
            else:
                connected, failure = True, None
                strangers = [each.replica_id for each in found.participants if not is_told(each.data)]
                if strangers:
                    raise RankError(
                        f"lgc: the lighthouse at {self.address} serves another job as well, of {strangers[0]}; start "
                        "one for each job."
                    )
                members = [
                    Member(each.replica_id, each.store_address, each.step, each.data) for each in found.participants
                ]
                if len(members) >= self.least:
                    created = found.created
                    return Meeting(members, f"{found.quorum_id}/{created.seconds}.{created.nanos}")
            time.sleep(PAUSE_S)
        raise NoQuorumError(self._reason(failure, connected)) from failure

    def leave(self) -> None:
        """Be forgotten by the lighthouse, once its heartbeat timeout has passed."""
        self._beat.stop.set()

    def _connected(self, seconds: float) -> Any:
        if self._client is None:
            limit = timedelta(seconds=min(self._connect_timeout, seconds) / LONGER)
            self._client = LighthouseClient(self.address, connect_timeout=limit)
        return self._client

    def _reason(self, failure: Exception | None, connected: bool) -> str:
        unheard = time.monotonic() - self._beat.heard
        if not connected or unheard > ANSWER_S or self._beat.failed:
            return (
                f"lgc: the lighthouse at {self.address} has not answered for {unheard:.0f} s ({failure}), and without "
                "it no round can be made. Nothing of this one has changed. Start a lighthouse there again, and then "
                "all ranks from their last checkpoint; where one is back within attach(quorum_timeout=...), they go on "
                "by themselves."
            )
        return (
            f"lgc: fewer than min_ranks={self.least} ranks have met within {self._quorum_timeout:g} s, and a round of "
            "fewer would let two groups train apart. Nothing of this round has changed. Bring ranks back within "
            "attach(quorum_timeout=...), which must also be longer than the --join_timeout_ms of the lighthouse, for "
            "which it waits for ranks that are there but amid their steps; if the others have ended the run, end this "
            "rank, and take the weights from them."
        )


class _Heart:
    """A thread that sends heartbeats from its start until it is told to stop.

    Attributes:
        heard: when the lighthouse last answered, by the monotonic clock.
        failed: whether it has not answered the last one.
    """

    def __init__(self, address: str, name: str, every: float, connect_timeout: float) -> None:
        self.stop = threading.Event()
        self.heard = time.monotonic()
        self.failed = False
        self._address, self._name, self._every = address, name, every
        self._connect_timeout = timedelta(seconds=connect_timeout / LONGER)
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        if self._thread is None or self.stop.is_set():
            self.stop.clear()
            self._thread = threading.Thread(target=self._run, name="lgc heartbeat", daemon=True)
            self._thread.start()

    def end(self) -> None:
        """Stop, and wait for the thread: one that is in torchft's code when Python ends aborts the process."""
        self.stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(2 * ANSWER_S)

    def _run(self) -> None:
        client: Any = None
        while not self.stop.is_set():
            try:
                client = client or LighthouseClient(self._address, connect_timeout=self._connect_timeout)
                client.heartbeat(self._name, timedelta(seconds=ANSWER_S))
                self.heard, self.failed = time.monotonic(), False
            except (RuntimeError, TimeoutError):
                client, self.failed = None, True
            self.stop.wait(self._every)
