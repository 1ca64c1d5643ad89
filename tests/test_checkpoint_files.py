"""What is on disk: exact round trips, refused files, failed writes, and a kill at every file-system call."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from killed_save import IN_A_WRITE, save_and_die
from ranks import Ranks

from lgc import checkpoint
from lgc.checkpoint import CheckpointError, RefusedError

RankFactory = Callable[[int], Ranks]


@pytest.fixture(scope="module")
def alone() -> Iterator[dist.ProcessGroup]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def save_and_load(state: Any, directory: Path, group: dist.ProcessGroup) -> Any:
    shutil.rmtree(directory, ignore_errors=True)
    return checkpoint.load(checkpoint.save(directory, state, step=0, group=group), group=group)


# --- round trips ---

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8]
SHAPES: list[tuple[int, ...]] = [(), (0,), (3, 0), (1,), (2, 3)]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_tensors_of_any_dtype_and_shape_come_back_bit_for_bit(
    dtype: torch.dtype, tmp_path: Path, alone: dist.ProcessGroup
) -> None:
    state = {str(shape): (torch.randn(shape) * 5).abs().to(dtype) for shape in SHAPES}
    loaded = save_and_load(state, tmp_path, alone)
    for name, tensor in state.items():
        assert loaded[name].dtype == dtype
        assert loaded[name].shape == tensor.shape
        assert loaded[name].contiguous().view(torch.uint8).equal(tensor.view(torch.uint8)) if tensor.dim() else True


def test_views_shared_storage_and_parameters_come_back_as_tensors_of_their_own(
    tmp_path: Path, alone: dist.ProcessGroup
) -> None:
    base = torch.arange(12.0).view(3, 4)
    state = {
        "base": base,
        "again": base,
        "transposed": base.T,
        "every second": base[:, ::2],
        "expanded": base[:1].expand(5, 4),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    loaded = save_and_load(state, tmp_path, alone)
    assert list(loaded) == list(state)
    for name, tensor in state.items():
        torch.testing.assert_close(loaded[name], tensor.detach(), rtol=0, atol=0, equal_nan=True)
        assert not loaded[name].requires_grad
    assert len({tensor.untyped_storage().data_ptr() for tensor in loaded.values()}) == len(state)


keys = st.text("ab/~[]$.0", max_size=3) | st.integers(-3, 12)
leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(width=64)
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.floats(width=32).map(torch.tensor)
)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(state=st.dictionaries(keys, trees, max_size=4))
def test_any_nested_state_comes_back_with_its_keys_types_and_order(
    state: dict[Any, Any], tmp_path_factory: pytest.TempPathFactory, alone: dist.ProcessGroup
) -> None:
    loaded = save_and_load(state, tmp_path_factory.getbasetemp() / "nested", alone)
    assert describe(loaded) == describe(state)


def describe(value: Any) -> Any:
    """A value with the types of all its parts, equal where the bits are."""
    if isinstance(value, torch.Tensor):
        return "tensor", str(value.dtype), value.numpy().tobytes()
    if isinstance(value, dict):
        return [(type(key), key, describe(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [describe(item) for item in value]
    return type(value), repr(value)


def test_an_optimizer_and_its_schedule_go_on_from_their_states(tmp_path: Path, alone: dist.ProcessGroup) -> None:
    def build() -> tuple[torch.nn.Parameter, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        weight = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.AdamW([weight], lr=0.1, betas=(0.8, 0.9))
        return weight, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)

    def step(weight: torch.nn.Parameter, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
        weight.grad = weight.detach() * 0.5
        optimizer.step()
        schedule.step()

    first = build()
    for _ in range(3):
        step(*first)
    state = {"weight": first[0], "optimizer": first[1].state_dict(), "schedule": first[2].state_dict()}
    loaded = save_and_load(state, tmp_path, alone)
    assert loaded["optimizer"]["param_groups"][0]["betas"] == (0.8, 0.9)
    second = build()
    second[0].data.copy_(loaded["weight"])
    second[1].load_state_dict(loaded["optimizer"])
    second[2].load_state_dict(loaded["schedule"])
    for _ in range(3):
        step(*first)
        step(*second)
    assert torch.equal(first[0], second[0])


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"a": {1, 2}}, r"state\['/a'\] is a set"),
        ({"a": {"b": object()}}, r"state\['/a/b'\] is a object"),
        ({1.5: 0}, r"has the key 1.5 \(float\)"),
        ({"a": {True: 0}}, r"has the key True \(bool\)"),
        ({"a": [torch.eye(2).to_sparse()]}, r"state\['/a/\[0\]'\] is a torch.sparse_coo tensor"),
        ({"a": torch.zeros(1, dtype=torch.complex128)}, r"tensor of torch.complex128"),
    ],
)
def test_what_has_no_faithful_form_is_refused_by_its_path(
    part: Any, message: str, tmp_path: Path, alone: dist.ProcessGroup
) -> None:
    with pytest.raises(CheckpointError, match=f"rank 0: .*{message}"):
        checkpoint.save(tmp_path, part, step=1, group=alone)
    assert list(tmp_path.iterdir()) == []


# --- the folder ---


def test_the_newest_checkpoints_are_kept_and_listed(tmp_path: Path, alone: dist.ProcessGroup) -> None:
    assert checkpoint.latest(tmp_path / "not there") is None
    for step in (3, 20, 100):
        checkpoint.save(tmp_path, {"step": step}, step=step, group=alone)
    names = ["step-0000000100", "step-0000000020"]
    assert [path.name for path in checkpoint.available(tmp_path)] == names
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert sorted(path.name for path in (tmp_path / names[0]).iterdir()) == ["manifest.json", "rank-0000.safetensors"]


@pytest.mark.parametrize("step", [7, 8])
def test_a_step_that_would_not_be_the_newest_is_refused(step: int, tmp_path: Path, alone: dist.ProcessGroup) -> None:
    path = checkpoint.save(tmp_path, {"a": 1}, step=8, group=alone)
    with pytest.raises(CheckpointError, match="step-0000000008 is there already"):
        checkpoint.save(tmp_path, {"a": 2}, step=step, group=alone)
    assert checkpoint.load(path, group=alone) == {"a": 1}


@pytest.mark.parametrize(
    ("arguments", "message"), [({"step": -1}, "step=.*got -1"), ({"step": 1, "keep": 0}, "keep=.*got 0")]
)
def test_wrong_arguments_are_refused(
    arguments: dict[str, Any], message: str, tmp_path: Path, alone: dist.ProcessGroup
) -> None:
    with pytest.raises(ValueError, match=message):
        checkpoint.save(tmp_path, {}, group=alone, **arguments)


def test_a_rank_by_itself_needs_no_group(tmp_path: Path) -> None:
    for step in (1, 2):
        newest = checkpoint.save(tmp_path, {"step": step}, step=step, group=None)
    assert checkpoint.resume(tmp_path, group=None) == {"step": 2}
    next(newest.glob("rank-*")).write_bytes(b"")
    checkpoint.set_aside(newest, group=None)
    assert checkpoint.resume(tmp_path, group=None) == {"step": 1}
    of_many = {"handle": {"scheme": "dgc", "rank": 0, "world_size": 4, "wire": "", "aggregator": {}}}
    with pytest.raises(ValueError, match=r"must be the group of the handle's 4 ranks, got None"):
        checkpoint.save(tmp_path, of_many, step=3, group=None)


# --- refused files ---


@pytest.fixture
def two(tmp_path: Path, alone: dist.ProcessGroup) -> list[Path]:
    """Two checkpoints, newest first."""
    for step in (1, 2):
        checkpoint.save(tmp_path, {"step": step, "w": torch.arange(6.0)}, step=step, group=alone)
    return checkpoint.available(tmp_path)


def test_old_checkpoints_that_cannot_be_removed_do_not_make_a_new_one_fail(
    two: list[Path], alone: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(_: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(shutil, "rmtree", fails)
    path = checkpoint.save(two[0].parent, {"step": 3}, step=3, group=alone)
    assert checkpoint.load(path, group=alone) == {"step": 3}
    assert "is complete; older ones stay for now: checkpoint.save: rank 0: " in caplog.text


def test_resume_says_from_where_it_goes_on(
    two: list[Path], alone: dist.ProcessGroup, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "lgc")
    assert checkpoint.resume(two[0].parent, group=alone) is not None
    assert f"goes on from step 2 ({two[0]})" in caplog.text


def test_resume_goes_back_to_the_step_that_is_asked_for(two: list[Path], alone: dist.ProcessGroup) -> None:
    resumed, loaded = checkpoint.resume(two[1].parent, group=alone, step=1), checkpoint.load(two[1], group=alone)
    assert str(resumed) == str(loaded)
    with pytest.raises(CheckpointError, match=r"has no checkpoint of step 7, it has \[1, 2\]"):
        checkpoint.resume(two[0].parent, group=alone, step=7)


def test_what_is_not_complete_is_told_of_once(
    two: list[Path], alone: dist.ProcessGroup, caplog: pytest.LogCaptureFixture
) -> None:
    (two[0] / "manifest.json").unlink()
    checkpoint.resume(two[0].parent, group=alone)
    checkpoint.save(two[0].parent, {"step": 3}, step=3, group=alone)
    assert caplog.text.count("is not a complete checkpoint") == 1


def rewrite(path: Path, **changes: Any) -> None:
    """Change a manifest and make its digest right again."""
    content = json.loads((path / "manifest.json").read_text()) | changes
    content.pop("sha256")
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(content | {"sha256": digest}))


def entry(path: Path, **changes: Any) -> list[dict[str, Any]]:
    files: list[dict[str, Any]] = json.loads((path / "manifest.json").read_text())["files"]
    return [files[0] | changes]


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "file missing": (lambda p: (p / "rank-0000.safetensors").unlink(), "rank-0000.* cannot be read: No such file"),
    "file truncated": (lambda p: os.truncate(p / "rank-0000.safetensors", 50), "rank-0000.*: size must be .*, got 50"),
    "file flipped": (lambda p: flip(p / "rank-0000.safetensors", -3), "rank-0000.*: sha256 must be .*, got "),
    "header flipped": (lambda p: flip(p / "rank-0000.safetensors", 9), "rank-0000.*: sha256 must be .*, got "),
    "manifest missing": (lambda p: (p / "manifest.json").unlink(), "manifest.json cannot be read: No such file"),
    "manifest empty": (lambda p: os.truncate(p / "manifest.json", 0), "manifest.json is not a JSON object"),
    "manifest truncated": (lambda p: os.truncate(p / "manifest.json", 99), "manifest.json is not a JSON object"),
    "manifest nested": (lambda p: (p / "manifest.json").write_text("[" * 100_000), "manifest.json is not a JSON obj"),
    "manifest a list": (lambda p: (p / "manifest.json").write_text("[1]"), "manifest.json is not a JSON object"),
    "manifest huge": (lambda p: os.truncate(p / "manifest.json", 2**40), "manifest.json: size must be at most"),
    "newer schema": (lambda p: rewrite(p, schema=3), "manifest.json: schema must be at most 2, got 3"),
    "no schema": (lambda p: rewrite(p, schema=None), "manifest.json: schema must be an integer, got None"),
    "other step": (lambda p: rewrite(p, step=3), "manifest.json: step must be step-0000000002, got 3"),
    "other world size": (lambda p: rewrite(p, world_size=2), "manifest.json: world_size must be 1, got 2"),
    "no files": (lambda p: rewrite(p, files=[], world_size=0), r"manifest.json: files must be a list, got \[\]"),
    "absurd size": (lambda p: rewrite(p, files=entry(p, size=2**62)), r"rank-0000.*: size must be 461168\d*, got "),
    "path outside": (
        lambda p: rewrite(p, files=entry(p, name="../x")),
        r"files\[0\].name must be rank-0000.*, got '\.\./x'",
    ),
    "field unknown": (lambda p: rewrite(p, files=entry(p, more=1)), r"files\[0\] must be an object of name, size"),
}


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 4
    file.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_by_file_and_field_and_the_previous_one_is_still_there(
    damage: str, two: list[Path], alone: dist.ProcessGroup
) -> None:
    newest, previous = two
    apply, message = DAMAGE[damage]
    apply(newest)
    with pytest.raises(RefusedError, match=f"rank 0: .*{message}"):
        checkpoint.load(newest, group=alone)
    state = checkpoint.resume(newest.parent, group=alone)
    assert state is not None
    assert state["step"] == 1
    assert checkpoint.available(newest.parent) == [previous]


def test_a_step_can_be_set_aside_again(two: list[Path], alone: dist.ProcessGroup) -> None:
    newest, _ = two
    first = checkpoint.set_aside(newest, group=alone)
    checkpoint.save(newest.parent, {"step": 2}, step=2, group=alone)
    second = checkpoint.set_aside(newest, group=alone)
    assert [first.name, second.name] == [f"{newest.name}.refused", f"{newest.name}.refused-2"]
    assert first.is_dir()
    assert second.is_dir()


def test_a_file_that_cannot_be_read_is_not_taken_for_damaged(
    two: list[Path], alone: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        with pytest.raises(CheckpointError, match="cannot be read: Input/output error") as failure:
            checkpoint.load(two[0], group=alone)
    assert not isinstance(failure.value, RefusedError)
    assert checkpoint.load(two[0], group=alone)["step"] == 2


@pytest.mark.parametrize("damage", ["file missing", "file truncated", "manifest missing", "manifest truncated"])
def test_latest_passes_over_what_is_not_complete_and_the_next_save_replaces_it(
    damage: str, two: list[Path], alone: dist.ProcessGroup
) -> None:
    newest, previous = two
    DAMAGE[damage][0](newest)
    assert checkpoint.latest(newest.parent) == previous
    assert checkpoint.save(newest.parent, {"step": 2}, step=2, group=alone) == newest
    assert checkpoint.load(newest, group=alone) == {"step": 2}


def test_latest_does_not_pass_over_a_checkpoint_of_a_newer_version(two: list[Path]) -> None:
    rewrite(two[0], schema=3)
    assert checkpoint.latest(two[0].parent) == two[0]


def test_a_run_of_an_older_form_is_neither_gone_on_with_nor_begun_anew_nor_removed(
    two: list[Path], alone: dist.ProcessGroup
) -> None:
    directory = two[0].parent
    for path in two:
        rewrite(path, schema=1)
    message = "schema must be 2, got 1; an older lgc wrote it .*: finish this run with the release that began it"
    for action in (
        lambda: checkpoint.load(two[0], group=alone),
        lambda: checkpoint.resume(directory, group=alone),
        lambda: checkpoint.save(directory, {"step": 3}, step=3, group=alone),
    ):
        with pytest.raises(CheckpointError, match=message) as failure:
            action()
        assert not isinstance(failure.value, RefusedError)  # which is set aside
    assert sorted(directory.iterdir()) == sorted(two)


def test_no_flipped_bit_of_the_manifest_goes_unnoticed(two: list[Path]) -> None:
    file = two[0] / "manifest.json"
    content = file.read_bytes()
    wanted = json.loads(content)
    for position in range(len(content)):
        file.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        try:
            checkpoint.load_rank(two[0], rank=0, world_size=1)
        except CheckpointError:
            continue
        assert json.loads(file.read_bytes()) == wanted  # white space


def hostile(path: Path, text: str) -> None:
    """Replace the JSON part of a rank's file, with sizes and digests that are right."""
    file = path / "rank-0000.safetensors"
    data = safetensors.torch.save({"/w": torch.arange(6.0)}, {"state": text})
    file.write_bytes(data)
    rewrite(path, files=entry(path, size=len(data), sha256=hashlib.sha256(data).hexdigest()))


