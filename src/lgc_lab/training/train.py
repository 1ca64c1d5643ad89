"""One training run: what every rank does, and what it leaves in the run folder."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch.backends.cuda import enable_cudnn_sdp, enable_flash_sdp, enable_mem_efficient_sdp

from lgc import Phase, PowerSGD, checkpoint
from lgc.comm.replicas import require_agreement
from lgc.comm.transport import Transport
from lgc_lab.folder import write_json
from lgc_lab.terminal import LogNotices, notify
from lgc_lab.training.loop import Training
from lgc_lab.training.run_folder import CHECKPOINTS, METRICS, SUMMARY, RunLog
from lgc_lab.training.settings import Output, Settings

EARLY_PHASES = ("dense_steps", "warmup_steps", "train_steps")
_LOG_NOTICES = LogNotices()


def train(settings: Settings, output: Output, device: torch.device) -> None:
    """Run in every rank of the default process group; rank 0 writes the run folder, all of them checkpoints.

    Goes on from the newest checkpoint that can be loaded, if the folder has one.
    """
    if dist.get_rank() == 0:
        logging.getLogger("lgc").addHandler(_LOG_NOTICES)
        logging.getLogger("lgc").setLevel(logging.INFO)
    _use_deterministic_kernels(device)
    run = Training(settings, device)
    _require_same_run(run, output)
    resume(run, output.folder / CHECKPOINTS)
    log = None
    if dist.get_rank() == 0:
        _tell_how_it_computes(run)
        _warn_of_short_run(run)
        log = RunLog(
            output.folder,
            step=run.step,
            seconds=run.wall_seconds,
            total=run.total,
            title=f"{run.scheme.name} seed {settings.seed}",
            tensorboard=output.tensorboard,
        )
    for inputs, targets in run.batches():
        row = run.update(inputs, targets)
        if log:
            log.row(run.step - 1, run.epoch, row)
            log.progress(f"{row['phase']} loss {row['loss']:.3f} {row['rank0_sent_bytes'] / 1e6:.1f} MB sent")
        if run.ends_epoch or run.is_done:
            row = run.evaluate()
            if log:
                log.row(run.step - 1, run.epoch, row)
        if _checkpoint_is_due(run, output.checkpoint_every):
            if log:
                log.sync()
            path = output.folder / CHECKPOINTS
            checkpoint.save(path, run.state_dict(), step=run.step, group=run.group, keep=1 if run.is_done else 2)
    summary = run.summary()
    if log:
        log.close()
        write_json(output.folder / SUMMARY, summary)


def _require_same_run(run: Training, output: Output) -> None:
    """All ranks have the same settings and as much data; a collective. Raises RuntimeError on all, naming the field."""
    asked = {name: value for name, value in asdict(run.settings).items() if name != "data"}  # a folder of each machine
    lengths = {"training samples": len(run.data.train), "test samples": len(run.data.test)}
    everything = asked | lengths | {"checkpoint_every": output.checkpoint_every}
    require_agreement(Transport(run.group, run.device), "lgc train", everything)


def _use_deterministic_kernels(device: torch.device) -> None:
    """On a GPU, where an interrupted run would else go on with other numbers.

    torch warns of what it has no deterministic kernel for. Filling new memory is for debugging only.
    """
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS at its first use
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        for enable in (enable_flash_sdp, enable_mem_efficient_sdp, enable_cudnn_sdp):  # where torch only warns
            enable(False)


def _tell_how_it_computes(run: Training) -> None:
    dtype = "bfloat16 by autocast" if run.settings.bf16 else "float32"
    compiled = "compiled" if run.settings.compile else "not compiled"
    memory_format = str(run.recipe.memory_format).removeprefix("torch.")
    on_cpu = run.device.type == "cpu"
    processor = torch.backends.cpu.get_cpu_capability() if on_cpu else torch.cuda.get_device_name(run.device)
    threads = torch.get_num_threads()
    notify(f"computes in {dtype}, {memory_format}, {compiled}, on {processor}, threads a rank: {threads}")


def _warn_of_short_run(run: Training) -> None:
    if run.step or run.handle.synchronizer is None:
        return
    schedule = run.handle.synchronizer.aggregator.schedule
    last = schedule.at(run.total - 1).phase
    if last is not Phase.COMPRESSED:
        names = [name for name in EARLY_PHASES if hasattr(run.scheme, name)]
        notify(
            f"WARNING: with {run.total} steps the run ends in phase {last}, before {run.scheme.name} sends what it is "
            f"for, from step {schedule.train_end} on; set {', '.join(names)} of the scheme."
        )


def resume(run: Training, directory: Path) -> None:
    """Load the newest checkpoint that is not refused; a collective."""
    state = checkpoint.resume(directory, group=run.group)
    if state is not None:
        run.load_state_dict(state)
    if dist.get_rank() != 0:
        return
    if state is not None and isinstance(run.scheme, PowerSGD):
        notify("NOTICE: the state of powersgd is not saved; it starts again with uncompressed steps.")
    if state is None and (directory.parent / METRICS).exists():
        notify(f"{directory.parent}: starts anew, there is no checkpoint to go on from")


def _checkpoint_is_due(run: Training, every: int | None) -> bool:
    if every == 0:
        return False
    return run.is_done or (run.ends_epoch if every is None else run.step % every == 0)
