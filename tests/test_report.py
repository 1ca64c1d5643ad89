"""What the report predicts for links, and what a page opens with, on runs as their folders have them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from lgc.choice.cost import PAYLOAD
from lgc_lab.report.figures import wrapped
from lgc_lab.report.opening import draw_opening
from lgc_lab.report.report import write_report
from lgc_lab.report.runs import Line, Run, by_recipe

LINK = 10e6
SECOND = PAYLOAD * LINK / 8  # bytes that pass in a second on that link
STEPS = 10  # an evaluation


def recorded(
    scheme: str, moved: float, *values: float, step: float = 1.0, better: str = "higher", **conditions: Any
) -> Run:
    """A run whose steps took `step` seconds and moved so many seconds' bytes on LINK, with these evaluations."""
    rows: list[dict[str, Any]] = []
    for number, value in enumerate(values, 1):
        moved_bytes = {"rank0_sent_bytes": number * STEPS * moved * SECOND, "rank0_received_bytes": 1}
        rows += [
            {"step": STEPS * number - 1, "loss": 1.0} | moved_bytes,
            {"step": STEPS * number - 1, "accuracy": value},
        ]
    sums = {"sent_bytes": 1, "received_bytes": 1, "ratio": 1.0, "ratio_compressed_phase": None}
    phases = [{"name": "compressed", "steps": 1, "sent_bytes": 1, "received_bytes": 1}]
    configuration = {"recipe": "digits", "scheme": scheme, "seed": 0, "world_size": 4, "batch_size": 16} | conditions
    summary = {
        **{"recipe": "digits", "scheme": scheme, "label": scheme, "steps": STEPS * len(values), "parameters": 1},
        **{"world_size": 4, "world_sizes": [[0, 4]], "configuration": configuration},
        "wire": sums | {"paper": {"ratio_compressed_phase": None}, "phases": phases},
        "metric": {"name": "accuracy", "value": values[-1], "better": better},
        "time": {"started": "", "wall_s": 1.0, "train_s": step * STEPS * len(values)},
        "versions": {"lgc": "0", "torch": "0"},
    }
    return Run(Path(scheme), summary, rows)


def lines(*runs: Run) -> list[Line]:
    (found,) = by_recipe(runs).values()
    return found


DENSE = recorded("dense", 9.0, 80, 98.0, 99.0)


def test_a_step_takes_the_median_time_of_all_schemes_and_that_of_its_bytes_on_the_link() -> None:
    dense, dgc, topk = lines(DENSE, recorded("dgc", 0.5, 90, step=2.0), recorded("topk", 0.0, 90, step=7.0))
    row = {"step": 9, "rank0_sent_bytes": 5 * SECOND, "rank0_received_bytes": 8 * SECOND}
    for line in (dense, dgc, topk):
        assert line.seconds(row, LINK) == pytest.approx(10 * 2.0 + 8)
        assert line.seconds(row, 10 * LINK) == pytest.approx(10 * 2.0 + 0.8)


def test_runs_that_compute_something_else_have_a_time_of_a_step_of_their_own() -> None:
    of = lines(DENSE, recorded("dgc", 0.0, 90, step=3.0), recorded("dgc", 0.0, 90, step=8.0, batch_size=64))
    assert [line.step_seconds for line in of] == [2, 2, 8]
    of = lines(DENSE, recorded("dense", 9.0, 90, step=3.0, learning_rate=0.1))
    assert [line.step_seconds for line in of] == [2, 2]


def test_a_target_is_reached_where_it_is_kept_to_the_end() -> None:
    (line,) = lines(recorded("dgc", 1.0, 90, 99, 90, 98.5, 99))
    assert line.seconds_to(98.5, LINK) == pytest.approx(4 * STEPS * 2)
    assert line.seconds_to(99.5, LINK) is None
    (line,) = lines(recorded("dgc", 1.0, 99, math.nan, 99, better="higher"))
    assert line.seconds_to(98.5, LINK) == pytest.approx(3 * STEPS * 2)


def test_of_several_seeds_the_mean_is_to_reach_the_target() -> None:
    (line,) = lines(recorded("dgc", 1.0, 90, 98, 98), recorded("dgc", 3.0, 90, 100, 98, seed=1))
    assert line.seconds_to(99, LINK) is None
    assert line.seconds_to(98, LINK) == pytest.approx(2 * STEPS * 3)


def test_the_opening_compares_dense_with_the_fastest_other_on_the_slowest_links() -> None:
    opening = draw_opening(
        lines(DENSE, recorded("dgc", 0.0, 98.6, 98.6), recorded("topk", 1.0, 98.6)), [1e9, 1e8, LINK]
    )
    assert opening is not None
    goal = "accuracy 98.5"
    assert opening["sentence"] == (
        f"On 10 Mbit/s, dgc reaches {goal} in 10 s, dense in 300 s; on 100 Mbit/s, dgc in 10 s, dense in 57 s."
    )
    assert opening["caption"].startswith(
        "Time until accuracy 98.5, within 0.5 % of what dense ends with, is reached and kept."
    )
    assert opening["svg"].startswith("<svg")
    assert "1 Gbit/s" not in opening["svg"]


def test_where_dense_is_the_fastest_the_opening_says_so() -> None:
    opening = draw_opening(lines(DENSE, recorded("dgc", 0.0, 90, 90, 90, 99)), [1e12])
    assert opening is not None
    assert opening["sentence"] == "On 1 Tbit/s, dense reaches accuracy 98.5 in 30 s, dgc in 40 s."


def test_the_opening_takes_the_best_of_several_dense_and_the_metric_that_falls() -> None:
    runs = [
        recorded("dense", 9.0, 3.0, 2.0, better="lower", learning_rate=0.1),
        recorded("dense", 9.0, 3.0, 1.6, better="lower", learning_rate=0.2),
        recorded("local+quantized", 0.0, 1.7, 1.608, better="lower", learning_rate=0.2),
    ]
    opening = draw_opening(lines(*runs), [LINK])
    assert opening is not None
    assert opening["sentence"] == (
        "On 10 Mbit/s, local+quantized, learning_rate=0.2 reaches accuracy 1.608 in 20 s, dense, learning_rate=0.2 in "
        "200 s."
    )


def test_the_opening_has_the_fastest_others_of_each_link_and_names_those_that_do_not_get_there() -> None:
    others = [recorded(f"dgc:rate=0.{i}", i / 10, 99) for i in range(1, 6)]
    few_steps = recorded("topk", 3.0, 99)
    late = recorded("scalecom", 0.0, 90, 90)
    opening = draw_opening(lines(DENSE, late, few_steps, *others), [LINK, 1e9])
    assert opening is not None
    assert "The fastest 4 of 7 others. Not reached by scalecom." in opening["caption"]
    assert "rate=0.1" in opening["svg"]
    assert "rate=0.5" not in opening["svg"]


@pytest.mark.parametrize(
    ("runs", "links"),
    [
        ([DENSE], [LINK]),
        ([DENSE, recorded("dgc", 0.0, 98.0)], [LINK]),
        ([recorded("topk", 1.0, 99), recorded("dgc", 0.0, 99)], [LINK]),
        ([recorded("dense", 1.0, math.nan), recorded("dgc", 0.0, 99)], [LINK]),
        ([DENSE, recorded("dgc", 0.0, 99)], []),
    ],
    ids=["one arm", "none gets there", "no dense", "dense has diverged", "no link"],
)
def test_a_page_where_nothing_is_to_be_compared_has_no_opening(
    runs: list[Run], links: list[float], tmp_path: Path
) -> None:
    write_report(runs, tmp_path / "page.html", links)
    assert '<figure class="opening">' not in (tmp_path / "page.html").read_text()


def test_the_page_opens_with_the_comparison(tmp_path: Path) -> None:
    write_report([DENSE, recorded("local+quantized", 0.0, 99)], tmp_path / "page.html", [LINK])
    page = (tmp_path / "page.html").read_text()
    assert page.index("On 10 Mbit/s, local+quantized reaches") < page.index("<svg") < page.index("<table>")


def test_labels_of_local_steps_break_before_the_exchange() -> None:
    assert wrapped("local:every=50:start_steps=15+quantized:bits=2", 30) == (
        "local:every=50:start_steps=15+\nquantized:bits=2"
    )