@pytest.mark.parametrize(
    "text",
    ["", "[1]", "NaN", '{"a": NaN}', '{"a": {"$tensor": "/x"}}', '{"a": {"$tensor": []}}', '{"a": {"$eval": "1"}}',
     '{"a": {"$bytes": "/x"}}', '{"a": {"$bytes": "/w"}}',
     '{"a": {"$float": "1e9"}}', '{"a": {"$dict": [[[], 1]]}}', '{"a": {"$dict": 1}}', '{"a": {"$tuple": 1}}',
     '{"a": {"$tuple": [], "b": 1}}', '{"a": ' + "[" * 5000 + "]" * 5000 + "}", '{"a": {"$shard": 1}}',
     *(f'{{"a": {{"$shard": {{"local": {local}, "shape": {shape}, "stride": [1], "dim": {dim}, {place}}}}}}}'
       for local, shape, dim, place in (
           ("1", "[12]", 0, '"place": 0, "places": 2'),
           ('{"$tensor": "/w"}', '"x"', 0, '"place": 0, "places": 2'),
           ('{"$tensor": "/w"}', "[-12]", 0, '"place": 0, "places": 2'),
           ('{"$tensor": "/w"}', "[12]", 1, '"place": 0, "places": 2'),
           ('{"$tensor": "/w"}', "[12]", 0, '"place": 2, "places": 2'),
           ('{"$tensor": "/w"}', "[13]", 0, '"place": 0, "places": 2'),
       ))],
)  # fmt: skip
def test_a_malformed_state_is_refused(text: str, two: list[Path]) -> None:
    hostile(two[0], text)
    with pytest.raises(CheckpointError, match=r"rank-0000.safetensors.*(cannot be understood|must be an object)"):
        checkpoint.load_rank(two[0], rank=0, world_size=1)


