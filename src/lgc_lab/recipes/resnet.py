"""Residual networks. Source: He et al., CVPR 2016, arXiv 1512.03385."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Stem = Literal["imagenet", "deep", "cifar"]


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    """Make a convolution that keeps the size at stride 1."""
    return nn.Conv2d(inputs, outputs, kernel, stride, dilation * (kernel // 2), dilation, bias=False)


def normalised(*convolutions: nn.Conv2d) -> nn.Sequential:
    """Follow each of the convolutions by batch norm and ReLU."""
    return nn.Sequential(*(m for c in convolutions for m in (c, nn.BatchNorm2d(c.out_channels), nn.ReLU())))


def basic(inputs: int, width: int, stride: int, entering: int = 1, dilation: int = 1) -> list[nn.Conv2d]:
    """Make two 3x3 convolutions; `entering` is the dilation of the first."""
    return [conv(inputs, width, 3, stride, entering), conv(width, width, 3, 1, dilation)]


def bottleneck(inputs: int, width: int, stride: int, entering: int = 1, dilation: int = 1) -> list[nn.Conv2d]:
    """Make convolutions: 1x1 down to `width`, 3x3 (with the stride, as in torchvision), 1x1 up to four times that."""
    return [conv(inputs, width, 1), conv(width, width, 3, stride, entering), conv(width, 4 * width, 1)]


class Block(nn.Module):
    """Convolutions added to a shortcut, a 1x1 convolution where the shape changes (option B), or always to `project`.

    See `basic` and `bottleneck` for the convolutions.
    """

    def __init__(self, convolutions: Sequence[nn.Conv2d], *, project: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(*list(normalised(*convolutions))[:-1])
        inputs, outputs = convolutions[0].in_channels, convolutions[-1].out_channels
        stride = max(convolution.stride[0] for convolution in convolutions)
        self.shortcut: nn.Module = nn.Identity()
        if project or stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def stem_layers(stem: Stem, outputs: int) -> nn.Sequential:
    """Make the layers before the blocks: 7x7 and pooling, three 3x3 and pooling, or one 3x3 alone."""
    if stem == "cifar":
        return normalised(conv(3, outputs, 3))
    half, pooling = outputs // 2, nn.MaxPool2d(3, stride=2, padding=1)
    if stem == "deep":
        return normalised(conv(3, half, 3, 2), conv(half, half, 3), conv(half, outputs, 3)).append(pooling)
    return normalised(conv(3, outputs, 7, 2)).append(pooling)


class ResNet(nn.Module):
    """Stages of residual blocks, average pooling and a linear layer.

    A stage after the first has stride 2 where its dilation is 1, else stride 1, and then computes at more pixels what
    it would with the stride. `zero_init`: every block starts as its shortcut (Goyal et al., arXiv 1706.02677, 5.1).
    """

    def __init__(
        self,
        block: Callable[[int, int, int, int, int], list[nn.Conv2d]],  # `basic` or `bottleneck`
        depths: Sequence[int],  # number of blocks by stage
        *,
        classes: int = 1000,
        stem: Stem = "imagenet",
        width: int = 64,  # channels of the first stage's blocks; each stage doubles them
        dilations: Sequence[int] = (1, 1, 1, 1),  # by stage
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        self.stem = stem_layers(stem, width)
        self.stages = nn.ModuleList()
        channels, entering = width, 1
        for stage, (depth, dilation) in enumerate(zip(depths, dilations, strict=False)):
            stride = 1 if stage == 0 or dilation > 1 else 2
            blocks = nn.Sequential()
            for _ in range(depth):
                convolutions = block(channels, width << stage, stride, entering, dilation)
                blocks.append(Block(convolutions))
                channels, stride, entering = convolutions[-1].out_channels, 1, dilation
            self.stages.append(blocks)
        self.channels = channels
        self.head = nn.Linear(channels, classes)
        initialise(self)
        for module in self.modules():
            if zero_init and isinstance(module, Block):
                nn.init.zeros_(module.body[-1].weight)  # type: ignore[arg-type]

    def features(self, x: Tensor) -> list[Tensor]:
        """Compute the output of every stage."""
        outputs = [self.stem(x)]
        for stage in self.stages:
            outputs.append(stage(outputs[-1]))
        return outputs[1:]

    def forward(self, x: Tensor) -> Tensor:
        """Classify: (batch, 3, height, width) -> (batch, classes)."""
        logits: Tensor = self.head(self.features(x)[-1].mean(dim=(2, 3)))
        return logits


def initialise(model: nn.Module) -> None:
    """Draw convolutions from normal distributions by fan-out. Source: He et al., ICCV 2015, arXiv 1502.01852."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def resnet20() -> ResNet:
    """Make the CIFAR family's smallest, (batch, 3, 32, 32) -> (batch, 10), 0.27 million parameters: section 4.2."""
    model = ResNet(basic, (3, 3, 3), classes=10, stem="cifar", width=16)
    for stage, added in ((1, 16), (2, 32)):  # option A: every second pixel, new channels are zero
        shortcut = nn.Sequential(nn.AvgPool2d(1, stride=2), nn.ZeroPad3d((0, 0, 0, 0, 0, added)))
        model.stages[stage][0].shortcut = shortcut  # type: ignore[index]
    return model


RESNETS: dict[str, Callable[..., ResNet]] = {
    "resnet18": partial(ResNet, basic, (2, 2, 2, 2)),
    "resnet50": partial(ResNet, bottleneck, (3, 4, 6, 3)),
    "resnet101": partial(ResNet, bottleneck, (3, 4, 23, 3)),
}
