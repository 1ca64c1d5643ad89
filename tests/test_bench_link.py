"""`lgc bench link`: its network is gone whatever happens, and what it reports is what was sent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from cases import cases
from click.testing import CliRunner
from link_job import LIMIT_S, job, met
from ranks import start_fork_server
from runs import is_running, lgc

from lgc.schemes import LGCServer, TopK, parse_scheme
from lgc_lab.bench.link import command
from lgc_lab.bench.link.measure import Measurement, shortened
from lgc_lab.bench.link.results import COMPUTE, LOOPBACK, RESULTS, Cell, Results
from lgc_lab.bench.link.target import times_to_target
from lgc_lab.cli import main
from lgc_lab.launch.network import NAMESPACES, Network, NetworkError, remove_stale, temporary_network
from lgc_lab.launch.ranks import RankFailedError
from lgc_lab.recipes import RECIPES
from lgc_lab.report.runs import Run

HERE = Path(__file__).parent
RATE = "200mbit"
TINY = ["--recipe", "digits", "--workers", "2", "--steps", "2", "--warm-up", "1", "--repeats", "2"]


def _has_network() -> bool:
    try:
        with temporary_network(1):
            return True
    except NetworkError:
        return False


needs_root = pytest.mark.skipif(not _has_network(), reason="needs root, network namespaces and iproute2")


def environment() -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (HERE, HERE / "support", HERE.parent / "src"))),
        "OMP_NUM_THREADS": "1",
    }


def output_of(*arguments: str) -> str:
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    return subprocess.run(
        arguments, capture_output=True, text=True, check=True, env=os.environ | {"PATH": path}, timeout=LIMIT_S
    ).stdout


def machine() -> list[str]:
    """Everything of the machine's own network that could have been changed."""
    shown = [["ip", "-j", name] for name in ("link", "address", "route", "neighbour", "rule")]
    texts = [output_of(*arguments) for arguments in [*shown[:3], shown[4], ["tc", "-j", "qdisc"]]]
    forwarding = Path("/proc/sys/net/ipv4/ip_forward").read_text()
    return [*texts, forwarding]


def namespaces(pid: int) -> list[str]:
    return sorted(path.name for path in NAMESPACES.glob(f"lgc-{pid}-*"))


# --- the network ---


@needs_root
def test_a_network_has_shaped_links_and_leaves_nothing() -> None:
    before = machine()
    with temporary_network(3) as network:
        assert namespaces(os.getpid()) == sorted([*map(network.namespace, range(3)), network.bridge])
        assert machine() == before
        network.shape(1e7)
        for namespace, device in [(network.namespace(2), "lgc0"), (network.bridge, "port2")]:
            (tbf,) = json.loads(output_of("tc", "-n", namespace, "-j", "qdisc", "show", "dev", device))
            assert tbf["kind"] == "tbf"
            assert tbf["options"]["rate"] == 1e7 / 8
        network.shape(None)
        assert "tbf" not in output_of("tc", "-n", network.bridge, "qdisc")
    assert namespaces(os.getpid()) == []
    assert machine() == before


