"""Every recipe: its model against the published counts, its loss and metric, and a few steps of training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from recipe_data import camvid_folder, cifar10_folder, imagenet_folder
from torch import Tensor, nn

from lgc.schemes import SCHEMES, parse_scheme
from lgc_lab.recipes import RECIPES, Recipe, find_recipe
from lgc_lab.recipes.camvid import AUXILIARY_WEIGHT, CAMVID_PSPNET, VOID, PSPNet
from lgc_lab.recipes.digits import DIGITS
from lgc_lab.recipes.recipe import ACCURACY, poly_decay, step_decay, warmup_and_cosine
from lgc_lab.recipes.resnet import RESNETS, Block, resnet20
from lgc_lab.recipes.text import GPT, TEXT_GPT
from lgc_lab.training.loop import load_optimizer, make_optimizer
from lgc_lab.training.settings import Settings

CPU = torch.device("cpu")


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        (resnet20, 269_722),  # He et al. 2016, table 6: 0.27M
        (lambda: RESNETS["resnet18"](), 11_689_512),  # torchvision
        (lambda: RESNETS["resnet50"](), 25_557_032),  # torchvision: 25.6M
        (lambda: RESNETS["resnet101"](), 44_549_160),  # torchvision: 44.5M
        (lambda: RESNETS["resnet50"](classes=10, stem="cifar"), 23_520_842),  # kuangliu/pytorch-cifar
        (lambda: RESNETS["resnet101"](classes=10, stem="cifar"), 42_512_970),
        (lambda: PSPNet("resnet50", classes=19), 48_975_494),  # MMSegmentation, pspnet_r50-d8: 48.98M
    ],
)
def test_a_model_has_as_many_parameters_as_published(model: Callable[[], nn.Module], parameters: int) -> None:
    with torch.device("meta"):
        assert count(model()) == parameters


def test_a_resnet_halves_the_grid_by_stage_and_keeps_it_where_it_is_dilated() -> None:
    images = torch.randn(1, 3, 64, 48)
    plain = RESNETS["resnet18"]().eval().features(images)
    dilated = RESNETS["resnet18"](dilations=(1, 1, 2, 4)).eval().features(images)
    assert [tuple(part.shape) for part in plain] == [
        (1, 64, 16, 12),
        (1, 128, 8, 6),
        (1, 256, 4, 3),
        (1, 512, 2, 2),
    ]
    assert [part.shape[2:] for part in dilated] == [(16, 12), (8, 6), (8, 6), (8, 6)]


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_dilated_stage_computes_what_the_strided_one_does_and_more_pixels(name: str) -> None:
    plain = RESNETS[name]().double().eval()
    dilated = RESNETS[name](dilations=(1, 1, 2, 4)).double().eval()
    dilated.load_state_dict(plain.state_dict())
    images = torch.randn(1, 3, 32, 64, dtype=torch.float64)
    expected, actual = plain.features(images), dilated.features(images)
    torch.testing.assert_close(actual[2][:, :, ::2, ::2], expected[2])
    torch.testing.assert_close(actual[3][:, :, ::4, ::4], expected[3])


def test_zero_initialised_blocks_start_as_their_shortcut() -> None:
    model = RESNETS["resnet50"](zero_init=True)
    block = model.stages[0][1]  # type: ignore[index]
    assert isinstance(block, Block)
    x = torch.rand(2, 256, 4, 4)
    torch.testing.assert_close(block(x), x)


def test_resnet20_pads_its_shortcuts_with_zeros_where_the_shape_changes() -> None:
    model = resnet20()
    shortcut = model.stages[1][0].shortcut  # type: ignore[index]
    x = torch.randn(2, 16, 8, 8)
    y = shortcut(x)
    assert y.shape == (2, 32, 4, 4)
    assert torch.equal(y[:, :16], x[:, :, ::2, ::2])
    assert not y[:, 16:].any()


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", pytest.param("resnet101", marks=pytest.mark.exhaustive)])
def test_pspnet_gives_every_pixel_eleven_logits_and_in_training_the_auxiliary_ones(backbone: str) -> None:
    with torch.device("meta"):
        model = CAMVID_PSPNET.model(backbone)
        images = torch.randn(2, 3, 48, 64)
    head, auxiliary = model(images)
    assert head.shape == auxiliary.shape == (2, 11, 48, 64)
    assert model.eval()(images).shape == (2, 11, 48, 64)


def test_the_pspnet_loss_weighs_both_heads_and_leaves_out_void_pixels() -> None:
    head, auxiliary = torch.randn(2, 2, 11, 4, 5)
    targets = torch.randint(12, (2, 4, 5))
    known = targets != VOID

    def plain(logits: Tensor) -> Tensor:
        return -logits.log_softmax(1).movedim(1, 3)[known][torch.arange(int(known.sum())), targets[known]].mean()

    expected = plain(head) + AUXILIARY_WEIGHT * plain(auxiliary)
    torch.testing.assert_close(CAMVID_PSPNET.loss((head, auxiliary), targets), expected)


def test_mean_iou_over_batches_equals_sets_of_pixels() -> None:
    outputs = torch.randn(6, 11, 7, 8)
    outputs[:, 3] = -100  # never predicted
    targets = torch.randint(12, (6, 7, 8))
    targets[targets == 3] = 4  # nor there: the class does not count
    targets[targets == 5] = 6  # predicted but not there: counts as 0
    predicted = outputs.argmax(1)
    ratios = []
    for label in range(11):
        truth = {tuple(place) for place in (targets == label).nonzero().tolist()}
        guess = {tuple(place) for place in ((predicted == label) & (targets != VOID)).nonzero().tolist()}
        if truth | guess:
            ratios.append(len(truth & guess) / len(truth | guess))
    metric = CAMVID_PSPNET.metric
    sums = metric.sums(outputs[:4], targets[:4]) + metric.sums(outputs[4:], targets[4:])
    assert len(ratios) == 10
    assert metric.value(sums) == pytest.approx(100 * sum(ratios) / 10)
    assert metric.better == "higher"


def test_accuracy_is_the_percentage_of_correct_samples() -> None:
    outputs = F.one_hot(torch.tensor([0, 1, 2, 1]), 3)
    assert ACCURACY.value(ACCURACY.sums(outputs, torch.tensor([0, 1, 2, 2]))) == 75


def test_a_gpt_without_knowledge_needs_about_eight_bits_per_byte_and_less_is_better() -> None:
    model = TEXT_GPT.model()
    assert 1e6 < count(model) < 4e6
    tokens, following = torch.randint(256, (2, 2, 128))
    with torch.no_grad():
        bits = TEXT_GPT.metric.value(TEXT_GPT.metric.sums(model(tokens), following))
    assert bits == pytest.approx(8, abs=0.2)
    assert TEXT_GPT.loss(model(tokens), following).item() == pytest.approx(bits * math.log(2), rel=1e-5)
    assert TEXT_GPT.metric.better == "lower"


def test_a_gpt_sees_no_later_token_and_ties_its_embedding() -> None:
    model = GPT(vocabulary=256, context=16, width=32, depth=2, heads=4)
    tokens = torch.randint(256, (1, 16))
    changed = tokens.clone()
    changed[0, 10] += 1
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.equal(before[:, 10:], after[:, 10:])
    assert model.head.weight is model.tokens.weight


def test_schedules_start_end_and_step_where_they_should() -> None:
    cosine, poly, steps = warmup_and_cosine, poly_decay(0.9), step_decay(0.5, 0.75, warmup=0.1)
    assert cosine(0.0) == pytest.approx(1 / 11)
    assert cosine(0.1) == 1
    assert cosine(0.55) == pytest.approx(0.5)
    assert [poly(0.0), poly(0.5)] == [1, pytest.approx(0.5**0.9)]
    assert [steps(progress) for progress in (0.0, 0.1, 0.49, 0.5, 0.74, 0.75, 0.99)] == pytest.approx(
        [1 / 11, 1, 1, 0.1, 0.1, 0.01, 0.01]
    )


def test_weight_decay_leaves_out_vectors_under_adamw() -> None:
    model = TEXT_GPT.model()
    optimizer = make_optimizer(TEXT_GPT, model, parse_scheme("dense"))
    assert isinstance(optimizer, torch.optim.AdamW)
    decayed, others = optimizer.param_groups
    assert decayed["weight_decay"] == 0.1
    assert others["weight_decay"] == 0
    assert all(parameter.ndim >= 2 for parameter in decayed["params"])
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def digits_step(memory_format: torch.memory_format) -> tuple[Tensor, nn.Module, torch.optim.Optimizer]:
    """Inputs, model and optimizer of one step."""
    recipe = replace(DIGITS, memory_format=memory_format)
    torch.manual_seed(0)
    model = recipe.make_model(CPU)
    inputs, targets = recipe.make_batch(recipe.data(None, 16).train, torch.arange(16), None, CPU)
    optimizer = make_optimizer(recipe, model, parse_scheme("dense"))
    torch.autograd.backward(recipe.loss(model(inputs), targets))
    optimizer.step()
    return inputs, model, optimizer


def test_the_memory_format_is_that_of_model_inputs_and_gradients_and_changes_rounding_alone() -> None:
    plain_inputs, plain, _ = digits_step(torch.contiguous_format)
    inputs, model, _ = digits_step(torch.channels_last)
    assert torch.equal(inputs, plain_inputs)
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    for expected, parameter in zip(plain.parameters(), model.parameters(), strict=True):
        assert parameter.grad is not None
        assert parameter.grad.stride() == parameter.stride()
        if parameter.ndim == 4:
            assert parameter.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(parameter, expected)


def test_every_recipe_of_convolutions_computes_in_channels_last() -> None:
    for recipe in RECIPES.values():
        with torch.device("meta"):
            model = recipe.model(*recipe.backbones[:1])
        convolves = any(isinstance(module, nn.Conv2d) for module in model.modules())
        assert recipe.memory_format == (torch.channels_last if convolves else torch.contiguous_format)


def test_an_optimizers_loaded_state_is_laid_out_as_the_parameters() -> None:
    _, model, optimizer = digits_step(torch.channels_last)
    saved = optimizer.state_dict()
    contiguous = {
        number: {name: value.contiguous() for name, value in state.items()} for number, state in saved["state"].items()
    }
    load_optimizer(optimizer, saved | {"state": contiguous})
    for number, parameter in enumerate(model.parameters()):
        loaded = optimizer.state[parameter]["momentum_buffer"]
        assert loaded.stride() == parameter.stride()
        assert torch.equal(loaded, contiguous[number]["momentum_buffer"])


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_takes_the_defaults_of_a_recipe(name: str, scheme: str) -> None:
    settings = Settings(recipe=name, scheme=scheme, world_size=2)
    momentum = getattr(settings.resolve_scheme(), "momentum", 0)
    assert momentum == 0 or find_recipe(name).optimizer == "sgd"


def test_only_a_backbone_of_the_recipe_is_taken() -> None:
    with pytest.raises(ValueError, match=r"camvid-pspnet: backbone must be resnet18, .*, got 'vgg'\."):
        Settings(recipe="camvid-pspnet", scheme="dense", world_size=1, backbone="vgg")
    with pytest.raises(ValueError, match=r"digits: backbone must be unset for this recipe, got 'resnet18'\."):
        Settings(recipe="digits", scheme="dense", world_size=1, backbone="resnet18")
    with pytest.raises(ValueError, match=r"limit_train must be at least 1, got 0\."):
        Settings(recipe="digits", scheme="dense", world_size=1, limit_train=0)
    large = Settings(recipe="camvid-pspnet", scheme="dense", world_size=1, backbone="resnet50").resolve_recipe()
    with torch.device("meta"):
        assert count(large.model()) == 48_969_334


SMALL: dict[str, tuple[int, int, int, Callable[[Path], str] | None]] = {
    "digits": (64, 16, 10, None),
    "digits-mlp": (64, 16, 5, None),
    "cifar10-resnet20": (16, 8, 10, cifar10_folder),
    "cifar10-resnet50": (4, 4, 3, cifar10_folder),
    "cifar10-resnet101": (4, 4, 2, cifar10_folder),
    "imagenet-resnet50": (2, 2, 2, imagenet_folder),
    "camvid-pspnet": (2, 2, 2, camvid_folder),
    "text-gpt": (4, 4, 5, None),
}
LEFT_OUT = ("cifar10-resnet50", "cifar10-resnet101", "camvid-pspnet")  # others have ResNets and pixels too


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.exhaustive if name in LEFT_OUT else ()) for name in RECIPES]
)
def test_a_few_steps_on_the_same_samples_reduce_the_loss(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LGC_CACHE", str(tmp_path / "cache"))
    limit, batch_size, steps, make = SMALL[name]
    settings = Settings(
        recipe=name,
        scheme="dense",
        world_size=1,
        data=make(tmp_path) if make else None,
        limit_train=limit,
        batch_size=batch_size,
    )
    losses = few_steps(settings.resolve_recipe(), settings, steps)
    assert min(losses[1:]) < losses[0] - 0.03


def few_steps(recipe: Recipe, settings: Settings, steps: int) -> list[float]:
    data, model = settings.load_data(), recipe.make_model(CPU)
    optimizer = make_optimizer(recipe, model, settings.resolve_scheme())
    for group in optimizer.param_groups:
        group["lr"] /= 10  # in place of a warm-up
    generator = torch.Generator().manual_seed(0)
    inputs, targets = recipe.make_batch(data.train, torch.arange(recipe.batch_size), generator, CPU)
    losses = []
    for _ in range(steps):
        loss = recipe.loss(model(inputs), targets)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses
