"""`lgc bench link`: measure on a temporary network, and print, weigh and draw what came out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import click

from lgc.comm.transport import MOST_TIMEOUT
from lgc_lab import options
from lgc_lab.bench.link.measure import Measurement, machine, measure_links
from lgc_lab.bench.link.results import LOOPBACK, RESULTS, Results, bits_per_second, delay_of
from lgc_lab.bench.link.target import TimeToTarget, format_times, times_to_target
from lgc_lab.folder import OtherRunError, occupied, require_same, write_whole
from lgc_lab.launch.network import Network, NetworkError, temporary_network
from lgc_lab.report.runs import find_runs
from lgc_lab.terminal import notify

PICTURE = "link.svg"
SCHEMES = "dense,bf16,powersgd:rank=1,powersgd:rank=2,powersgd:rank=4,dgc,scalecom,lgc-ring,lgc-ps"


@click.command()
@options.recipe(default="digits")
@options.data
@options.batch_size
@click.option("--workers", "world_size", type=click.IntRange(2), default=4, help="Number of ranks.")
@click.option("--schemes", default=SCHEMES, help="As for lgc compare.")
@click.option(
    "--rates", default="10mbit,100mbit,1gbit,unshaped", help="Speeds of the links; 1gbit/20ms has a delay each way."
)
@click.option("--steps", type=click.IntRange(1), default=20, help="Steps measured in a turn, at most.")
@click.option("--warm-up", type=click.IntRange(1), default=2, help="Steps before these, which do not count.")
@click.option("--seconds", type=options.Finite(0.001), default=5.0, help="Seconds measured in a turn, at most.")
@click.option("--repeats", type=click.IntRange(1), default=3, help="Turns of every scheme on every link.")
@click.option("--loopback", is_flag=True, help="No network of its own, and no root: the link is not shaped.")
@click.option("--timeout", type=options.Finite(1, MOST_TIMEOUT), default=600.0, help="Seconds for which a rank waits.")
@click.option("--target", type=float, help="Value of the recipe's metric to reach; needs --runs.")
@click.option("--runs", type=options.EXISTING_FOLDER, help="Folder of lgc compare with a finished run of each scheme.")
@options.out
@options.measure_again
def link(
    target: float | None, runs: Path | None, loopback: bool, timeout: float, out: Path, overwrite: bool, **run: Any
) -> None:
    """Measure what a step costs on slow links.

    \b
    lgc bench link --recipe digits --workers 4 --rates 10mbit,100mbit --out runs/link
    lgc compare --recipe digits --workers 4 --schemes dense,dgc --out runs/digits
    lgc bench link ... --out runs/link --runs runs/digits --target 98

    Needs root: every rank gets a network namespace of its own, joined by a bridge to the others, and its link is
    limited in both directions. They are removed at the end; nothing else of the machine's network is touched. Without
    root, or with --loopback, the ranks talk over loopback, which is not limited.

    OUT gets results.json with all samples, and link.svg. A link that has been measured is not measured again. With
    --target, the steps that the training runs in --runs needed are weighed by the time they take on each link.
    """
    options.refuse_torchrun("bench link")
    if (target is None) != (runs is None):
        raise click.UsageError("--target and --runs go together.")
    run |= {name: options.split(run[name]) for name in ("schemes", "rates")}
    with options.usage_errors():
        wanted = Measurement(**run)
    with options.reported_errors():
        with occupied(out):
            there = None if overwrite else _find(out, wanted, loopback=loopback)
            if there is None or not there.finished:
                with _network(wanted.world_size, loopback) as network:
                    if there and network is None:
                        message = "has a measurement of shaped links to go on with; choose another --out."
                        raise OtherRunError(f"{out} {message}")
                    measure_links(wanted, out, network, timedelta(seconds=timeout), there.cells if there else ())
        results = Results.load(out)
        click.echo(results.text())
        times: list[TimeToTarget] = []
        if runs is not None and target is not None:
            times = times_to_target(results, find_runs([runs]), target)
            click.echo(f"\n{format_times(results, times, target)}")
        _write_picture(results, times, target, out / PICTURE)
    click.echo(f"\n{out / PICTURE}")


def _find(folder: Path, wanted: Measurement, *, loopback: bool) -> Results | None:
    """Find what the folder has of this measurement, on the same kind of link. Raises OtherRunError for another one."""
    if not (folder / RESULTS).exists():
        return None
    try:
        results = Results.load(folder, unfinished=True)
    except ValueError as error:
        raise ValueError(f"{error} --overwrite starts anew.") from None
    require_same(results.configuration, asdict(wanted), f"{folder} has a measurement")
    if not results.finished:
        require_same(results.content["machine"], machine(), f"{folder} has an unfinished measurement")
    over_loopback = results.rates == [LOOPBACK]
    if over_loopback and os.geteuid() != 0:  # who has to do without a network
        return results
    if over_loopback != loopback:
        kinds = ("of shaped links", "over loopback")
        raise OtherRunError(
            f"{folder} has a measurement {kinds[over_loopback]}, this one would be {kinds[loopback]}: choose another "
            "--out, --loopback or --overwrite."
        )
    return results


@contextmanager
def _network(world_size: int, loopback: bool) -> Iterator[Network | None]:
    """Set up a network, or give None and a note where there is to be or can be none."""
    with ExitStack() as stack:
        network = None
        try:
            network = None if loopback else stack.enter_context(temporary_network(world_size))
        except NetworkError as error:
            notify(f"NOTE: shaped links need root, Linux and iproute2. {error}")
        if network is None:
            notify("NOTE: the link is NOT SHAPED: all ranks talk over loopback, and --rates is ignored.")
        yield network


def _write_picture(results: Results, times: Sequence[TimeToTarget], target: float | None, path: Path) -> None:
    """Time a step, and to the target if there is one, against the speed of the link without delays, as SVG."""
    from lgc_lab.report.figures import Curves, draw_against_links  # here, because most commands need no matplotlib

    rates = [rate for rate in results.rates if not delay_of(rate)] or results.rates
    ms: Curves = {name: [1e3 * results.lasting(rate, name).step for rate in rates] for name in results.schemes}
    panels = {"ms a step": ms}
    if times:
        places = [results.rates.index(rate) for rate in rates]
        panels[f"seconds to {target:g}"] = {each.scheme: [each.seconds[place] for place in places] for each in times}
    name = f"{results.configuration['recipe']} links"
    write_whole(path, draw_against_links(name, [bits_per_second(rate) for rate in rates], panels))