@pytest.mark.exhaustive
@needs_root
def test_between_two_sites_a_round_sends_one_coded_copy_of_each() -> None:
    command = [sys.executable, "-m", "lgc_lab", "bench", "sites", "--rates", "1gbit", "--steps", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    one_rank, ddp, local_over_ddp, fsdp, local_over_fsdp = (float(row[-2].replace(",", "")) for row in rows)
    round_of_one_copy = 1_853_568 * (2 / 8 + 2 / 256) / 20 / 1e3  # kB a step
    assert round_of_one_copy < one_rank < 1.1 * round_of_one_copy
    for row, local in ((rows[2], local_over_ddp), (rows[4], local_over_fsdp)):
        assert 0.95 < float(row[-1]) < 1.05
        assert float(row[-1]) == pytest.approx(local / one_rank, abs=0.005)
    assert ddp > fsdp > 200 * local_over_fsdp


KNOCK = """
import socket, sys, time
started = time.perf_counter()
assert socket.socket().connect_ex((sys.argv[1], 1))  # which nobody listens at
print(time.perf_counter() - started)
"""


@needs_root
def test_packets_are_delayed_and_nothing_is_left_of_what_delays_them() -> None:
    with temporary_network(2) as network:

        def knock() -> float:
            """Seconds until the other rank has answered."""
            knocking = ("ip", "netns", "exec", network.namespace(0), sys.executable, "-c", KNOCK, network.address(1))
            return float(output_of(*knocking))

        with network.delayed(0.2):
            assert knock() > 4 * 0.2  # there and back, for its address and for the connection
        assert knock() < 0.2
    assert namespaces(os.getpid()) == []


@needs_root
def test_a_network_is_removed_when_the_block_raises() -> None:
    with pytest.raises(KeyboardInterrupt), temporary_network(2):
        raise KeyboardInterrupt
    assert namespaces(os.getpid()) == []
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_network_has_an_address_for_every_rank() -> None:
    with (
        pytest.raises(ValueError, match=r"temporary_network\(world_size\) must be in 1 \.\. 250, got 251"),
        temporary_network(251),
    ):
        pass


@contextmanager
def refuse(world_size: int) -> Iterator[Network]:
    raise NetworkError("ip netns add lgc-1-bridge: Operation not permitted")
    yield


def test_without_rights_the_ranks_talk_over_loopback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "temporary_network", refuse)
    with command._network(2, loopback=False) as network:
        assert network is None
    notes = capsys.readouterr().err
    assert "need root" in notes
    assert "ip netns add lgc-1-bridge: Operation not permitted" in notes
    assert "NOT SHAPED" in notes


# --- ranks in it ---


def await_ranks(folder: Path, has_ended: Callable[[], bool]) -> list[int]:
    """The process ids of the ranks of a job, when they have met."""
    deadline = time.monotonic() + LIMIT_S
    while len(ranks := met(folder)) < 2:
        assert not has_ended()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return ranks


@needs_root
@pytest.mark.parametrize("fate", ["end", "raise", "kill a rank"])
def test_nothing_is_left_whatever_the_ranks_do(tmp_path: Path, fate: str) -> None:
    before, ended = machine(), threading.Event()

    def kill() -> None:
        os.kill(await_ranks(tmp_path, ended.is_set)[1], signal.SIGKILL)

    start_fork_server()
    with ThreadPoolExecutor(1) as thread:
        killing = thread.submit(kill if fate == "kill a rank" else ended.is_set)
        try:
            with nullcontext() if fate == "end" else pytest.raises(RankFailedError, match="rank 1: "):
                job(tmp_path, fate)
        finally:
            ended.set()
        killing.result()
    assert namespaces(os.getpid()) == []
    assert not any(is_running(rank) for rank in await_ranks(tmp_path, ended.is_set))
    assert machine() == before


