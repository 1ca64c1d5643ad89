"""Time to a target: steps of finished training runs, weighed by what each takes on a link."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from lgc import Dense, parse_scheme
from lgc_lab.bench.link.results import Results
from lgc_lab.recipes import find_recipe
from lgc_lab.report.runs import Run
from lgc_lab.terminal import aligned


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
        found = _runs_of(runs, results, scheme)
        if not found:
            raise ValueError(f"no finished run of {results.content['schemes'][scheme]} is among those of --runs.")
        phases = [_phases_to_target(run, target) for run in found]
        for rate in results.rates:
            if any(counts is None for counts in phases):
                times.append(TimeToTarget(rate, scheme, None, None))
                continue
            reached = [counts for counts in phases if counts is not None]
            steps = statistics.mean(sum(counts.values()) for counts in reached)
            seconds = statistics.mean(
                sum(number * _step_of_phase(results, rate, scheme, phase) for phase, number in counts.items())
                for counts in reached
            )
            times.append(TimeToTarget(rate, scheme, steps, seconds))
    return times


def _runs_of(runs: Sequence[Run], results: Results, scheme: str) -> list[Run]:
    """Those of the measured model with a scheme, one of each seed.

    Raises:
        ValueError: if they differ in more than their seeds.
    """
    found = [run for run in runs if _is_run_of(run, results, scheme)]
    for run in found[1:]:
        for field in found[0].conditions | run.conditions:
            here, there = found[0].conditions.get(field), run.conditions.get(field)
            if here != there:
                raise ValueError(
                    f"--runs has runs of {scheme} with different settings, {found[0].folder} ({field}: {here!r}) and "
                    f"{run.folder} ({there!r}): name a folder with one of them."
                )
    return list({run.configuration["seed"]: run for run in reversed(found)}.values())


def _is_run_of(run: Run, results: Results, scheme: str) -> bool:
    here, there = results.configuration, run.configuration
    recipe = find_recipe(here["recipe"])
    same = all(there[name] == here[name] for name in ("recipe", "world_size"))
    batch_size = here["batch_size"] or recipe.batch_size
    wanted = str(parse_scheme(scheme, recipe.scheme_defaults))
    return same and there["batch_size"] == batch_size and there["scheme"] == wanted


def _phases_to_target(run: Run, target: float) -> dict[str, int] | None:
    """Steps by phase until the target was first reached."""
    counts: dict[str, int] = {}
    for row in run.rows:
        if "phase" in row:
            counts[row["phase"]] = counts.get(row["phase"], 0) + 1
        value = row.get(run.metric)
        if value is not None and (value >= target if run.better == "higher" else value <= target):
            return counts
    return None


def _step_of_phase(results: Results, rate: str, scheme: str, phase: str) -> float:
    """Seconds; an uncompressed start that was not measured takes what plain DDP takes."""
    for name in (scheme, Dense.name):
        for row in results.rows:
            if (row.rate, row.scheme, row.phase) == (rate, name, phase):
                return row.split.step
    raise ValueError(f"{scheme} was not measured in phase {phase}; add dense to --schemes.")


def format_times(results: Results, times: Sequence[TimeToTarget], target: float) -> str:
    """Steps and seconds to the target as an aligned table, a column a link."""
    lines = []
    for scheme in results.schemes:
        of_scheme = [each for each in times if each.scheme == scheme]
        steps = of_scheme[0].steps
        seconds = ["-" if each.seconds is None else f"{each.seconds:,.1f}" for each in of_scheme]
        lines.append([scheme, "never" if steps is None else f"{steps:.0f}", *seconds])
    header = [f"seconds to {target:g}", "steps", *results.rates]
    return aligned([header, *lines])
