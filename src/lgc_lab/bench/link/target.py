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
    """Seconds until a run's evaluation first reached the target, on one link; None where it never did."""

    rate: str
    scheme: str
    steps: float | None
    seconds: float | None


def times_to_target(results: Results, runs: Sequence[Run], target: float) -> list[TimeToTarget]:
    """Steps of finished training runs until the target, each at the time of its phase; the mean over seeds.

    What a run learns does not depend on the link, so a run is trained once, anywhere, and its steps are weighed by what
    was measured on each link. Evaluations are left out. Where one seed never gets there, there is no time.

    Raises:
        ValueError: if a scheme has no run with the settings of the measurement, or several that differ in more than
            their seeds.
    """
    times = []
    for scheme in results.schemes:
        seeds = [_steps_to_target(run, target) for run in _runs_of(runs, results, scheme)]
        reached = [counts for counts in seeds if counts is not None]
        for rate in results.rates:
            if len(reached) < len(seeds):
                times.append(TimeToTarget(rate, scheme, None, None))
                continue
            seconds = mean(
                sum(number * _step_of_phase(results, rate, scheme, phase) for phase, number in counts.items())
                for counts in reached
            )
            times.append(TimeToTarget(rate, scheme, mean(map(Counter.total, reached)), seconds))
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
    return list({run.configuration["seed"]: run for run in reversed(found)}.values())


def _steps_to_target(run: Run, target: float) -> Counter[str] | None:
    """Steps by phase until the target was first reached."""
    for number, row in enumerate(run.rows, 1):
        value = row.get(run.metric)
        if value is not None and (value >= target if run.better == "higher" else value <= target):
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
    """Steps and seconds to the target as an aligned table, a column a link."""
    lines = []
    for scheme in results.schemes:
        of_scheme = [each for each in times if each.scheme == scheme]
        steps = "never" if of_scheme[0].steps is None else f"{of_scheme[0].steps:.0f}"
        lines.append([scheme, steps, *("-" if each.seconds is None else f"{each.seconds:,.1f}" for each in of_scheme)])
    return aligned([[f"seconds to {target:g}", "steps", *results.rates], *lines])
