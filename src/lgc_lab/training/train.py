"""Training run: its start on this machine or in torchrun's job, what every rank does, and what rank 0 writes."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.backends.cuda import enable_cudnn_sdp, enable_flash_sdp, enable_mem_efficient_sdp
from tqdm import tqdm

from lgc import LocalSteps, Phase, PowerSGD, checkpoint
from lgc.comm.replicas import require_agreement
from lgc.comm.transport import Transport
from lgc_lab.folder import occupied, write_json
from lgc_lab.launch.ranks import place_under_torchrun, preload, process_group, start_ranks
from lgc_lab.terminal import LogNotices, notify
from lgc_lab.training.loop import Training
from lgc_lab.training.run_folder import CHECKPOINTS, EVENTS, METRICS, SUMMARY, claim, cut_metrics, is_to_be_overwritten
from lgc_lab.training.settings import Output, Settings

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

DATA_TIMEOUT = timedelta(hours=6)  # the first rank of each machine may have a data set to fetch and to decode
EARLY_PHASES = ("dense_steps", "warmup_steps", "train_steps")
NOT_EVENTS = ("step", "epoch", "seconds", "phase")
_LOG_NOTICES = LogNotices()


def run_locally(settings: Settings, output: Output, timeout: timedelta, *, overwrite: bool) -> bool:
    """Train with `settings.world_size` ranks on this machine; False if the run had finished before.

    Raises:
        ValueError, OSError: if the folder has a run of other settings or one that is going on, or the data is missing
            or malformed, before any rank starts.
        RankFailedError: if a rank failed; the others have been stopped.
    """
    with occupied(output.folder):
        if overwrite:  # nothing is removed before the data is there
            settings.load_data()
        if not claim(output.folder, settings.configuration(), overwrite=overwrite):
            return False
        preload(__name__)
        settings.load_data()  # decodes into the cache that the ranks map
        start_ranks(train, settings, output, world_size=settings.world_size, timeout=timeout)
        return True


def run_in_job(settings: Settings, output: Output, timeout: timedelta, *, overwrite: bool) -> bool:
    """Train as the one rank of torchrun's job that this process is; False if the run had finished before.

    An older run is overwritten once; after restarts by torchrun (--max-restarts) the new one goes on.

    Raises:
        ValueError, OSError: on rank 0 if the folder has a run of other settings or one that is going on, or on the
            first rank of a machine if the data is missing or malformed.
    """
    is_first = os.environ["RANK"] == "0"
    local_rank, local_world_size = place_under_torchrun()
    with occupied(output.folder) if is_first else contextlib.nullcontext():
        if is_first:
            _warn_of_stale_store()
        first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        overwrite = is_first and overwrite and is_to_be_overwritten(output.folder, first_start=first_start)
        unfinished = True
        if is_first and not overwrite:  # before the others are met: if this raises, they end silently
            unfinished = claim(output.folder, settings.configuration(), overwrite=False)
        with process_group(timeout, local_rank, local_world_size) as device:
            assert dist.group.WORLD is not None
            transport = Transport(dist.group.WORLD, device)
            answer = torch.tensor(int(unfinished), device=device)
            unfinished = bool(transport.broadcast(answer, "agreement", source=0))  # NCCL connects while no rank is busy
            if unfinished:
                transport.set_timeout(DATA_TIMEOUT.total_seconds())
                _prepare(settings, output, transport, local_rank, overwrite=overwrite)
                transport.set_timeout(timeout.total_seconds())
                train(settings, output, device)
    return unfinished


def _warn_of_stale_store() -> None:
    # Restarted ranks find the addresses of the dead ones in the store: pytorch/pytorch#135712.
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        notify(
            "WARNING: torchrun cannot restart ranks that share its store. Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 and "
            "use --standalone or --rdzv-backend c10d."
        )


def _prepare(settings: Settings, output: Output, transport: Transport, local_rank: int, *, overwrite: bool) -> None:
    """Decode into the cache that the other ranks of this machine map, then remove what is to be overwritten."""
    with transport.announcing():
        if local_rank == 0:
            settings.load_data()
    transport.all_gather(torch.zeros(1), "agreement")  # nothing is removed before all machines have the data
    with transport.announcing():
        if overwrite:
            claim(output.folder, settings.configuration(), overwrite=True)
    transport.all_gather(torch.zeros(1), "agreement")


def train(settings: Settings, output: Output, device: torch.device) -> None:
    """Run in every rank of the default process group; rank 0 writes the run folder, all of them checkpoints.

    Goes on from the newest checkpoint that can be loaded, if the folder has one.
    """
    is_first, checkpoints = dist.get_rank() == 0, output.folder / CHECKPOINTS
    if is_first:
        logging.getLogger("lgc").addHandler(_LOG_NOTICES)
        logging.getLogger("lgc").setLevel(logging.INFO)
    _use_deterministic_kernels(device)
    run = Training(settings, device)
    _require_same_run(run, output)
    _resume(run, checkpoints)
    log = None
    if is_first:
        _tell_what_to_expect(run, output)
        log = RunLog(run, output)
    for inputs, targets in run.batches():
        row = run.update(inputs, targets)
        if log:
            log.row(row)
        if run.ends_epoch or run.is_done:
            row = run.evaluate()
            if log:
                log.row(row)
        if _checkpoint_is_due(run, output.checkpoint_every):
            if log:
                log.sync()
            with run.handle.anchored():  # what the model's part of a checkpoint has is for all ranks
                state = run.state_dict()
                checkpoint.save(checkpoints, state, step=run.step, group=run.group, keep=1 if run.is_done else 2)
    summary = run.summary()
    if log:
        log.close()
        write_json(output.folder / SUMMARY, summary)


def _require_same_run(run: Training, output: Output) -> None:
    """Require the same settings and as much data on all ranks; a collective. RuntimeError on all names the field."""
    asked = {name: value for name, value in asdict(run.settings).items() if name != "data"}  # a folder of each machine
    lengths = {"training samples": len(run.data.train), "test samples": len(run.data.test)}
    everything = asked | lengths | {"checkpoint_every": output.checkpoint_every}
    require_agreement(Transport(run.group, run.device), "lgc train", everything)


def _resume(run: Training, checkpoints: Path) -> None:
    """Load the newest checkpoint that is not refused, if there is one; a collective."""
    state = checkpoint.resume(checkpoints, group=run.group)
    if state is not None:
        run.load_state_dict(state)


def _use_deterministic_kernels(device: torch.device) -> None:
    """Have a GPU compute the same numbers in an interrupted run as in one that was not.

    torch warns of what it has no deterministic kernel for. Filling new memory is for debugging only.
    """
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS at its first use
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        for enable in (enable_flash_sdp, enable_mem_efficient_sdp, enable_cudnn_sdp):  # where torch only warns
            enable(False)


def _tell_what_to_expect(run: Training, output: Output) -> None:
    dtype = "bfloat16 by autocast" if run.settings.bf16 else "float32"
    compiled = "compiled" if run.settings.compile else "not compiled"
    memory_format = str(run.recipe.memory_format).removeprefix("torch.")
    on_cpu = run.device.type == "cpu"
    processor = torch.backends.cpu.get_cpu_capability() if on_cpu else torch.cuda.get_device_name(run.device)
    threads = torch.get_num_threads()
    notify(f"computes in {dtype}, {memory_format}, {compiled}, on {processor}, threads a rank: {threads}")
    if run.step:
        if isinstance(run.scheme, PowerSGD):
            notify("NOTICE: the state of powersgd is not saved; it starts again with uncompressed steps.")
        return
    if (output.folder / METRICS).exists():
        notify(f"{output.folder}: starts anew, there is no checkpoint to go on from")
    if isinstance(run.scheme, LocalSteps):
        if run.total <= run.scheme.start_steps:
            notify(
                f"WARNING: with {run.total} steps the run ends before local steps begin, at step "
                f"{run.scheme.start_steps}; set start_steps of the scheme."
            )
        return
    if run.handle.synchronizer is None:
        return
    schedule = run.handle.synchronizer.aggregator.schedule
    last = schedule.at(run.total - 1).phase
    if last is not Phase.COMPRESSED:
        names = [name for name in EARLY_PHASES if hasattr(run.scheme, name)]
        notify(
            f"WARNING: with {run.total} steps the run ends in phase {last}, before {run.scheme.name} sends what it is "
            f"for, from step {schedule.train_end} on; set {', '.join(names)} of the scheme."
        )


def _checkpoint_is_due(run: Training, every: int | None) -> bool:
    if every == 0:
        return False
    return run.is_done or (run.ends_epoch if every is None else run.step % every == 0)


class RunLog:
    """Rank 0's log of a run: metrics.jsonl, a progress bar where there is a terminal, TensorBoard events if asked for.

    Rows of later steps than the run has done are dropped, they will be made again.
    """

    def __init__(self, run: Training, output: Output) -> None:
        metrics = output.folder / METRICS
        cut_metrics(metrics, run.step)
        self._run = run
        self._file = metrics.open("a", encoding="utf-8")
        self._events: SummaryWriter | None = None
        if output.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(output.folder / EVENTS), purge_step=run.step)
        title = f"{run.scheme.name} seed {run.settings.seed}"
        bar: dict[str, Any] = {"total": run.total, "initial": run.step, "desc": title, "unit": "step"}
        self._bar = tqdm(**bar, disable=None, leave=False, dynamic_ncols=True)

    def row(self, values: Mapping[str, Any]) -> None:
        """Record what was measured in the last step, or in the evaluation after it."""
        epoch = (self._run.batch_number - 1) / self._run.per_epoch
        seconds = round(self._run.seconds_now()["wall_s"], 3)
        row = {"step": self._run.step - 1, "epoch": round(epoch, 4), "seconds": seconds} | dict(values)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._events:
            for name, value in row.items():
                if name not in NOT_EVENTS:
                    self._events.add_scalar(name, value, row["step"])
        if "loss" in row:
            sent = row["rank0_sent_bytes"] / 1e6
            self._bar.set_postfix_str(f"{row['phase']} loss {row['loss']:.3f} {sent:.1f} MB sent")
            self._bar.update()

    def sync(self) -> None:
        """Have everything on the disk, before a checkpoint says that these steps are done."""
        os.fsync(self._file.fileno())
        if self._events:
            self._events.flush()

    def close(self) -> None:
        """Finish the files."""
        self._bar.close()
        self._file.close()
        if self._events:
            self._events.close()