# --- failures of one rank ---


def save_with_failing_rank(rank: int, world_size: int, directory: Path, failing: int, manifest: bool) -> None:
    """The second checkpoint is larger than the failing rank may write."""
    assert dist.group.WORLD is not None
    checkpoint.save(directory, {"step": 1}, step=1, group=dist.group.WORLD)
    state = {"step": 2, **{f"w{i}": torch.zeros(0 if manifest else 2000) for i in range(100)}}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == failing:
        resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, limits[1]))
    try:
        checkpoint.save(directory, state, step=2, group=dist.group.WORLD)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(("failing", "manifest"), [(0, False), (1, False), (2, False), (0, True)])
def test_a_write_that_fails_on_one_rank_raises_on_all_and_leaves_the_previous_checkpoint(
    ranks: RankFactory, failing: int, manifest: bool, tmp_path: Path
) -> None:
    failures = ranks(3).exceptions(save_with_failing_rank, tmp_path, failing, manifest)
    name = "manifest.json" if manifest else f"rank-000{failing}.safetensors"
    for failure in failures:
        assert isinstance(failure, CheckpointError)
        assert f"rank {failing}: {tmp_path}/step-0000000002/{name} cannot be written: File too large" in str(failure)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000000001"]
    assert checkpoint.load_rank(tmp_path / "step-0000000001", rank=2, world_size=3) == {"step": 1}


