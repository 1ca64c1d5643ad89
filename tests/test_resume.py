"""Interrupted runs: real processes are killed, the same command goes on, and nobody sees a difference afterwards."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from ranks import Ranks
from runs import ENVIRONMENT, LGC, LIMIT_S, PACED, SMALL, Done, children_of, forked_ranks, lgc, measured, rows

from lgc import checkpoint
from lgc.comm.transport import Transport
from lgc_lab.cli import main
from lgc_lab.folder import OtherRunError, occupied
from lgc_lab.training.loop import Training
from lgc_lab.training.run_folder import claim, cut_metrics, is_to_be_overwritten
from lgc_lab.training.settings import Output, Settings
from lgc_lab.training.train import _prepare, run_locally

STEPS = 56
RUN = ["--recipe", PACED, "--workers", "2", "--batch-size", "8", "--steps", str(STEPS), "--checkpoint-every", "5"]
VICTIMS = {
    "lgc-ring": {"warmup": "launcher", "train": "rank", "compressed": "job"},
    "lgc-ps": {"dense": "job", "warmup": "rank", "train": "launcher", "compressed": "rank"},
}
PHASES = {"dense": 12, "warmup": 14, "train": 14, "compressed": 16}
SCHEDULE = "dense_steps=12:warmup_steps=14:train_steps=14:refresh_below=0"
DGC = "dgc:warmup_steps=11:indices=recent:values=recentsign"


def train(out: Path, *arguments: str, returncode: int = 0) -> Done:
    """`lgc train` of two ranks, to its end."""
    return lgc("train", *RUN, *arguments, "--out", str(out), returncode=returncode)


def await_step(phase: str, out: Path, has_ended: Callable[[], bool], *, step: int = 0) -> None:
    """Return as soon as a run has done a step of this phase, from number `step` on."""
    deadline = time.monotonic() + LIMIT_S
    while not any(row.get("phase") == phase and row["step"] >= step for row in rows(out)):
        assert not has_ended()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def train_until_a_rank_is_killed(phase: str, out: Path, *arguments: str, step: int = 0) -> None:
    """Train, and SIGKILL the last rank as soon as a step of this phase is done, from number `step` on."""
    ended = threading.Event()

    def kill() -> None:
        await_step(phase, out, ended.is_set, step=step)
        os.kill(forked_ranks()[-1], signal.SIGKILL)

    with ThreadPoolExecutor(1) as thread:
        killing = thread.submit(kill)
        try:
            done = train(out, *arguments, returncode=1)
        finally:
            ended.set()
        killing.result()
    assert "terminated with signal SIGKILL" in done.stderr


def train_until_killed(victim: str, phase: str, out: Path, *arguments: str) -> None:
    """Train, and SIGKILL one of the job, a step of this phase done: a rank, the launcher, or all of its processes.

    Returns when all of them have ended.
    """
    if victim == "rank":
        train_until_a_rank_is_killed(phase, out, *arguments)
        return
    process = subprocess.Popen(
        [*LGC, "train", *RUN, *arguments, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env=ENVIRONMENT,
    )
    await_step(phase, out, lambda: process.poll() is not None)
    (os.killpg if victim == "job" else os.kill)(process.pid, signal.SIGKILL)
    process.communicate(timeout=LIMIT_S)  # to the end of what the ranks write


@pytest.fixture(scope="module", params=["lgc-ring", pytest.param("lgc-ps", marks=pytest.mark.exhaustive)])
def uninterrupted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A scheme, and a finished run of it."""
    out = tmp_path_factory.mktemp("uninterrupted")
    scheme = f"{request.param}:{SCHEDULE}"
    train(out, "--scheme", scheme)
    assert {name: sum(row.get("phase") == name for row in rows(out)) for name in PHASES} == PHASES
    return scheme, out