@contextmanager
def started(folder: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """The job as a program of its own, with its ranks in the network; their process ids."""
    code = f"from pathlib import Path; from link_job import job; job(Path({str(folder)!r}), 'wait')"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process, await_ranks(folder, lambda: process.poll() is not None)
        finally:
            process.kill()
            process.wait()
            remove_stale()


@needs_root
@cases("name", ["SIGINT", "SIGTERM"], in_suite=["SIGTERM"])
def test_nothing_is_left_by_a_program_that_is_stopped(tmp_path: Path, name: str) -> None:
    before = machine()
    with started(tmp_path) as (process, ranks):
        if name == "SIGINT":
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the ranks get it too
        else:
            process.terminate()
        output, _ = process.communicate(timeout=LIMIT_S)
        assert namespaces(process.pid) == [], output
        assert process.returncode != 0, output
        assert not any(is_running(rank) for rank in ranks)
    assert machine() == before


@needs_root
def test_what_a_killed_program_leaves_is_removed_by_the_next_one(tmp_path: Path) -> None:
    with started(tmp_path) as (process, ranks):
        process.kill()
        process.wait()
        assert len(namespaces(process.pid)) == 3
        with temporary_network(1) as network:
            assert namespaces(process.pid) == []
            assert namespaces(os.getpid()) == sorted([network.bridge, network.namespace(0)])
        deadline = time.monotonic() + LIMIT_S
        while any(is_running(rank) for rank in ranks):
            assert time.monotonic() < deadline
            time.sleep(0.05)


# --- the measurement ---


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with results of two ranks on a slow link."""
    out = tmp_path_factory.mktemp("link")
    schemes = ["--schemes", "dense,bf16,powersgd,lgc-ring", "--rates", f"{RATE},unshaped"]
    before = machine()
    done = lgc("bench", "link", *TINY, *schemes, "--out", str(out))
    assert "lgc-ring" in done.stdout
    assert "NOT SHAPED" not in done.stderr
    assert machine() == before
    return out


def cells(folder: Path) -> list[Cell]:
    return [Cell(**cell) for cell in json.loads((folder / RESULTS).read_text())["cells"]]


@needs_root
def test_counters_agree_with_the_count(measured: Path) -> None:
    rows = {(row.rate, row.scheme, row.phase): row for row in Results.load(measured).rows}
    for rate in (RATE, "unshaped"):
        for scheme in ("dense", "bf16"):
            row = rows[rate, scheme, "dense"]
            assert row.payload is not None
            assert row.payload == pytest.approx(row.counted, rel=0.02)
        dense, ring = rows[rate, "dense", "dense"], rows[rate, "lgc-ring", "compressed"]
        assert dense.counted == pytest.approx(2 * 4 * RECIPE_PARAMETERS, rel=0.001)
        assert ring.payload is not None
        assert ring.counted < ring.payload < ring.counted + 20_000  # of gloo's own messages
    for cell in cells(measured):
        assert cell.counter_sent is not None
        assert cell.counter_received is not None
        assert sum(cell.counted_sent) == sum(cell.counted_received)
        assert sum(cell.counter_sent) == pytest.approx(sum(cell.counter_received), abs=20_000)


RECIPE_PARAMETERS = 973_930


@needs_root
def test_no_link_is_faster_than_it_is_shaped(measured: Path) -> None:
    for cell in cells(measured):
        if cell.rate == RATE and cell.scheme == "dense":
            seconds = sum(max(step) for step in cell.seconds)
            assert seconds > 0.98 * 8 * max(cell.counted_sent) / 2e8


@needs_root
def test_every_phase_is_measured_and_split(measured: Path) -> None:
    found = cells(measured)
    assert {(cell.scheme, cell.phase) for cell in found} == {
        (COMPUTE, "dense"),
        ("dense", "dense"),
        ("bf16", "dense"),
        ("powersgd", "compressed"),
        ("lgc-ring", "dense"),
        ("lgc-ring", "warmup"),
        ("lgc-ring", "train"),
        ("lgc-ring", "compressed"),
    }
    lasting = [cell for cell in found if (cell.scheme, cell.phase) == ("lgc-ring", "compressed")]
    assert [(cell.rate, cell.repeat) for cell in lasting] == [(RATE, 0), (RATE, 1), ("unshaped", 0), ("unshaped", 1)]
    for cell in found:
        assert (cell.compression is None) == (cell.scheme in (COMPUTE, "dense", "bf16", "powersgd"))
    for row in Results.load(measured).rows:
        parts = [row.compute, row.compression or 0.0, row.communication]
        assert all(part >= 0 for part in parts)
        assert sum(parts) == pytest.approx(row.step, rel=0.5)  # medians of each


@needs_root
def test_what_is_measured_is_not_measured_again(measured: Path) -> None:
    before = (measured / RESULTS).read_bytes()
    options = [*TINY, "--schemes", "dense,bf16,powersgd,lgc-ring", "--out", str(measured)]
    again = CliRunner().invoke(main, ["bench", "link", *options, "--rates", f"{RATE},unshaped"])
    assert again.exit_code == 0, again.output
    assert (measured / RESULTS).read_bytes() == before
    assert (measured / "link.svg").read_text().startswith("<svg")
    loopback = CliRunner().invoke(main, ["bench", "link", *options, "--rates", f"{RATE},unshaped", "--loopback"])
    assert loopback.exit_code == 2
    assert "has a measurement of shaped links, this one would be over loopback" in loopback.output
    other = CliRunner().invoke(main, ["bench", "link", *options, "--rates", RATE])
    assert other.exit_code == 2
    assert "rates" in other.output


@needs_root
def test_an_interrupted_measurement_goes_on_with_the_next_link(measured: Path, tmp_path: Path) -> None:
    content = json.loads((measured / RESULTS).read_text())
    content["configuration"]["schemes"] = ["dense"]
    first = [cell for cell in content["cells"] if cell["rate"] == RATE and cell["scheme"] in (COMPUTE, "dense")]
    (tmp_path / RESULTS).write_text(json.dumps(content | {"finished": False, "cells": first}))
    schemes = ["--schemes", "dense", "--rates", f"{RATE},unshaped"]
    done = lgc("bench", "link", *TINY, *schemes, "--out", str(tmp_path))
    assert f"{RATE}, 1 of" not in done.stderr
    assert [cell._asdict() for cell in cells(tmp_path)][: len(first)] == first
    assert Results.load(tmp_path).rates == [RATE, "unshaped"]


@needs_root
def test_shaped_links_are_not_gone_on_with_over_loopback(
    measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = json.loads((measured / RESULTS).read_text())
    first = [cell for cell in content["cells"] if cell["rate"] == RATE]
    (tmp_path / RESULTS).write_text(json.dumps(content | {"finished": False, "cells": first}))
    options = [
        *TINY,
        "--schemes",
        "dense,bf16,powersgd,lgc-ring",
        "--rates",
        f"{RATE},unshaped",
        "--out",
        str(tmp_path),
    ]
    monkeypatch.setattr(command, "temporary_network", refuse)
    result = CliRunner().invoke(main, ["bench", "link", *options])
    assert result.exit_code == 2
    assert "has a measurement of shaped links to go on with" in result.output
    (tmp_path / RESULTS).write_text(
        json.dumps(content | {"finished": False, "machine": content["machine"] | {"cores": 99}})
    )
    result = CliRunner().invoke(main, ["bench", "link", *options])
    assert "has an unfinished measurement of other settings (cores: 99" in result.output


def test_loopback_says_that_the_link_is_not_shaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schemes = ["dense", "local:every=3+quantized", "local:every=4:overlap=true:fragments=2+topk:warmup_steps=9"]
    options = [*TINY, "--schemes", ",".join(schemes), "--loopback", "--out", str(tmp_path)]
    done = lgc("bench", "link", *options)
    assert "NOT SHAPED" in done.stderr
    require_whole_rounds(cells(tmp_path), schemes[1:])
    assert {(cell.rate, cell.counter_sent is None) for cell in cells(tmp_path)} == {(LOOPBACK, True)}
    assert "loopback" in done.stdout
    again = ["bench", "link", *(option for option in options if option != "--loopback")]
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with_rights = CliRunner().invoke(main, again)
    assert "has a measurement over loopback, this one would be of shaped links" in with_rights.output
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    without = CliRunner().invoke(main, again)
    assert without.exit_code == 0, without.output


def require_whole_rounds(found: list[Cell], schemes: list[str]) -> None:
    """Local steps are measured on average over all steps to the next round; their start in the first turn."""
    for scheme in schemes:
        start, *measured = [cell for cell in found if cell.scheme == scheme]
        assert (start.repeat, start.phase, start.every, len(start.seconds)) == (0, "warmup", 1, 2)
        assert [(cell.repeat, cell.phase) for cell in measured] == [(0, "compressed"), (1, "compressed")]
        for cell in measured:
            assert f"every={cell.every}" in scheme
            assert len(cell.seconds) == 1
            assert cell.compression is not None
            assert cell.communication is not None
    _, first, _ = (cell for cell in found if cell.scheme == schemes[0])
    assert RECIPE_PARAMETERS / 4 < first.counted_sent[0] < 1.2 * RECIPE_PARAMETERS / 4  # two bits each, in one round


# --- what is made of it ---


def test_shortened_phases_are_those_of_the_scheme() -> None:
    server = shortened(LGCServer(rate=0.001))
    assert isinstance(server, LGCServer)
    assert (server.dense_steps, server.warmup_steps, server.train_steps) == (2, 4, 4)
    assert (server.rate, server.refresh_below) == (0.001, 0.0)
    assert shortened(TopK()) == TopK()
    assert shortened(parse_scheme("bf16")) == parse_scheme("bf16")
    local = shortened(parse_scheme("local:every=30+topk:rate=0.02:warmup_steps=9"))
    assert local == parse_scheme("local:every=30:start_steps=0+topk:rate=0.02")


def measurement(**changes: Any) -> Measurement:
    arguments: dict[str, Any] = {
        "recipe": "digits",
        "data": None,
        "batch_size": None,
        "world_size": 2,
        "schemes": ("dense", "lgc-ring"),
        "rates": ("10mbit", "unshaped"),
        "steps": 2,
        "warm_up": 1,
        "seconds": 1.0,
        "repeats": 2,
    }
    return Measurement(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rates": ("fast",)}, "link must be a number with kbit, mbit, gbit"),
        ({"schemes": ("dgc:rate=2",)}, r"DGC\(rate=\.\.\.\) must be in \(0, 1\], got 2"),
        ({"schemes": ("dgc", "dgc")}, "dgc and dgc are the same here"),
        ({"schemes": ("dgc", "dgc:rate=0.003")}, "dgc and dgc:rate=0.003 are the same here"),
        ({"rates": ("unshaped", "10mbit", "unshaped")}, "rates must differ, got unshaped,10mbit,unshaped"),
    ],
)
def test_what_is_to_be_measured_is_checked_before_anything_starts(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measurement(**changes)


def made_up() -> Results:
    """Two links, two repeats: dense takes 3 s and 0.3 s, the phases of LGC 1 s to 4 s or a tenth of that.

    In every step another rank is late, but rank 0 alone trains the autoencoder, and sends it in the second step.
    """

    def cell(rate: str, repeat: int, scheme: str, phase: str, step: float, waits: tuple[float, float] | None) -> Any:
        late, early = step + 0.01, step - 0.01
        rows = [[step, early], [9.0, 9.0]] if phase == "train" else [[late, early], [early, late]]
        split = None if waits is None else [[0.1, 0.2]] * 2
        communication = None if waits is None else [list(waits)] * 2
        sums = [10, 10]
        of_interface = [sums, sums, [1, 1], [1, 1]]
        values: list[Any] = [rate, repeat, scheme, phase, rows, split, communication, sums, sums, *of_interface]
        return Cell(*values)._asdict()

    found = []
    for rate, factor in (("10mbit", 1.0), ("unshaped", 0.1)):
        for repeat in range(2):
            found.append(cell(rate, repeat, COMPUTE, "dense", 0.05, None))
            found.append(cell(rate, repeat, "dense", "dense", factor * (3.0 + 0.2 * repeat), None))
            for number, phase in enumerate(("dense", "warmup", "train", "compressed"), 1):
                found.append(cell(rate, repeat, "lgc-ring", phase, factor * number, (0.05, 0.02)))
    return Results(
        {
            "configuration": asdict(measurement()),
            "parameters": 1,
            "machine": {"cores": 2},
            "schemes": {"dense": "dense", "lgc-ring": "lgc-ring"},
            "cells": found,
        }
    )


def test_rows_are_medians_with_the_range_of_the_repeats() -> None:
    rows = {(row.rate, row.scheme, row.phase): row for row in made_up().rows}
    dense = rows["10mbit", "dense", "dense"]
    assert dense[3:7] == pytest.approx((3.1, 0.05, None, 3.05))
    assert dense.spread == pytest.approx(0.1)
    compressed = rows["unshaped", "lgc-ring", "compressed"]
    assert compressed[3:7] == pytest.approx((0.4, 0.4 - 0.2 - 0.02, 0.2, 0.02))  # of rank 1, which waits less
    train = rows["10mbit", "lgc-ring", "train"]
    assert train[3:7] == pytest.approx((3.0, 3.0 - 0.1 - 0.05, 0.1, 0.05))  # of rank 0, which trains
    assert (compressed.counted, compressed.headers, compressed.payload) == (10, 66, 10 - 66)


def test_bytes_are_those_of_a_step_where_a_sample_is_of_several() -> None:
    content = made_up().content
    several = [cell | {"every": 5} for cell in content["cells"]]
    for row, of_several in zip(made_up().rows, Results({**content, "cells": several}).rows, strict=True):
        assert of_several[:8] == row[:8]
        assert [5 * (size or 0) for size in of_several[8:]] == pytest.approx(row[8:])


def trained(scheme: str, phases: list[str], reached: int, seed: int = 0, **settings: Any) -> Run:
    rows: list[dict[str, Any]] = []
    for step, phase in enumerate(phases):
        rows.append({"step": step, "phase": phase})
        if step % 2:
            rows.append({"step": step, "accuracy": 99.0 if step >= reached else 50.0})
    summary = {
        "metric": {"name": "accuracy", "better": "higher"},
        "configuration": {"recipe": "digits", "world_size": 2, "batch_size": 16, "scheme": scheme, "seed": seed}
        | settings,
        "world_sizes": [[0, 2]],
    }
    return Run(Path(scheme), summary, rows)


def test_time_to_target_weighs_every_phase() -> None:
    ring = str(parse_scheme("lgc-ring", RECIPES["digits"].scheme_defaults))
    phases = ["dense"] * 2 + ["warmup"] * 2 + ["train"] * 2 + ["compressed"] * 4
    runs = [trained("dense", ["dense"] * 10, 3), trained("dense", ["dense"] * 10, 5, seed=1), trained(ring, phases, 6)]
    dense, learned = times_to_target(made_up(), runs, 98.0)
    assert (dense.scheme, dense.steps) == ("dense", 5)
    assert dense.seconds == pytest.approx([5 * 3.1, 5 * 0.31])
    assert (learned.scheme, learned.steps) == ("lgc-ring", 8)
    assert learned.seconds == pytest.approx([20, 2])  # two steps a phase, which take 1, 2, 3 and 4 s
    with pytest.raises(ValueError, match=r"runs of dense with different settings.*lr: None.*0.1"):
        times_to_target(made_up(), [*runs, trained("dense", ["dense"] * 10, 3, seed=2, lr=0.1)], 98.0)
    never = times_to_target(made_up(), [trained("dense", ["dense"] * 10, 99, seed=2), *runs], 98.0)
    assert (never[0].steps, never[0].seconds) == (None, [None, None])
    with pytest.raises(ValueError, match="no finished run of lgc-ring"):
        times_to_target(made_up(), runs[:2], 98.0)


def test_target_and_runs_go_together(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["bench", "link", "--target", "98", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "--target and --runs go together" in result.output