def save_at_different_steps(rank: int, world_size: int, directory: Path) -> None:
    assert dist.group.WORLD is not None
    checkpoint.save(directory, {"rank": rank}, step=1, group=dist.group.WORLD)
    checkpoint.save(directory, {}, step=1 + (rank == 0), group=dist.group.WORLD)


def test_ranks_at_different_steps_write_nothing(ranks: RankFactory, tmp_path: Path) -> None:
    for failure in ranks(2).exceptions(save_at_different_steps, tmp_path):
        assert isinstance(failure, CheckpointError)
        assert r"step=...) must be the same on every rank, got [2, 1]" in str(failure)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000000001"]
    assert checkpoint.load_rank(tmp_path / "step-0000000001", rank=1, world_size=2) == {"rank": 1}


def save_to_own_folder(rank: int, world_size: int, directory: Path, shared: bool, there: bool = False) -> None:
    assert dist.group.WORLD is not None
    if there:
        (directory / str(rank) / "step-0000000001").mkdir(parents=True)
    checkpoint.save(directory / str(rank), {"rank": rank}, step=1, group=dist.group.WORLD, shared=shared)


@pytest.mark.parametrize(
    ("there", "reason"),
    [
        (False, "1/step-0000000001, which rank 0 has made, is not there"),
        (True, "0/step-0000000001/rank-0001.safetensors cannot be read: No such file"),
    ],
)
def test_ranks_that_do_not_share_the_folder_are_told(
    ranks: RankFactory, there: bool, reason: str, tmp_path: Path
) -> None:
    for failure in ranks(2).exceptions(save_to_own_folder, tmp_path, True, there):
        assert isinstance(failure, CheckpointError)
        assert f"{tmp_path}/{reason}" in str(failure)
    assert checkpoint.latest(tmp_path / "0") is None


