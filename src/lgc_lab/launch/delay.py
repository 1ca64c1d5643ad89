"""Forwards frames between the ports of a network some time after they came, as not every kernel has netem. Needs root.

python -m lgc_lab.launch.delay SECONDS PORT... prints a line when it is ready, and ends when its standard input does.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import sys
import time
from collections import deque
from collections.abc import Sequence

ALL_PROTOCOLS = 0x0003  # of <linux/if_ether.h>
SOL_PACKET, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = 263, 15, 23  # of <linux/if_packet.h>
HEADER = 10  # struct virtio_net_hdr, with which large packets and their checksums stay what the kernel made of them
LARGEST = HEADER + 14 + 2**16
ROOM = 2**26  # bytes that a socket may queue: a slow link must not hold up the others


def forward(seconds: float, ports: Sequence[str]) -> None:
    """Forward between these interfaces of this namespace, until the standard input ends."""
    sockets = [_open(port) for port in ports]
    place_of: dict[bytes, socket.socket] = {}  # by address, as a bridge learns them
    waiting: deque[tuple[float, bytes, list[socket.socket]]] = deque()
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))  # a delay must not depend on what the ranks compute
    print("ready", flush=True)
    while True:
        left = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        ready, _, _ = select.select([sys.stdin.fileno(), *sockets], [], [], left)
        now = time.monotonic()
        for each in ready:
            if isinstance(each, int):
                return
            packet = each.recv(LARGEST)
            target, source = packet[HEADER : HEADER + 6], packet[HEADER + 6 : HEADER + 12]
            place_of[source] = each
            known = place_of.get(target)
            others = [other for other in sockets if other is not each] if known is None else [known]
            waiting.append((now + seconds, packet, others))
        while waiting and waiting[0][0] <= time.monotonic():
            _, packet, others = waiting.popleft()
            for other in others:
                _send(other, packet)


def _open(port: str) -> socket.socket:
    opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ALL_PROTOCOLS))
    opened.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    opened.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    for option in (32, 33):  # SO_SNDBUFFORCE and SO_RCVBUFFORCE of <asm/socket.h>
        opened.setsockopt(socket.SOL_SOCKET, option, ROOM)
    opened.bind((port, 0))
    return opened


def _send(port: socket.socket, packet: bytes) -> None:
    try:
        port.send(packet)
    except OSError as error:
        if error.errno != errno.ENOBUFS:  # the link's queue is full, and drops it
            raise


if __name__ == "__main__":
    forward(float(sys.argv[1]), sys.argv[2:])
