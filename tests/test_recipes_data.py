"""Data: where it is found, what is refused, the cache, augmentation, and which rank gets which samples."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import serve
from ranks import Ranks
from recipe_data import (
    camvid_columns,
    camvid_folder,
    cifar10_columns,
    cifar10_folder,
    encode,
    imagenet_folder,
    imagenet_parquet_folder,
    random_pixels,
    real_data,
    write_parquet,
)

from lgc_lab.recipes import Data, Split, find_recipe
from lgc_lab.recipes.camvid import VOID, load_camvid, scale_crop_and_flip
from lgc_lab.recipes.cifar10 import crop_and_flip, load_cifar10
from lgc_lab.recipes.data import Table, TensorSplit, cache_folder, map_in_threads
from lgc_lab.recipes.imagenet import load_imagenet, random_box
from lgc_lab.recipes.text import CONTEXT, TextSplit, load_text
from lgc_lab.training.batches import batches
from lgc_lab.training.settings import Settings

Loader = Callable[[str | None, int | None], Data]
FOLDERS: dict[str, tuple[Loader, Callable[[Path], str]]] = {
    "cifar10": (load_cifar10, cifar10_folder),
    "camvid": (load_camvid, camvid_folder),
    "imagenet-folder": (load_imagenet, imagenet_folder),
    "imagenet-parquet": (load_imagenet, imagenet_parquet_folder),
}
every_folder = pytest.mark.parametrize("name", FOLDERS)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LGC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tensors(split: Split) -> list[torch.Tensor]:
    assert isinstance(split, TensorSplit)
    return [split.inputs, split.targets]


@pytest.mark.parametrize(
    ("train", "test"),
    [
        (["train.parquet"], "test.parquet"),
        (["train-00000-of-00001.parquet"], "test-00000-of-00001.parquet"),
        (["plain_text/train-00000-of-00001.parquet"], "plain_text/test-00000-of-00001.parquet"),
        (
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
            "data/test-00000-of-00001.parquet",
        ),
    ],
)
@pytest.mark.parametrize("image", ["img", "image"])
def test_the_layouts_of_the_hub_are_found(tmp_path: Path, train: list[str], test: str, image: str) -> None:
    for name in train:
        write_parquet(tmp_path / name, cifar10_columns(6, image))
    write_parquet(tmp_path / test, cifar10_columns(3, image))
    data = load_cifar10(str(tmp_path), None)
    assert [len(data.train), len(data.test)] == [6 * len(train), 3]
    _, labels = data.train.batch(torch.arange(len(data.train)), None)
    assert labels.tolist() == list(range(6)) * len(train)


def test_what_is_neither_a_folder_nor_a_name_on_the_hub_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere is neither a folder nor the name of a data set on the hub"):
        load_cifar10(str(tmp_path / "nowhere"), None)
    with pytest.raises(ValueError, match=r"CIFAR-10 needs data: a folder with train\.parquet"):
        load_cifar10(None, None)
    with pytest.raises(ValueError, match=r"digits come with scikit-learn: data must not be set, got 'here'"):
        find_recipe("digits").data("here", None)


def test_a_name_that_the_hub_does_not_have_or_cannot_be_asked_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"nobody/nothing-of-lgc is not a folder, and the hub does not give it"):
        load_cifar10("nobody/nothing-of-lgc", None)


DOWNLOAD = """
from lgc_lab.recipes.cifar10 import load_cifar10
for _ in range(2):
    data = load_cifar10("someone/cifar10", None)
    print(len(data.train), len(data.test))