def test_folders_of_each_rank_are_a_checkpoint_once_they_are_one(ranks: RankFactory, tmp_path: Path) -> None:
    ranks(2).run(save_to_own_folder, tmp_path, False)
    assert checkpoint.latest(tmp_path / "0") is None
    shutil.copytree(tmp_path / "1", tmp_path / "0", dirs_exist_ok=True)
    path = checkpoint.latest(tmp_path / "0")
    assert path is not None
    assert [checkpoint.load_rank(path, rank=rank, world_size=2) for rank in (0, 1)] == [{"rank": 0}, {"rank": 1}]


def load_damaged(rank: int, world_size: int, directory: Path) -> None:
    assert dist.group.WORLD is not None
    path = checkpoint.save(directory, {"rank": rank}, step=1, group=dist.group.WORLD)
    if rank == 0:
        flip(path / "rank-0001.safetensors", -1)
    dist.barrier()
    checkpoint.load(path, group=dist.group.WORLD)


def test_a_file_that_one_rank_refuses_is_refused_by_all(ranks: RankFactory, tmp_path: Path) -> None:
    for failure in ranks(3).exceptions(load_damaged, tmp_path):
        assert isinstance(failure, CheckpointError)
        assert "rank 1: " in str(failure)
        assert "rank-0001.safetensors: sha256" in str(failure)
        assert "rank 0: " not in str(failure)


