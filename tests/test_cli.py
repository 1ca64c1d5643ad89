"""The command line as a user meets it: real ranks, the embedded digits, processes where they are what is tested."""

from __future__ import annotations

import html
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from ranks import Ranks
from runs import LGC, LIMIT_S, is_running, lgc, rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from lgc_lab.cli import main
from lgc_lab.report.figures import _mean_by_step, _smoothed
from lgc_lab.report.report import format_table, write_report
from lgc_lab.report.runs import Run, by_recipe, find_runs
from lgc_lab.training.loop import Training
from lgc_lab.training.settings import Output, Settings
from lgc_lab.training.train import train

SHORT = ["--recipe", "digits", "--workers", "2", "--steps", "30", "--batch-size", "8"]
LOCAL = "local:every=4:start_steps=6+quantized:bits=2"
RING = "lgc-ring:rate=0.001:dense_steps=3:warmup_steps=5:train_steps=10"  # a rate that is the default, but not digits'


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def exists(process_group: int) -> bool:
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return any(is_running(pid, of_group=process_group) for pid in pids)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison of three schemes."""
    out = tmp_path_factory.mktemp("compared")
    done = lgc("compare", *SHORT, "--schemes", f"dense,{RING},{LOCAL}", "--tensorboard", "--out", str(out))
    assert re.search(r"^dense +[\d.]+ +1 +[\d.,]+ +1\.0 +- +- +\d+ s$", done.stdout, re.MULTILINE), done.stdout
    for scheme in (RING, LOCAL):
        assert re.search(rf"^{re.escape(scheme)} +[\d.]+ +1 +", done.stdout, re.MULTILINE), done.stdout
    return out


def test_compare_writes_a_summary_of_every_run(compared: Path) -> None:
    dense, ring = (read(compared / name / "summary.json") for name in ("dense", RING.replace(":", ",")))
    for summary in (dense, ring):
        assert {"recipe": "digits", "world_size": 2, "seed": 0, "steps": 30}.items() <= summary.items()
        assert summary["metric"]["name"] == "accuracy"
        assert 0 <= summary["metric"]["value"] <= 100
        assert summary["time"]["wall_s"] > 0
        wire = summary["wire"]
        for direction in ("sent_bytes", "received_bytes"):
            assert wire[direction] == sum(phase[direction] for phase in wire["phases"])
        assert wire["max_rank_bytes"] >= (wire["sent_bytes"] + wire["received_bytes"]) / 2
    assert dense["scheme"] == "dense"
    assert ring["scheme"] == "lgc-ring"
    assert dense["wire"]["ratio"] == pytest.approx(1, rel=1e-3)
    assert dense["wire"]["ratio_compressed_phase"] is None
    fp32 = 30 * 2 * 2 * 4 * ring["parameters"]  # 30 steps; 2 (K - 1) buffers in all each way
    assert ring["wire"]["ratio"] == pytest.approx(fp32 / (ring["wire"]["sent_bytes"] + ring["wire"]["received_bytes"]))
    assert ring["wire"]["ratio_compressed_phase"] > 50
    assert {p["name"]: p["steps"] for p in ring["wire"]["phases"]} == {
        "setup": 0,
        "dense": 3,
        "warmup": 5,
        "train": 10,
        "compressed": 12,
    }


def test_the_parts_of_a_round_are_measured_beside_a_copy() -> None:
    options = ["--parameters", "10000", "--repeats", "1", "--schemes", "dgc,quantized:reduction=two_stage"]
    result = CliRunner().invoke(main, ["bench", "round", *options], catch_exceptions=False)
    _, *rows = result.output.splitlines()
    assert [row.split()[0] for row in rows] == ["dgc", "quantized:reduction=two_stage"]
    for row in rows:
        *parts, whole, _ = map(float, row.split()[1:])
        assert whole == pytest.approx(sum(parts), abs=0.05)  # rounded
    refused = CliRunner().invoke(main, ["bench", "round", "--schemes", "powersgd"])
    assert refused.exit_code == 2
    assert "bench round measures schemes with rounds of their own, and powersgd has none." in refused.output


def test_a_run_of_local_steps_is_compared_like_the_others(compared: Path) -> None:
    folder = compared / LOCAL.replace(":", ",")
    summary = read(folder / "summary.json")
    assert (summary["scheme"], summary["label"]) == ("local", LOCAL)
    assert {p["name"]: p["steps"] for p in summary["wire"]["phases"]} == {"setup": 0, "warmup": 6, "compressed": 24}
    received = [row["rank0_received_bytes"] for row in rows(folder) if "loss" in row]
    exchanged = [step for step, (a, b) in enumerate(pairwise(received), 1) if a < b]
    assert exchanged == [*range(1, 6), 6, *range(9, 30, 4)]  # the start, where all begin, and the rounds


def test_metrics_have_a_row_for_every_step_and_evaluation(compared: Path) -> None:
    of_ring = rows(compared / RING.replace(":", ","))
    assert [row["step"] for row in of_ring if "loss" in row] == list(range(30))
    assert [row["step"] for row in of_ring if "accuracy" in row] == [29]
    assert [row["step"] for row in of_ring if "autoencoder_loss" in row] == list(range(8, 18))
    assert [row["step"] for row in of_ring if "reconstruction_error" in row] == list(range(18, 30))
    sent = [row["rank0_sent_bytes"] for row in of_ring if "loss" in row]
    assert sent == sorted(sent)
    assert sent[0] > 0


def test_the_report_is_one_page_that_needs_nothing_else(compared: Path) -> None:
    page = (compared / "report.html").read_text()
    external: list[str] = []

    class Page(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            external.extend(f"{tag} {v}" for k, v in attrs if k in ("src", "href") and v and not v.startswith("#"))

    Page().feed(page)
    assert external == []
    assert re.findall(r"<h3>(.*?)</h3>", page) == [
        "Against steps",
        "Against bytes",
        *(f"Against time on a link of {speed}" for speed in ("10 Mbit/s", "100 Mbit/s", "1 Gbit/s")),
        "Bytes by phase",
        "Loss of the autoencoder",
        "What the autoencoder loses",
        "To repeat these runs",
    ]
    assert "lgc train --recipe=digits --scheme=dense" in page


def test_the_commands_of_the_report_are_the_runs(compared: Path) -> None:
    page = html.unescape((compared / "report.html").read_text())
    commands = re.findall(r"^(?:<pre>)?(lgc train .*) --out=OUT$", page, re.MULTILINE)
    assert len(commands) == 3
    for command, folder in zip(commands, ("dense", RING.replace(":", ","), LOCAL.replace(":", ",")), strict=True):
        result = CliRunner().invoke(main, [*shlex.split(command)[1:], "--out", str(compared / folder)])
        assert f"{compared / folder}: finished before" in result.output


def changed(run: Run, folder: str, **configuration: Any) -> Run:
    """The same run with other settings."""
    return replace(
        run, folder=Path(folder), summary={**run.summary, "configuration": run.configuration | configuration}
    )


def test_lines_of_the_report_that_differ_are_told_apart(compared: Path) -> None:
    dense, ring, _ = find_runs([compared])
    other_seed = changed(dense, "a", seed=1)
    (lines,) = by_recipe([dense, ring, other_seed]).values()
    assert [(line.label, len(line.runs)) for line in lines] == [("dense", 2), (RING, 1)]
    larger = changed(dense, "b", batch_size=16, bf16=True)
    (lines,) = by_recipe([dense, larger]).values()
    assert [line.label for line in lines] == ["dense, batch_size=8, bf16=False", "dense, batch_size=16, bf16=True"]
    rate = changed(dense, "c", scheme="dense:rate=1")
    (lines,) = by_recipe([dense, rate]).values()
    assert [line.label for line in lines] == ["dense", "dense:rate=1"]


def test_the_report_says_which_run_it_leaves_out_as_a_repetition(compared: Path, tmp_path: Path) -> None:
    shutil.copytree(compared / "dense", tmp_path / "again")
    result = CliRunner().invoke(main, ["report", str(compared), str(tmp_path), "--out", str(tmp_path / "page.html")])
    assert f"WARNING: left out: {tmp_path / 'again'} has the settings and the seed of a run before it." in result.output


def test_a_comparison_reports_the_runs_that_were_asked_for_alone(compared: Path, tmp_path: Path) -> None:
    shutil.copytree(compared, tmp_path / "runs")
    shutil.copytree(compared / "dense", tmp_path / "runs" / "dense" / "seed-1")
    arguments = shlex.split(Run.load(compared / "dense").command)[2:-1]
    arguments = [each for each in arguments if not each.startswith(("--scheme", "--seed"))]
    result = CliRunner().invoke(main, ["compare", *arguments, "--schemes=dense", "--out", str(tmp_path / "runs")])
    assert result.exit_code == 0, result.output
    assert re.search(r"^dense +[\d.]+ +1 ", result.output, re.MULTILINE)


def test_a_diverged_run_is_in_the_table_and_on_the_page(compared: Path, tmp_path: Path) -> None:
    dense, *_ = find_runs([compared])
    diverged = changed(dense, "diverged", seed=1)
    diverged.summary.update(metric=dense.summary["metric"] | {"value": math.nan})
    assert re.search(r"^dense +nan ± nan +2 ", format_table([dense, diverged]), re.MULTILINE)
    write_report([dense, diverged], tmp_path / "page.html")
    assert "nan ± nan" in (tmp_path / "page.html").read_text()


def test_no_command_is_given_for_a_run_whose_number_of_ranks_changed(compared: Path) -> None:
    dense, *_ = find_runs([compared])
    resized = replace(dense, summary=dense.summary | {"world_sizes": [[0, 2], [12, 3]]})
    assert resized.command.startswith("# no command repeats")
    assert "2 from step 0 on, 3 from step 12 on" in resized.command


def test_means_over_seeds_have_a_gap_where_a_seed_has_none() -> None:
    gap = math.nan
    xs, ys = _mean_by_step([_smoothed(([1, 2, 7], [1.0, 3.0, 4.0]))])
    assert xs == [1, 2, 3, 7]
    assert ys == pytest.approx([1, 2, gap, 4], nan_ok=True)
    xs, ys = _mean_by_step([([1, 2, 3, 6], [1.0, 2.0, 3.0, gap]), ([1, 2, 5, 6], [3.0, 4.0, gap, 5.0])])
    assert xs == [1, 2, 3, 5, 6]
    assert ys == pytest.approx([2, 3, gap, gap, gap], nan_ok=True)


def test_schemes_that_are_the_same_are_refused(tmp_path: Path) -> None:
    arguments = ["compare", *SHORT, "--schemes", "dense,dgc,dgc:rate=0.003", "--out", str(tmp_path / "new")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "digits: schemes must differ, and dgc and dgc:rate=0.003 are the same here" in result.output
    assert not (tmp_path / "new").exists()


def test_compare_is_refused_under_torchrun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(main, ["compare", *SHORT, "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "compare starts its own ranks, on one machine; torchrun is for lgc train and plan" in result.output


def test_overwrite_removes_nothing_before_the_data_is_there(compared: Path, tmp_path: Path) -> None:
    shutil.copytree(compared / "dense", tmp_path / "run")
    arguments = ["train", *SHORT, "--scheme", "dense", "--overwrite", "--data", "typo", "--out", str(tmp_path / "run")]
    assert CliRunner().invoke(main, arguments).exit_code == 1
    assert (tmp_path / "run" / "summary.json").exists()


def test_the_table_says_which_way_is_better(compared: Path) -> None:
    (dense, *_) = find_runs([compared])
    assert "accuracy ↑" in format_table([dense])
    metric = dense.summary["metric"] | {"name": "bits_per_byte", "better": "lower"}
    assert "bits_per_byte ↓" in format_table([replace(dense, summary=dense.summary | {"metric": metric})])


def test_the_report_has_a_figure_for_every_link(compared: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    arguments = ["report", str(compared), "--out", str(page), "--link", "2.5mbit", "--link", "1Gbit"]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert re.findall(r"<h3>Against time on a link of (.*)</h3>", page.read_text()) == ["2.5 Mbit/s", "1 Gbit/s"]
    for text in ("fast", "10", "0mbit", "1e3mbit"):
        result = CliRunner().invoke(main, ["report", str(compared), "--link", text])
        assert result.exit_code == 2
        assert "link must be" in result.output
        assert f"got {text!r}" in result.output


def test_a_comparison_goes_on_where_it_was(compared: Path) -> None:
    before = (compared / "dense" / "summary.json").stat().st_mtime_ns
    done = lgc("compare", *SHORT, "--schemes", "dense", "--seeds", "2", "--out", str(compared))
    assert "finished before" in done.stderr
    assert (compared / "dense" / "summary.json").stat().st_mtime_ns == before
    assert read(compared / "dense" / "seed-1" / "summary.json")["seed"] == 1
    assert re.search(r"^dense +[\d.]+ ± [\d.]+ +2 ", done.stdout, re.MULTILINE)


def test_a_finished_run_of_other_settings_is_not_overwritten(compared: Path) -> None:
    before = (compared / "dense" / "summary.json").read_bytes()
    arguments = ["train", *SHORT, "--scheme", "dense", "--epochs", "3", "--out", str(compared / "dense")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "epochs: 24, now 3" in result.output
    assert (compared / "dense" / "summary.json").read_bytes() == before


def test_events_for_tensorboard_have_what_the_metrics_have(compared: Path) -> None:
    events = EventAccumulator(str(compared / RING.replace(":", ",") / "tensorboard"))
    events.Reload()
    for name, steps in {"loss": range(30), "accuracy": [29], "autoencoder_loss": range(8, 18)}.items():
        assert [event.step for event in events.Scalars(name)] == list(steps)
    assert {"lr", "rank0_sent_bytes", "sent_bytes", "reconstruction_error"} <= set(events.Tags()["scalars"])


def train_with_a_seed_of_its_own(rank: int, world_size: int, out: Path) -> None:
    settings = Settings(recipe="digits", scheme="dense", world_size=world_size, seed=5 * rank)
    train(settings, Output(folder=out), torch.device("cpu"))


def test_ranks_that_were_given_other_settings_are_told_so(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    for error in ranks(2).exceptions(train_with_a_seed_of_its_own, tmp_path):
        assert isinstance(error, RuntimeError)
        assert str(error) == "lgc train: the ranks differ in seed: rank 0: 0, rank 1: 5."


def test_a_run_has_the_recipe_that_it_was_started_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "edited_recipe.py"
    module.write_text("from lgc_lab.recipes.digits import DIGITS as MINE\n")
    started = Settings(recipe="edited_recipe:MINE", scheme="dense", world_size=2)
    before = started.configuration()
    module.write_text("from lgc_lab.recipes.digits import DIGITS as MINE  # edited\n")
    assert started.configuration() == before
    with pytest.raises(ValueError, match="edited_recipe:MINE has changed since the run was asked for"):
        Training(started, torch.device("cpu"))
    assert Settings(recipe="edited_recipe:MINE", scheme="dense", world_size=2).configuration() != before


def test_a_slash_at_the_end_of_the_data_is_no_other_setting() -> None:
    def data_of(text: str) -> str:
        settings = Settings(recipe="text-gpt", scheme="dense", world_size=2, data=text)
        assert settings.data == text
        return str(settings.configuration()["data"])

    assert data_of("some/folder/") == data_of("some/./folder") == "some/folder"
    assert data_of("hf://datasets/a") == "hf://datasets/a"
    assert data_of("../folder") == "../folder"


def test_a_compiled_model_and_another_learning_rate_are_settings_of_a_run(compared: Path, tmp_path: Path) -> None:
    slower = ["train", *SHORT, "--scheme", "dense", "--out", str(tmp_path), "--learning-rate"]
    lgc(*slower, "0.02")
    lr, plain = ([row["lr"] for row in rows(out) if "lr" in row] for out in (tmp_path, compared / "dense"))
    assert lr == pytest.approx([0.02 / 0.05 * each for each in plain])
    assert "learning_rate: 0.02, now 0.05" in lgc(*slower, "0.05", returncode=2).stderr
    assert "compile: False, now True" in lgc(*slower, "0.02", "--compile", returncode=2).stderr


def losses_through(rank: int, world_size: int, backends: list[str | None]) -> list[list[float]]:
    """Of a few steps, by the backend that torch.compile is called with, or not at all."""
    losses = []
    for backend in backends:
        settings = Settings(recipe="digits-mlp", scheme="dense", world_size=world_size, compile=backend is not None)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "compile", partial(torch.compile, backend=backend))
            run = Training(settings, torch.device("cpu"))
        losses.append([run.update(*batch)["loss"] for batch in islice(run.batches(), 3)])
    return losses


@pytest.mark.exhaustive
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_compiled_model_learns_as_another(ranks: Callable[[int], Ranks], backend: str) -> None:
    for plain, compiled in ranks(1 if backend == "inductor" else 2).run(losses_through, [None, backend]):
        assert compiled == pytest.approx(plain, rel=1e-3)


def test_events_without_tensorboard_are_an_error_that_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as if it were not installed
    result = CliRunner().invoke(main, ["train", *SHORT, "--tensorboard", "--out", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert "pip install 'lgc[tensorboard]'" in result.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("scheme", ["lgc-ring", pytest.param("lgc-ps", marks=pytest.mark.exhaustive)])
def test_on_the_vectors_of_a_real_run_the_autoencoder_learns_and_beats_sending_nothing(
    scheme: str, tmp_path: Path
) -> None:
    """In so few steps only the ring's loss falls; the server's, with a decoder a rank, takes 80 steps and more."""
    schedule = "dense_steps=5:warmup_steps=10:train_steps=40:refresh_below=0"
    lgc("train", *SHORT[:4], "--steps", "60", "--scheme", f"{scheme}:{schedule}", "--out", str(tmp_path))
    losses = [row["autoencoder_loss"] for row in rows(tmp_path) if "autoencoder_loss" in row]
    errors = [row["reconstruction_error"] for row in rows(tmp_path) if "reconstruction_error" in row]
    if scheme == "lgc-ring":
        assert sum(losses[-10:]) < 0.95 * sum(losses[:10])
    assert max(errors) < 1


def test_ctrl_c_stops_every_rank_and_leaves_what_is_finished(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*LGC, "compare", *SHORT, "--schemes", "bf16,dense", "--out", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    finished, started = tmp_path / "bf16" / "summary.json", tmp_path / "dense" / "metrics.jsonl"
    deadline = time.monotonic() + LIMIT_S
    while not (finished.exists() and started.exists()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1
    assert "Aborted" in output
    assert "Traceback" not in output
    assert read(finished)["scheme"] == "bf16"
    assert (tmp_path / "report.html").exists()
    assert not (tmp_path / "dense" / "summary.json").exists()
    while exists(process.pid):
        assert time.monotonic() < deadline, "a process of the command is left"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--scheme", "dgc:rate=2"], "DGC(rate=...) must be in (0, 1], got 2.0"),
        (["--scheme", "dgc:low_pass=0"], "DGC(low_pass=...) must be in (0, 1], got 0.0"),
        (["--scheme", "dense", "--learning-rate", "0"], "learning_rate must be above 0 and finite, got 0.0"),
        (["--scheme", "dgc:ration=0.1"], "dgc has no argument 'ration'"),
        (["--scheme", "local:every=30s+quantized"], "the training of a recipe counts steps"),
        (["--scheme", "zip"], "unknown scheme 'zip'"),
        (["--scheme", "lgc-ring:dense_steps=-1"], "LGCRing(dense_steps=...) must be at least 0, got -1"),
        (["--scheme", "topk", "--batch-size", "0"], "'--batch-size': 0 is not in the range x>=1"),
        (["--scheme", "topk", "--workers", "0"], "'--workers': 0 is not in the range x>=1"),
        (["--scheme", "dense", "--seed", str(2**63)], f"seed must be at most {2**63 - 1}, got {2**63}"),
        (["--scheme", "dense", "--timeout", "nan"], "'--timeout': nan is not a finite number"),
        (
            ["--recipe", "camvid-pspnet", "--scheme", "dense", "--batch-size", "1"],
            "batch_size must be at least 2, got 1",
        ),
        (["--recipe", "json:dumps", "--scheme", "dense"], "recipe json:dumps must be an lgc_lab.recipes.Recipe"),
        (["--recipe", "digit", "--scheme", "dense"], "unknown recipe 'digit'; there are digits, "),
    ],
)
def test_wrong_arguments_fail_before_anything_starts(arguments: list[str], words: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["train", "--recipe", "digits", "--out", str(tmp_path / "run"), *arguments])
    assert result.exit_code == 2
    assert words in result.output
    assert not (tmp_path / "run").exists()


def test_compare_checks_all_schemes_before_the_first_run(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["compare", "--schemes", "dense,dgc:rate=0", "--out", str(tmp_path / "runs")])
    assert result.exit_code == 2
    assert "DGC(rate=...) must be in (0, 1], got 0.0" in result.output
    assert not (tmp_path / "runs").exists()


def test_compare_checks_all_data_before_the_first_run(tmp_path: Path) -> None:
    own = ["--data", "cifar10-resnet20=nowhere/cifar", "--data", "text-gpt=nowhere/text"]
    own += ["--data", "lgc_lab.recipes.digits:DIGITS_MLP=nowhere/digits"]
    recipes = "digits,cifar10-resnet20,lgc_lab.recipes.digits:DIGITS_MLP"
    arguments = ["compare", "--recipe", recipes, "--schemes", "dense", *own]
    result = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path / "runs")])
    assert result.exit_code == 1
    assert "nowhere/cifar" in result.output  # and digits, which takes no data, was given none
    assert not (tmp_path / "runs").exists()


def test_compare_checks_all_folders_before_the_first_run(compared: Path, tmp_path: Path) -> None:
    shutil.copytree(compared / "dense", tmp_path / "dgc")
    result = CliRunner().invoke(main, ["compare", *SHORT, "--schemes", "dense,dgc", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "dgc has a finished run of other settings (scheme: " in result.output
    assert not (tmp_path / "dense").exists()


def test_a_recipe_of_the_users_own_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
    (recipe,) = (text for text in re.findall(r"```python\n(.*?)```", guide, re.DOTALL) if "WINE = Recipe" in text)
    (tmp_path / "mine.py").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    schemes = "dense,dgc:rate=0.05:warmup_steps=10"
    arguments = ["compare", "--recipe", "mine:WINE", "--workers", "4", "--schemes", schemes, "--out", "r"]
    done = lgc(*arguments)
    assert "mine:WINE, 4,355 parameters, 4 ranks, 40 steps" in done.stdout
    assert all(each.summary["metric"]["value"] > 90 for each in find_runs([tmp_path / "r"]))
    (tmp_path / "mine.py").write_text(recipe.replace("momentum=0.9", "momentum=0.8"))
    assert "has a finished run of other settings (source: " in lgc(*arguments, returncode=2).stderr


def test_the_command_line_starts_without_what_draws_and_measures() -> None:
    code = "import sys, lgc_lab.cli; print({'matplotlib', 'scipy', 'sklearn', 'jinja2', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stderr


def test_a_batch_larger_than_the_data_is_an_error_that_names_the_rank_and_the_bound(tmp_path: Path) -> None:
    arguments = ["train", *SHORT[:4], "--scheme", "dense", "--batch-size", "5000", "--out", str(tmp_path)]
    done = lgc(*arguments, returncode=1)
    assert "batch_size must be at most 599 for 1198 samples on 2 ranks, got 5000" in done.stderr
    assert not (tmp_path / "summary.json").exists()


def test_report_refuses_folders_without_runs(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["report", str(tmp_path)])
    assert result.exit_code == 2
    assert "no summary.json" in result.output
    (tmp_path / "summary.json").write_text("{")
    result = CliRunner().invoke(main, ["report", str(tmp_path)])
    assert result.exit_code == 2
    assert "WARNING: left out" in result.output
    assert "can be read; repeat those left out with --overwrite" in result.output
    assert "has finished" not in result.output


UNREADABLE = {
    "no metrics": (("metrics.jsonl", None), "metrics.jsonl cannot be read"),
    "cut off": (("metrics.jsonl", '{"step": 1, "lo'), "metrics.jsonl cannot be read"),
    "a list": (("metrics.jsonl", "[1]\n"), "metrics.jsonl must have JSON objects"),
    "empty": (("metrics.jsonl", ""), "metrics.jsonl has no rows"),
    "a number": (("summary.json", "5"), "summary.json must have JSON objects"),
    "no content": (("summary.json", "{}"), "summary.json has no recipe."),
}


def test_the_report_leaves_out_runs_that_it_cannot_read(compared: Path, tmp_path: Path) -> None:
    shutil.copytree(compared / RING.replace(":", ","), tmp_path / "whole")
    for damage, ((name, content), _) in UNREADABLE.items():
        shutil.copytree(compared / "dense", tmp_path / damage, ignore=lambda *_: ["seed-1"])
        file = tmp_path / damage / name
        file.unlink() if content is None else file.write_text(content)
    done = lgc("report", str(tmp_path), "--out", str(tmp_path / "page.html"))
    for damage, (_, words) in UNREADABLE.items():
        assert re.search(rf"WARNING: left out: .*{damage}/.*{re.escape(words)}", done.stderr), damage
    assert done.stderr.count("WARNING: left out: ") == len(UNREADABLE)
    page = (tmp_path / "page.html").read_text()
    assert "lgc-ring" in page
    assert "--scheme=dense" not in page


def test_a_page_that_cannot_be_written_is_an_error_and_the_old_one_stays(compared: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("old")
    (tmp_path / "page.html.tmp").mkdir()
    result = CliRunner().invoke(main, ["report", str(compared), "--out", str(page)])
    assert result.exit_code == 1
    assert "page.html.tmp" in result.output
    assert page.read_text() == "old"


def test_the_report_draws_labels_with_a_dollar_and_runs_of_one_rank(compared: Path, tmp_path: Path) -> None:
    dense = Run.load(compared / "dense")
    alone = replace(dense, rows=[row | {"rank0_sent_bytes": 0, "rank0_received_bytes": 0} for row in dense.rows])
    phases = [phase | {"sent_bytes": 0, "received_bytes": 0} for phase in dense.summary["wire"]["phases"]]
    summary = dense.summary | {"wire": dense.summary["wire"] | {"phases": phases}}
    named = summary | {"configuration": dense.configuration | {"data": "a $x_ b"}}
    write_report([replace(alone, summary=summary), replace(alone, summary=named)], tmp_path / "page.html")
    assert "Against bytes" not in (tmp_path / "page.html").read_text()
    assert "$x_" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("command", [[], ["train"], ["compare"], ["report"]])
def test_help_explains_with_an_example(command: list[str]) -> None:
    result = CliRunner().invoke(main, [*command, "--help"])
    assert result.exit_code == 0
    assert "lgc " in result.output