"""


def test_a_data_set_of_the_hub_is_downloaded_by_its_name_once(tmp_path: Path) -> None:
    for split, count in (("train", 6), ("test", 3), ("validation", 1)):
        write_parquet(tmp_path / "hub" / "plain_text" / f"{split}-00000-of-00001.parquet", cifar10_columns(count))
    (tmp_path / "hub" / "README.md").write_text("not data")
    with serve("someone/cifar10", tmp_path / "hub") as (address, given):
        environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")}
        done = subprocess.run(
            [sys.executable, "-c", DOWNLOAD], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.stdout.splitlines() == ["6 3", "6 3"], done.stderr
    assert sorted(given) == ["test-00000-of-00001.parquet", "train-00000-of-00001.parquet"]


def test_a_missing_split_or_shard_and_two_candidates_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-00001-of-00002.parquet", cifar10_columns(2))
    with pytest.raises(FileNotFoundError, match=r"shard 00000 of 00002 is missing"):
        load_cifar10(str(tmp_path), None)
    write_parquet(tmp_path / "train-00000-of-00002.parquet", cifar10_columns(2, "image"))
    with pytest.raises(
        ValueError, match=r"train-00001-of-00002\.parquet has img, label where .*train-00000.* has image, label\."
    ):
        load_cifar10(str(tmp_path), None)
    write_parquet(tmp_path / "train.parquet", cifar10_columns(2))
    with pytest.raises(FileNotFoundError, match=r"has no test\.parquet and no test-\*\.parquet"):
        load_cifar10(str(tmp_path), None)
    for config in ("one", "two"):
        write_parquet(tmp_path / config / "test.parquet", cifar10_columns(2))
    with pytest.raises(ValueError, match=r"has split test in .*one, .*two: name one of them"):
        load_cifar10(str(tmp_path), None)


def replaced(column: str, row: int, value: Any) -> dict[str, list[Any]]:
    columns = cifar10_columns(4)
    columns[column][row] = value
    return columns


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": [1]}, r"train\.parquet has no column img or image; it has label\."),
        ({"img": [encode(random_pixels(32, 32, 3))]}, r"train\.parquet has no column label; it has img\."),
        ({"img": [1], "label": [1]}, r"row 0, column img: must be a struct with binary bytes, got 1\."),
        (
            cifar10_columns(2) | {"label": ["cat", "dog"]},
            r"row 0, column label: label must be in 0 \.\. 9, got 'cat'\.",
        ),
        (replaced("label", 2, 10), r"train\.parquet, row 2, column label: label must be in 0 \.\. 9, got 10\."),
        (replaced("label", 1, -1), r"train\.parquet, row 1, column label: label must be in 0 \.\. 9, got -1\."),
        (replaced("label", 1, None), r"train\.parquet, row 1, column label: label must be in 0 \.\. 9, got None\."),
        (
            replaced("img", 1, None),
            r"train\.parquet, row 1, column img: must be a struct with binary bytes, got None\.",
        ),
        (replaced("img", 3, b"no image"), r"train\.parquet, row 3, column img: neither JPEG nor PNG"),
        (replaced("img", 3, encode(random_pixels(32, 32, 3), "GIF")), r"row 3, column img: neither JPEG nor PNG"),
        (replaced("img", 3, encode(random_pixels(32, 32, 3))[:900]), r"row 3, column img: .*truncated"),
        (replaced("img", 0, encode(random_pixels(8, 9, 3))), r"row 0, column img: must be 32 x 32 pixels, got 9 x 8\."),
        ({"img": [], "label": []}, r"train\.parquet has no rows\."),
    ],
)
def test_malformed_cifar10_is_refused_with_file_row_and_column(
    tmp_path: Path, cache: Path, columns: dict[str, list[Any]], message: str
) -> None:
    cifar10_folder(tmp_path)
    write_parquet(tmp_path / "train.parquet", columns)
    with pytest.raises(ValueError, match=message):
        load_cifar10(str(tmp_path), None)
    assert not cache.exists() or not made(cache)


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        (encode(random_pixels(360, 480, top=20)), r"row 1, column annotation: classes must be in 0 \.\. 11, got 19\."),
        (encode(random_pixels(360, 480, 3)), r"must have one channel of class indices, got mode RGB\."),
        (encode(random_pixels(36, 48, top=5)), r"must be 480 x 360 pixels, got 48 x 36\."),
    ],
)
def test_malformed_annotations_are_refused(tmp_path: Path, annotation: bytes, message: str) -> None:
    camvid_folder(tmp_path)
    columns = camvid_columns(2)
    columns["annotation"][1] = annotation
    write_parquet(tmp_path / "train.parquet", columns)
    with pytest.raises(ValueError, match=message):
        load_camvid(str(tmp_path), None)


@pytest.mark.parametrize("keep", [0, 4, 500, -9])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, keep: int) -> None:
    file = Path(cifar10_folder(tmp_path), "train.parquet")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"train\.parquet is not a parquet file"):
        load_cifar10(str(tmp_path), None)


def test_a_file_that_is_damaged_inside_is_refused_by_name(tmp_path: Path) -> None:
    file = Path(cifar10_folder(tmp_path), "train.parquet")
    content = bytearray(file.read_bytes())
    content[4:64] = bytes(60)
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"train\.parquet"):
        load_cifar10(str(tmp_path), None)


def test_an_image_folder_without_classes_or_with_unknown_ones_is_refused(tmp_path: Path) -> None:
    imagenet_folder(tmp_path)
    (tmp_path / "val" / "n09").mkdir()
    with pytest.raises(ValueError, match=r"val has a class that .*train has not: n09\."):
        load_imagenet(str(tmp_path), None)
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"train must have 1 \.\. 1000 folders, one for each class, got 0\."):
        load_imagenet(str(tmp_path / "empty"), None)


def test_a_data_set_that_is_too_small_for_the_batches_is_refused(tmp_path: Path) -> None:
    settings = Settings(recipe="cifar10-resnet20", scheme="dense", world_size=2, data=cifar10_folder(tmp_path))
    with pytest.raises(ValueError, match=r"batch_size must be at most 10 for 20 samples on 2 ranks, got 32\."):
        settings.load_data()


@every_folder
def test_a_second_load_equals_the_first_and_makes_nothing(name: str, tmp_path: Path, cache: Path) -> None:
    load, make = FOLDERS[name]
    path = make(tmp_path)
    first = load(path, None)
    files = {file: file.stat().st_mtime_ns for file in cache.rglob("*.npy")}
    second = load(path, None)
    assert {file: file.stat().st_mtime_ns for file in cache.rglob("*.npy")} == files
    for one, other in zip(first, second, strict=True):
        everything = torch.arange(len(one))
        for seed in (None, 5):
            expected = one.batch(everything, None if seed is None else generator(seed))
            actual = other.batch(everything, None if seed is None else generator(seed))
            assert all(map(torch.equal, expected, actual))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="memory maps are listed by Linux only")
def test_decoded_data_is_mapped_into_memory_and_not_changed_by_its_reader(tmp_path: Path, cache: Path) -> None:
    folder = cifar10_folder(tmp_path)
    inputs, _ = tensors(load_cifar10(folder, None).train)
    maps = Path("/proc/self/maps").read_text().splitlines()
    assert any(int(line.split("-")[0], 16) <= inputs.data_ptr() and str(cache) in line for line in maps)
    before = inputs.clone()
    inputs.zero_()
    assert torch.equal(tensors(load_cifar10(folder, None).train)[0], before)


def test_a_changed_file_and_another_limit_are_decoded_again(tmp_path: Path) -> None:
    folder = cifar10_folder(tmp_path)
    whole, _ = tensors(load_cifar10(folder, None).train)
    part, _ = tensors(load_cifar10(folder, 7).train)
    assert torch.equal(part, whole[:7])
    assert len(load_cifar10(folder, 100).train) == 20
    columns = cifar10_columns(20)
    columns["label"][0] = 9
    write_parquet(tmp_path / "train.parquet", columns)
    assert tensors(load_cifar10(folder, None).train)[1][0] == 9


def test_a_limit_reads_no_further_than_it_needs(tmp_path: Path) -> None:
    folder = cifar10_folder(tmp_path)
    write_parquet(tmp_path / "train.parquet", replaced("img", 3, b"no image"))
    assert len(load_cifar10(folder, 3).train) == 3


def test_an_interrupted_decoding_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    folder = cifar10_folder(tmp_path)
    write_parquet(tmp_path / "train.parquet", replaced("img", 3, b"no image"))
    with pytest.raises(ValueError, match="row 3"):
        load_cifar10(folder, None)
    assert made(cache) == []


def made(cache: Path) -> list[Path]:
    """What a cache has beside the locks."""
    return [path for path in cache.iterdir() if path.suffix != ".lock"]


def load_on_rank(rank: int, world_size: int, folder: str, cache: str) -> torch.Tensor:
    os.environ["LGC_CACHE"] = cache
    return tensors(load_cifar10(folder, None).train)[0].clone()


def test_processes_that_decode_at_the_same_time_agree(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    images = ranks(3).run(load_on_rank, cifar10_folder(tmp_path), str(tmp_path / "shared"))
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[2])
    assert len(made(tmp_path / "shared")) == 2


def test_what_a_killed_process_has_left_is_removed_by_the_next(tmp_path: Path, cache: Path) -> None:
    folder = cifar10_folder(tmp_path)
    load_cifar10(folder, None)
    for whole in made(cache):
        whole.rename(cache / f"making-{socket.gethostname()}-{whole.name}")
    load_cifar10(folder, None)
    assert not list(cache.glob("making-*"))


def test_a_file_with_fewer_rows_than_its_footer_says_is_refused(tmp_path: Path) -> None:
    file = Path(cifar10_folder(tmp_path), "train.parquet")
    table = Table(str(tmp_path), "train", [("img",), ("label",)])
    write_parquet(file, cifar10_columns(12))
    with pytest.raises(ValueError, match=r"train\.parquet must have 20 rows by its footer, got 12\."):
        list(table.read())


def test_the_cache_is_in_the_users_cache_folder_unless_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("LGC_CACHE", "/here")
    assert cache_folder() == Path("/here")
    monkeypatch.delenv("LGC_CACHE")
    assert cache_folder() == Path("/xdg/lgc")


def test_threads_keep_the_order_and_pass_errors_on() -> None:
    assert list(map_in_threads(lambda item: item * item, iter(range(50)), ahead=4)) == [item**2 for item in range(50)]
    with pytest.raises(ZeroDivisionError):
        list(map_in_threads(lambda item: 1 // item, iter([1, 0, 1])))


@every_folder
def test_augmentation_is_a_function_of_the_generator_and_evaluation_is_not_augmented(name: str, tmp_path: Path) -> None:
    load, make = FOLDERS[name]
    split = load(make(tmp_path), None).train
    indices = torch.tensor([2, 0, 1, 1])
    one, same, other = (split.batch(indices, generator(seed)) for seed in (1, 1, 2))
    assert all(map(torch.equal, one, same))
    assert not torch.equal(one[0], other[0])
    assert not torch.equal(one[0][2], one[0][3])
    plain = split.batch(indices, None)
    assert torch.equal(plain[0][2], plain[0][3])
    assert plain[0].dtype == torch.float32
    assert plain[1].dtype == torch.int64


def test_a_crop_is_a_window_of_the_padded_image_or_its_mirror() -> None:
    images = torch.randint(1, 256, (40, 3, 32, 32), dtype=torch.uint8)
    crops = crop_and_flip(images, generator())
    assert crops.shape == images.shape
    seen = set()
    for image, crop in zip(images, crops, strict=True):
        padded = torch.zeros(3, 40, 40, dtype=torch.uint8)
        padded[:, 4:36, 4:36] = image
        found = [
            (down, right, mirrored)
            for down in range(9)
            for right in range(9)
            for mirrored in (False, True)
            if torch.equal(padded[:, down : down + 32, right : right + 32], crop.flip(2) if mirrored else crop)
        ]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) > 30


def test_labels_move_with_the_image_and_outside_is_void() -> None:
    blocks = torch.randint(11, (16, 6, 8)).repeat_interleave(60, 1).repeat_interleave(60, 2)
    images = (blocks + 1).float().unsqueeze(1).expand(-1, 3, -1, -1)  # 0 is outside
    crops, labels = scale_crop_and_flip(images, blocks, generator())
    assert crops.shape == (16, 3, 240, 240)
    assert labels.shape == (16, 240, 240)
    assert labels.min() == 0
    assert labels.max() == VOID
    expected = torch.where(labels == VOID, 0, labels + 1)
    agree = (crops[:, 0] - expected).abs() < 0.05
    assert agree.float().mean() > 0.9  # all but the seams between blocks
    inside = labels != VOID
    assert 0.3 < inside.float().mean() < 1


def test_a_random_box_lies_within_the_image() -> None:
    draws = torch.rand(200, 10, 4, generator=generator())
    for draw in draws:
        left, upper, right, lower = random_box(300, 200, draw)
        assert 0 <= left < right <= 300
        assert 0 <= upper < lower <= 200
        assert 0.07 < (right - left) * (lower - upper) / 60000 <= 1
        assert 0.74 < (right - left) / (lower - upper) < 1.34
    wide = random_box(3000, 10, torch.ones(10, 4) * 0.99)
    assert wide == (1495, 0, 1505, 10)


def test_an_image_folder_and_parquet_files_of_the_same_images_give_the_same_batches(tmp_path: Path) -> None:
    from_folder = load_imagenet(imagenet_folder(tmp_path / "folder"), None)
    from_parquet = load_imagenet(imagenet_parquet_folder(tmp_path), None)
    for one, other in zip(from_folder, from_parquet, strict=True):
        indices = torch.arange(len(one)).flip(0)
        assert all(map(torch.equal, one.batch(indices, generator()), other.batch(indices, generator())))
        assert one.batch(indices, None)[0].shape == (len(one), 3, 224, 224)


def test_a_limit_on_an_image_folder_keeps_all_classes(tmp_path: Path) -> None:
    data = load_imagenet(imagenet_folder(tmp_path), 4)
    assert data.train.batch(torch.arange(4), None)[1].tolist() == [0, 0, 1, 1]


def test_text_is_split_by_file_and_the_same_every_time() -> None:
    first, second = load_text(None, None), load_text(None, None)
    for one, other in zip(first, second, strict=True):
        assert isinstance(one, TextSplit)
        assert isinstance(other, TextSplit)
        assert torch.equal(one.text, other.text)
    assert len(first.train) > 10 * len(first.test) > 1000


def test_every_twentieth_source_is_for_testing(tmp_path: Path) -> None:
    for number in range(40):
        content = (b"t" if number % 20 == 0 else b"x") * 200
        (tmp_path / f"{number:02}.py").write_bytes(content)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "left_out.py").write_bytes(b"?" * 300)
    data = load_text(str(tmp_path), None)
    assert set(data.train.batch(torch.arange(len(data.train)), None)[0].flatten().tolist()) == {ord("x")}
    assert set(data.test.batch(torch.arange(len(data.test)), None)[0].flatten().tolist()) == {ord("t")}
    with pytest.raises(FileNotFoundError, match=r"must have at least two \*\.py files"):
        load_text(str(tmp_path / "tests"), None)
    (tmp_path / "00.py").write_bytes(b"")
    (tmp_path / "20.py").write_bytes(b"")
    with pytest.raises(ValueError, match="must have more than 128 bytes to test on"):
        load_text(str(tmp_path), None)


def test_targets_are_the_next_bytes_and_random_windows_stay_within_the_limit() -> None:
    text = torch.arange(1000, dtype=torch.int64).remainder(251).to(torch.uint8)
    split = TextSplit(text, limit=5)
    assert len(split) == 5
    inputs, targets = split.batch(torch.arange(5), None)
    assert torch.equal(inputs.flatten(), text[: 5 * CONTEXT].long())
    assert torch.equal(targets.flatten(), text[1 : 5 * CONTEXT + 1].long())
    inputs, targets = split.batch(torch.arange(5).repeat(50), generator())
    assert torch.equal(targets[:, :-1], inputs[:, 1:])
    assert targets.shape == (250, CONTEXT)


class Indices(Split):
    """Samples that are their own index."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def batch(self, indices: torch.Tensor, generator: torch.Generator | None) -> tuple[torch.Tensor, torch.Tensor]:
        assert generator is not None
        return indices, torch.randint(1000, indices.shape, generator=generator)