# --- a kill at every file-system call ---


def save_in_two_processes(directory: Path, victim: int, call: int) -> int | None:
    """The exit code of the victim."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo", "torch.nn.parallel"])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = [
        context.Process(target=save_and_die, args=(rank, store.port, directory, victim, call)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return processes[victim].exitcode


def newest_step(directory: Path) -> int:
    """Of the latest checkpoint, after both ranks' states in it have been verified.

    Whatever has a manifest is complete: the manifest is the last file to come and the first to go.
    """
    available = checkpoint.available(directory)
    assert {manifest.parent for manifest in directory.glob("step-*/manifest.json")} == set(available)
    path = available[0]
    states = [checkpoint.load_rank(path, rank=rank, world_size=2) for rank in range(2)]
    for rank, state in enumerate(states):
        assert torch.equal(state["w"], torch.full((1000,), float(state["step"] + rank)))
    assert states[0]["step"] == states[1]["step"]
    return int(states[0]["step"])


@pytest.mark.parametrize("victim", [0, 1])
def test_a_kill_at_any_file_system_call_leaves_a_complete_checkpoint(victim: int, tmp_path: Path) -> None:
    assert save_in_two_processes(tmp_path, victim, 0) == 0
    step, call, exit_code = 1, 0, None
    while exit_code != 0:
        call += 1
        exit_code = save_in_two_processes(tmp_path, victim, call)
        assert exit_code in (0, -signal.SIGKILL)
        newest = newest_step(tmp_path)
        assert newest in (step, step + 1), f"call {call}"
        step = newest
    assert call > (20 if victim == 0 else 5)
    assert [folder.name for folder in tmp_path.iterdir()] == [f"step-{step:010d}"]  # and no debris


@pytest.mark.parametrize("victim", [0, 1])
def test_a_kill_in_the_middle_of_a_write_leaves_the_previous_checkpoint(victim: int, tmp_path: Path) -> None:
    assert save_in_two_processes(tmp_path, victim, 0) == 0
    assert save_in_two_processes(tmp_path, victim, IN_A_WRITE) == -signal.SIGXFSZ
    assert newest_step(tmp_path) == 1
    torn = tmp_path / "step-0000000002" / f".rank-000{victim}.safetensors.tmp"
    assert torn.stat().st_size == 2000