def test_killed_in_phase_after_phase_a_run_ends_as_if_it_had_not_been(
    uninterrupted: tuple[str, Path], tmp_path: Path
) -> None:
    scheme, expected = uninterrupted
    for phase, victim in VICTIMS[scheme.partition(":")[0]].items():
        train_until_killed(victim, phase, tmp_path, "--scheme", scheme)
        assert rows(tmp_path)[-1]["phase"] == phase
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')  # as if killed in the middle of a line
    done = train(tmp_path, "--scheme", scheme)
    assert "goes on from step 4" in done.stderr
    assert measured(tmp_path) == measured(expected)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without an autoencoder that was killed in its compressed phase."""
    out = tmp_path_factory.mktemp("killed")
    train_until_a_rank_is_killed("compressed", out, "--scheme", DGC)
    return out


@pytest.fixture
def interrupted(killed: Path, tmp_path: Path) -> Path:
    """A copy of the killed run."""
    return Path(shutil.copytree(killed, tmp_path / "run"))


def test_a_run_of_other_settings_is_not_continued_and_not_touched(interrupted: Path) -> None:
    before = (interrupted / "metrics.jsonl").read_bytes()
    for arguments, words in {
        ("--scheme", "dgc:warmup_steps=12"): "(scheme: 'dgc:",
        ("--scheme", DGC, "--seed", "1"): "(seed: 0, now 1)",
        ("--scheme", DGC, "--bf16"): "(bf16: False, now True)",
    }.items():
        result = CliRunner().invoke(main, ["train", *RUN, *arguments, "--out", str(interrupted)])
        assert result.exit_code == 2
        assert f"{interrupted} has an unfinished run of other settings" in result.output
        assert words in result.output
    assert (interrupted / "metrics.jsonl").read_bytes() == before


@pytest.mark.exhaustive
def test_killed_a_run_sends_what_one_does_that_was_not_as_it_knows_what_was_sent_before(
    interrupted: Path, tmp_path: Path
) -> None:
    (interrupted / "summary.json").touch()  # as a power failure may leave it; it is written anew
    train(interrupted, "--scheme", DGC)
    train(tmp_path / "undisturbed", "--scheme", DGC)
    assert measured(interrupted) == measured(tmp_path / "undisturbed")
    assert all("rank0_sent_bytes" in row for row in rows(interrupted) if "loss" in row)


def test_a_run_that_failed_before_its_first_step_is_not_in_the_way_of_a_corrected_one(tmp_path: Path) -> None:
    digits = ["--recipe", "digits", "--scheme", DGC, "--steps", "4"]
    failed = train(tmp_path / "run", *digits, "--data", "not for digits", returncode=1)
    assert "digits come with scikit-learn" in failed.stderr
    done = train(tmp_path / "run", *digits)
    assert "WARNING: with 4 steps the run ends in phase warmup" in done.stderr
    assert "from step 11 on; set warmup_steps of the scheme" in done.stderr


def test_a_damaged_checkpoint_is_set_aside_and_an_older_one_used(interrupted: Path) -> None:
    newest, older = checkpoint.available(interrupted / "checkpoints")
    file = newest / "rank-0001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    done = train(interrupted, "--scheme", DGC)
    assert f"WARNING: checkpoint.load: rank 1: {file}: sha256 must be" in done.stderr
    assert f"goes on from step {int(older.name.removeprefix('step-'))}" in done.stderr
    assert newest.with_name(f"{newest.name}.refused").exists()
    assert [row["step"] for row in rows(interrupted) if "loss" in row] == list(range(STEPS))


def test_a_run_goes_on_with_another_number_of_ranks(interrupted: Path) -> None:
    step = int(checkpoint.available(interrupted / "checkpoints")[0].name.removeprefix("step-"))
    done = train(interrupted, "--scheme", DGC, "--workers", "3")
    assert "NOTICE: from 2 to 3 ranks" in done.stderr
    _, summary = measured(interrupted)
    assert summary["world_sizes"] == [[0, 2], [step, 3]]
    assert [row["step"] for row in rows(interrupted) if "loss" in row] == list(range(STEPS))


def train_in_bfloat16(rank: int, world_size: int) -> tuple[list[float], float, set[torch.dtype]]:
    settings = Settings(recipe=SMALL, scheme="dense", world_size=world_size, steps=40, bf16=True)
    run = Training(settings, torch.device("cpu"))
    seen: set[torch.dtype] = set()
    run.model.get_submodule("0").register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    losses = [run.update(*batch)["loss"] for batch in run.batches()]
    return losses, run.evaluate()["accuracy"], seen


def test_in_bfloat16_a_model_computes_in_it_and_learns(ranks: Callable[[int], Ranks]) -> None:
    for losses, accuracy, dtypes in ranks(2).run(train_in_bfloat16):
        assert dtypes == {torch.bfloat16}
        assert losses[-1] < losses[0]
        assert accuracy > 20  # of ten classes


def position_after(rank: int, world_size: int, state: dict[str, Any]) -> tuple[int, int, int, float]:
    run = Training(Settings(recipe="digits", scheme="dense", world_size=world_size), torch.device("cpu"))
    own = run.state_dict()
    run.load_state_dict({**own, **state})
    return run.step, run.batch_number, run.total, run.progress


def test_on_other_ranks_a_run_goes_on_in_the_same_pass_over_the_data(ranks: Callable[[int], Ranks]) -> None:
    on_two = {"step": 3 * 37 + 9, "epoch": 3, "samples_of_epoch": 9 * 32, "samples": 120 * 32, "world_sizes": [[0, 2]]}
    for world_size, number in ((1, 3 * 74 + 18), (3, 3 * 24 + 6)):  # 1,198 samples in batches of 16 a rank
        per_epoch = 1198 // (16 * world_size)
        for step, batch_number, total, progress in ranks(world_size).run(position_after, {"position": on_two}):
            assert (step, batch_number) == (120, number)
            assert total - step == 24 * per_epoch - number
            assert progress == pytest.approx((3 + 9 / 37) / 24, abs=0.001)


def test_on_more_ranks_something_of_a_pass_that_was_almost_done_is_left(ranks: Callable[[int], Ranks]) -> None:
    on_two = {"step": 36, "epoch": 0, "samples_of_epoch": 36 * 32, "samples": 36 * 32, "world_sizes": [[0, 2]]}
    for _, batch_number, _, _ in ranks(4).run(position_after, {"position": on_two}):
        assert batch_number == 1198 // (16 * 4) - 1


def test_a_run_that_failed_in_its_first_step_is_not_in_the_way_of_a_corrected_one(tmp_path: Path) -> None:
    wrong, right = CONFIGURATION | {"batch_size": 1}, CONFIGURATION | {"batch_size": 2}
    assert claim(tmp_path, wrong, overwrite=False)
    (tmp_path / "metrics.jsonl").touch()
    assert claim(tmp_path, right, overwrite=False)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(OtherRunError, match="batch_size: 2, now 1"):
        claim(tmp_path, wrong, overwrite=False)


CONFIGURATION = {"recipe": "digits", "scheme": "dense"}
FOREIGN: dict[str, dict[str, str]] = {
    "checkpoints": {"checkpoints/mine.pt": "x"},
    "metrics": {"metrics.jsonl": '{"a": 1}\n'},
    "settings": {"settings.json": '{"theme": "dark", "scheme": "solarized"}'},
    "of a run that lost its settings": {"checkpoints/step-1/x": "", "metrics.jsonl": '{"step": 0}\n'},
}


@pytest.mark.parametrize("files", FOREIGN.values(), ids=FOREIGN)
def test_what_is_not_of_a_known_run_is_not_touched(files: dict[str, str], tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.raises(OtherRunError, match="is not of a run whose settings are known, and stays as it is"):
        claim(tmp_path, CONFIGURATION, overwrite=False)
    assert {name: (tmp_path / name).read_text() for name in files} == files


def test_a_damaged_summary_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match=r"summary\.json has no configuration; --overwrite starts anew"):
        claim(tmp_path, CONFIGURATION, overwrite=False)


def test_a_folder_takes_one_job_at_a_time(tmp_path: Path) -> None:
    going_on = pytest.raises(OtherRunError, match=r"run has a run that is going on; choose another --out, or stop it")
    with occupied(tmp_path / "run"), going_on:
        train_here(tmp_path / "run")
    with occupied(tmp_path / "run"):
        pass


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_that_outlives_a_job_does_not_keep_its_folder(tmp_path: Path) -> None:
    with occupied(tmp_path):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        children_of(os.getpid())  # it is there
    try:
        deadline = time.monotonic() + 30
        while not _is_free(tmp_path):  # the child lets go as soon as it runs
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        child.kill()


def _is_free(folder: Path) -> bool:
    try:
        with occupied(folder):
            return True
    except OtherRunError:
        return False


def prepare_without_data_on_one_machine(rank: int, world_size: int, folder: Path) -> None:
    data = None if rank == 0 else "nowhere"
    settings = Settings(recipe="text-gpt", scheme="dense", world_size=world_size, data=data)
    transport = Transport(dist.distributed_c10d._get_default_group(), torch.device("cpu"))
    _prepare(settings, Output(folder=folder), transport, local_rank=0, overwrite=rank == 0)


def test_nothing_is_overwritten_where_a_machine_lacks_the_data(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    first, second = ranks(2).exceptions(prepare_without_data_on_one_machine, tmp_path)
    assert "rank 1: FileNotFoundError: nowhere is not a folder" in str(first)
    assert type(second) is FileNotFoundError
    assert (tmp_path / "summary.json").exists()


def test_a_job_that_is_killed_while_it_overwrites_goes_on_with_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert claim(tmp_path, CONFIGURATION, overwrite=False)
    (tmp_path / "checkpoints").mkdir()
    assert is_to_be_overwritten(tmp_path, first_start=True)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", interrupt)
        with pytest.raises(KeyboardInterrupt):
            claim(tmp_path, CONFIGURATION | {"seed": 1}, overwrite=True)
    assert is_to_be_overwritten(tmp_path, first_start=False)
    assert claim(tmp_path, CONFIGURATION | {"seed": 1}, overwrite=True)


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def train_here(folder: Path) -> None:
    settings = Settings(recipe="digits", scheme="dense", world_size=1, steps=1)
    run_locally(settings, Output(folder=folder), timedelta(seconds=60), overwrite=True)


def test_a_job_that_is_restarted_before_it_has_overwritten_a_run_still_does(tmp_path: Path) -> None:
    old, new = CONFIGURATION | {"seed": 0}, CONFIGURATION | {"seed": 1}
    assert claim(tmp_path, old, overwrite=False)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    assert is_to_be_overwritten(tmp_path, first_start=True)
    assert is_to_be_overwritten(tmp_path, first_start=False)
    assert claim(tmp_path, new, overwrite=True)
    assert not is_to_be_overwritten(tmp_path, first_start=False)  # the new run goes on
    assert claim(tmp_path, new, overwrite=False)


def test_from_three_ranks_on_an_uncompressed_run_ends_as_if_it_had_not_been_killed(tmp_path: Path) -> None:
    three = ["--scheme", "dense", "--workers", "3", "--steps", "16"]
    train(tmp_path / "expected", *three)
    train_until_a_rank_is_killed("dense", tmp_path / "killed", *three, step=6)
    done = train(tmp_path / "killed", *three)
    assert "goes on from step" in done.stderr
    assert measured(tmp_path / "killed") == measured(tmp_path / "expected")


def test_metrics_are_cut_at_a_step_and_at_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step}) + "\n" for step in (0, 1, 1, 2, 3)]
    path.write_text("".join(lines) + '{"st')
    cut_metrics(path, 9)
    assert path.read_text() == "".join(lines)
    cut_metrics(path, 2)
    assert path.read_text() == "".join(lines[:3])
    cut_metrics(path, 0)
    assert path.read_text() == ""
