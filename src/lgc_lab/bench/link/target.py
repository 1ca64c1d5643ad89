"""Time to a target: steps of finished training runs, weighed by what each takes on a link."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import mean
from typing import NamedTuple

from lgc import Dense
from lgc_lab.bench.link.results import Results
from lgc_lab.report.runs import Run
from lgc_lab.terminal import aligned
from lgc_lab.training.settings import Settings


class TimeToTarget(NamedTuple):
    """Steps, and seconds by link, until a scheme's evaluation first reached the target; None where it never did."""

    scheme: str
    steps: float | None
    seconds: list[float | None]


def times_to_target(results: Results, runs: Sequence[Run], target: float) -> list[TimeToTarget]:
    """Steps of finished training runs until the target, each at the time of its phase; the mean over seeds.

    What a run learns does not depend on the link, so a run is trained once, anywhere, and its steps are weighed by what
    was measured on each link. Evaluations are left out. Where one seed never gets there, there is no time. Raises
    ValueError if a scheme has no run with the settings of the measurement, or several that differ beyond their seeds.
    """
    times = []
    for scheme in results.schemes:
        seeds = [_steps_to_target(run, target) for run in _runs_of(runs, results, scheme)]
        reached = [counts for counts in seeds if counts is not None]
        if len(reached) < len(seeds):
            times.append(TimeToTarget(scheme, None, [None] * len(results.rates)))
            continue
        steps = {phase: mean(counts[phase] for counts in reached) for counts in reached for phase in counts}
        seconds: list[float | None] = [
            sum(number * _step_of_phase(results, rate, scheme, phase) for phase, number in steps.items())
            for rate in results.rates
        ]
        times.append(TimeToTarget(scheme, sum(steps.values()), seconds))
    return times


def _runs_of(runs: Sequence[Run], results: Results, scheme: str) -> list[Run]:
    """Find the runs of the measured model with a scheme, one of each seed."""
    asked = {name: results.configuration[name] for name in ("recipe", "world_size", "batch_size")}
    resolved = Settings(scheme=scheme, **asked).configuration()
    wanted = {name: resolved[name] for name in ("scheme", *asked)}
    found = [run for run in runs if wanted.items() <= run.configuration.items()]
    if not found:
        raise ValueError(f"no finished run of {results.content['schemes'][scheme]} is among those of --runs.")
    for run in found[1:]:
        for field in found[0].conditions | run.conditions:
            here, there = found[0].conditions.get(field), run.conditions.get(field)
            if here != there:
                raise ValueError(
                    f"--runs has runs of {scheme} with different settings, {found[0].folder} ({field}: {here!r}) and "
                    f"{run.folder} ({there!r}): name a folder with one of them."
                )
    return found


def _steps_to_target(run: Run, target: float) -> Counter[str] | None:
    """Steps by phase until the target was first reached."""
    for number, row in enumerate(run.rows, 1):
        value = row.get(run.metric)
        if value is not None and run.is_as_good(value, target):
            return Counter(step["phase"] for step in run.rows[:number] if "phase" in step)
    return None


def _step_of_phase(results: Results, rate: str, scheme: str, phase: str) -> float:
    """Seconds; an uncompressed start that was not measured takes what plain DDP takes."""
    for name in (scheme, Dense.name):
        for row in results.rows:
            if (row.rate, row.scheme, row.phase) == (rate, name, phase):
                return row.step
    raise ValueError(f"{scheme} was not measured in phase {phase}; add dense to --schemes.")


def format_times(results: Results, times: Sequence[TimeToTarget], target: float) -> str:
    """Format steps and seconds to the target as an aligned table, a column a link."""
    table = [[f"seconds to {target:g}", "steps", *results.rates]]
    for scheme, steps, seconds in times:
        cells = ("-" if value is None else f"{value:,.1f}" for value in seconds)
        table.append([scheme, "never" if steps is None else f"{steps:.0f}", *cells])
    return aligned(table)
