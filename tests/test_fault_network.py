"""Ranks on several machines: one machine is lost, or the network between them."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cases import cases
from fault_job import Fault, read
from fault_runs import SCHEMES, arguments, faulty, log_of, results, run_undisturbed
from runs import ENVIRONMENT, LIMIT_S, TORCHRUN, measured, rows

TIMEOUT_S = 20.0
PATIENCE_S = 60.0  # with a busy machine
ADDRESSES = ("192.0.2.1", "192.0.2.2")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def start(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT | environment
    )


def finish(processes: list[subprocess.Popen[str]]) -> list[str]:
    """What each of them has written, to its end."""
    try:
        return [process.communicate(timeout=LIMIT_S)[0] for process in processes]
    finally:
        for process in processes:
            process.terminate()


# --- a machine is lost ---


@pytest.mark.exhaustive
@pytest.mark.parametrize("scheme", ["quantized", "lgc-ring"])
def test_when_a_machine_is_lost_torchrun_goes_on_with_fewer_ranks(scheme: str, tmp_path: Path) -> None:
    out, endpoint = tmp_path / "run", f"127.0.0.1:{free_port()}"
    run = faulty(out, [Fault("node", 1, 7, "during")], arguments(SCHEMES[scheme], out, timeout=60))
    agents = []
    for machine, address in enumerate(("127.0.0.1", "127.0.0.2")):  # ranks are in order of the addresses
        elastic = ["--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", f"--local-addr={address}"]
        quickly = f"last_call_timeout=3,keep_alive_interval=1,is_host={1 - machine}"
        rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-id=elastic", "--rdzv-conf", quickly]
        agents.append(start([*TORCHRUN, *elastic, *rendezvous, *run], {}))
    outputs = finish(agents)
    assert agents[0].returncode == 0, outputs
    assert "NOTICE: from 2 to 1 ranks" in outputs[0]
    _, summary = measured(out)
    assert summary["world_sizes"] == [[0, 2], [6, 1]]
    assert [row["step"] for row in rows(out) if "loss" in row] == list(range(summary["steps"]))


# --- the network is lost ---


@pytest.fixture
def namespaces() -> Iterator[list[str]]:
    """Two network namespaces with a link between them, `lgc-link` in both."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and ip (iproute2)")
    names = [f"lgc-{os.getpid()}-{rank}" for rank in range(2)]
    made = []
    try:
        for name in names:
            done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
            if done.returncode != 0:
                pytest.skip(f"network namespaces are not allowed here: {done.stderr.strip()}")
            made.append(name)
        ip("link", "add", "lgc-link", "netns", names[0], "type", "veth", "peer", "name", "lgc-link", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "lgc-link")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "lgc-link", "up")
        yield names
    finally:
        for name in made:
            ip("netns", "delete", name)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def start_rank(rank: int, namespace: str, starts: int, program: list[str]) -> subprocess.Popen[str]:
    launched = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    network = {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": "lgc-link"}
    environment = launched | network | {"TORCHELASTIC_RESTART_COUNT": str(starts)}
    return start(["ip", "netns", "exec", namespace, sys.executable, *program], environment)


@cases("scheme", ["quantized", "lgc-ps"], in_suite=["quantized"])
def test_when_packets_are_dropped_every_rank_ends_in_time_and_can_be_restarted(
    namespaces: list[str], scheme: str, tmp_path: Path
) -> None:
    out, expected = tmp_path / "run", tmp_path / "undisturbed"
    fault = Fault("partition", 1, 10, "during")
    program = faulty(out, [fault], arguments(SCHEMES[scheme], out, timeout=TIMEOUT_S))

    ranks = [start_rank(rank, name, 0, program) for rank, name in enumerate(namespaces)]
    outputs = finish(ranks)
    (happened,) = read(log_of(out), "fault")
    assert time.time() - happened["time"] < TIMEOUT_S + PATIENCE_S
    for rank, output in enumerate(outputs):
        assert ranks[rank].returncode == 1, output
        assert f"lgc: as seen by rank {rank}, an exchange with the others has failed" in output

    ip("-n", namespaces[fault.rank], "link", "set", "lgc-link", "up")
    ranks = [start_rank(rank, name, 1, program) for rank, name in enumerate(namespaces)]
    run_undisturbed(arguments(SCHEMES[scheme], expected, timeout=60))
    outputs = finish(ranks)
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert results(out) == results(expected)