def batches_of_rank(
    rank: int, world_size: int, total: int, *starts: int
) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    settings = Settings(recipe="digits-mlp", scheme="dense", world_size=world_size, batch_size=4, seed=3)
    data = Data(Indices(50), Indices(10))
    return [list(batches(settings, data, total, torch.device("cpu"), start=start)) for start in starts]


def test_an_epoch_is_one_shuffle_dealt_out_to_the_ranks_without_overlap(ranks: Callable[[int], Ranks]) -> None:
    results = [of_rank[0] for of_rank in ranks(3).run(batches_of_rank, 8, 0)]
    for epoch in (slice(0, 4), slice(4, 8)):
        seen = [index for batch in results for inputs, _ in batch[epoch] for index in inputs.tolist()]
        assert len(seen) == len(set(seen)) == 48
    orders = [torch.cat([inputs for inputs, _ in results[0][epoch]]) for epoch in (slice(0, 4), slice(4, 8))]
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(results[0][0][1], results[1][0][1])


def test_batches_are_the_same_after_a_restart_at_any_step(ranks: Callable[[int], Ranks]) -> None:
    starts = (1, 4, 6, 8)
    for whole, *rests in ranks(2).run(batches_of_rank, 8, 0, *starts):
        for start, rest in zip(starts, rests, strict=True):
            assert len(rest) == 8 - start
            for expected, actual in zip(whole[start:], rest, strict=True):
                assert all(map(torch.equal, expected, actual))


