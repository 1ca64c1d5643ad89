"""Network namespaces joined by a bridge, with shaped links: a small network on one machine. Linux, needs root."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

NAMESPACES = Path("/run/netns")
PATTERN = re.compile(r"lgc-(\d+)-(\d+|bridge)")
INTERFACE = "lgc0"
CLONE_NEWNET = 0x40000000  # of <sched.h>; os.setns is there from Python 3.12 on only
MOST_RANKS = 250  # of a /24 network
HEADER_BYTES = 14 + 20 + 32  # of a packet: Ethernet, IPv4, TCP with timestamps
BURST_S = 1e-3
LEAST_BURST = 3028  # bytes: two full Ethernet frames
QUEUE_MS = 500


class NetworkError(Exception):
    """Network that cannot be set up; the message has the command and what it said."""


class Counters(NamedTuple):
    """Bytes that an interface has sent and received, headers included, and packets."""

    sent: int
    received: int
    sent_packets: int
    received_packets: int


@dataclass(frozen=True)
class Network:
    """Namespaces of ranks, each with one interface to a common bridge; made by `temporary_network`.

    A value that other processes may be given: theirs refers to the same network.

    Attributes:
        prefix: of the names of the namespaces.
        world_size: number of namespaces of ranks.
        ranks: that enter each of them, one after the other, and talk to each other unlimited.
    """

    prefix: str
    world_size: int
    ranks: int = 1

    @property
    def bridge(self) -> str:
        """Namespace that has the bridge."""
        return f"{self.prefix}-bridge"

    def namespace(self, rank: int) -> str:
        """Name the namespace of a rank."""
        return f"{self.prefix}-{rank}"

    def address(self, rank: int) -> str:
        """Name the address of a rank, in the namespaces of all ranks."""
        return f"10.0.0.{rank + 1}"

    def enter(self, rank: int) -> str:
        """Move this thread, and those it starts from now on, into a rank's namespace; returns its interface's name."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open(NAMESPACES / self.namespace(rank // self.ranks)) as namespace:
            if libc.setns(namespace.fileno(), CLONE_NEWNET) != 0:
                raise NetworkError(f"setns {self.namespace(rank)}: {os.strerror(ctypes.get_errno())}")
        return INTERFACE

    def shape(self, bits_per_second: float | None) -> None:
        """Limit every link to this rate in both directions, by a token bucket of 1 ms; None is no limit.

        The bucket is that small because a full one lets so many bytes pass at once: a small message would otherwise
        cross the slowest link in no time. Up to half a second of traffic is queued.
        """
        discipline = "noqueue"
        if bits_per_second is not None:
            burst = max(LEAST_BURST, round(BURST_S * bits_per_second / 8))
            discipline = f"tbf rate {round(bits_per_second)}bit burst {burst} latency {QUEUE_MS}ms"
        for rank in range(self.world_size):
            for namespace, device in ((self.namespace(rank), INTERFACE), (self.bridge, f"port{rank}")):
                _run(f"tc -n {namespace} qdisc replace dev {device} root {discipline}")

    @contextmanager
    def delayed(self, seconds: float) -> Iterator[None]:
        """Have every packet arrive so much later, in the `with` block: a process forwards them in the bridge's place.

        Connections outlive both ends of the block.
        """
        if not seconds:
            yield
            return
        ports = [f"port{rank}" for rank in range(self.world_size)]
        for port in ports:
            _run(f"ip -n {self.bridge} link set dev {port} nomaster")
        command = f"ip netns exec {self.bridge} {sys.executable} -m lgc_lab.launch.delay {seconds} {' '.join(ports)}"
        with subprocess.Popen(
            command.split(), env=_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdin is not None
            if not process.stdout.readline():
                raise NetworkError(f"{command}: it has ended at once.")
            yield
            process.stdin.close()  # which ends it, and so does the end of this process
        for port in ports:
            _run(f"ip -n {self.bridge} link set dev {port} master bridge")

    def _set_up(self) -> None:
        _run(f"ip netns add {self.bridge}")
        _run(f"ip -n {self.bridge} link add name bridge type bridge")
        _run(f"ip -n {self.bridge} link set dev bridge addrgenmode none up")
        for rank in range(self.world_size):
            namespace, port = self.namespace(rank), f"port{rank}"
            _run(f"ip netns add {namespace}")
            _run(f"ip -n {self.bridge} link add name {port} type veth peer name {INTERFACE} netns {namespace}")
            # No IPv6 address: its announcements would be among what is counted.
            _run(f"ip -n {self.bridge} link set dev {port} master bridge addrgenmode none up")
            _run(f"ip -n {namespace} link set dev {INTERFACE} addrgenmode none up")
            _run(f"ip -n {namespace} link set dev lo up")
            _run(f"ip -n {namespace} address add {self.address(rank)}/24 dev {INTERFACE}")


@contextmanager
def temporary_network(world_size: int) -> Iterator[Network]:
    """Set up a network of `world_size` ranks for as long as the `with` block lasts.

    Its namespaces are called lgc-PID-RANK, and lgc-PID-bridge has the bridge: nothing is added to the machine's own
    network, and nothing of it is changed. They are removed when the block ends, also by an exception, SIGINT or
    SIGTERM. What a process left that was killed by SIGKILL is removed by the next one that sets up a network.

    Raises:
        ValueError: if there are more ranks than addresses.
        NetworkError: if this process may not do that, or `ip` is missing.
    """
    if not 1 <= world_size <= MOST_RANKS:
        raise ValueError(f"temporary_network(world_size) must be in 1 .. {MOST_RANKS}, got {world_size}.")
    remove_stale()
    network = Network(f"lgc-{os.getpid()}", world_size)
    on_sigterm = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        network._set_up()
        yield network
    finally:
        on_sigint = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            for path in NAMESPACES.glob(f"{network.prefix}-*"):
                _run(f"ip netns delete {path.name}")
        finally:
            signal.signal(signal.SIGINT, on_sigint)
            signal.signal(signal.SIGTERM, on_sigterm)


def read_counters() -> Counters:
    """Read the counters of the interface in the calling thread's namespace."""
    lines = Path("/proc/thread-self/net/dev").read_text().splitlines()
    (fields,) = (line.split(":")[1].split() for line in lines if line.split(":")[0].strip() == INTERFACE)
    received, received_packets, sent, sent_packets = (int(fields[i]) for i in (0, 1, 8, 9))
    return Counters(sent, received, sent_packets, received_packets)


def remove_stale() -> None:
    """Remove the namespaces of networks whose process no longer exists; this one has none yet."""
    for path in NAMESPACES.glob("lgc-*"):
        match = PATTERN.fullmatch(path.name)
        if match and (int(match[1]) == os.getpid() or not Path("/proc", match[1]).exists()):
            _run(f"ip netns delete {path.name}")


def _run(command: str) -> None:
    try:
        done = subprocess.run(
            command.split(), env=_environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
    except OSError as error:
        raise NetworkError(f"{command}: {error}") from None
    if done.returncode != 0:
        raise NetworkError(f"{command}: {done.stderr.strip() or f'exit status {done.returncode}'}")


def _environment() -> dict[str, str]:
    return os.environ | {"PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}  # not on everybody's path