@pytest.fixture(scope="module")
def real_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A cache for the real data, which is decoded once for all tests."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize(
    ("name", "recipe", "sizes"),
    [("cifar10", "cifar10-resnet20", (100, 10_000)), ("camvid", "camvid-pspnet", (100, 233))],
)
def test_the_real_data_is_read(
    name: str, recipe: str, sizes: tuple[int, int], real_cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LGC_CACHE", real_cache)
    data = find_recipe(recipe).data(real_data(name), 100)
    assert (len(data.train), len(data.test)) == sizes
    inputs, targets = data.train.batch(torch.arange(100), generator())
    assert len(torch.bincount(targets.flatten()).nonzero()) >= 10
    assert inputs.mean().abs() < 0.7
    assert 0.6 < inputs.std() < 1.5


@pytest.mark.parametrize(
    ("name", "recipe_name"),
    [("cifar10", "cifar10-resnet20"), pytest.param("camvid", "camvid-pspnet", marks=pytest.mark.exhaustive)],
)
def test_data_is_at_least_five_times_faster_than_training(
    name: str, recipe_name: str, real_cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LGC_CACHE", real_cache)
    settings = Settings(recipe=recipe_name, scheme="dense", world_size=1, data=real_data(name), limit_train=100)
    recipe, data = settings.resolve_recipe(), settings.load_data()
    cpu = torch.device("cpu")
    model = recipe.make_model(cpu)
    indices = torch.arange(recipe.batch_size)

    def load() -> tuple[torch.Tensor, torch.Tensor]:
        return recipe.make_batch(data.train, indices, generator(), cpu)

    def step() -> None:
        torch.autograd.backward(recipe.loss(model(inputs), targets))

    inputs, targets = load()
    loading, training = best_seconds(load), best_seconds(step)
    print(f"{recipe_name}: {recipe.batch_size / loading:.0f} and {recipe.batch_size / training:.2f} samples/s")
    assert loading < training / 5


def best_seconds(function: Callable[[], object]) -> float:
    """The shortest of two runs, so that other work on the machine counts little."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)
