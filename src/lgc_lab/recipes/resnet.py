"""Residual networks. Source: He et al., CVPR 2016, arXiv 1512.03385."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Stem = Literal["imagenet", "deep", "cifar"]
CLASSES_OF_IMAGENET = 1000


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    """A convolution that keeps the size at stride 1."""
    padding = dilation * (kernel // 2)
    return nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=False)


def normalised(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    return nn.Sequential(conv(inputs, outputs, kernel, stride), nn.BatchNorm2d(outputs), nn.ReLU())


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; `entering` is the dilation of the first."""

    expansion = 1

    def __init__(self, inputs: int, width: int, *, stride: int, entering: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = conv(inputs, width, 3, stride, entering)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, 1, dilation)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut = projection(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1 down to `width`, 3x3 (with the stride, as in torchvision), 1x1 up to four times that."""

    expansion = 4

    def __init__(self, inputs: int, width: int, *, stride: int, entering: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = conv(inputs, width, 1)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride, entering)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, 4 * width, 1)
        self.norm3 = nn.BatchNorm2d(4 * width)
        self.shortcut = projection(inputs, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        h = F.relu(self.norm2(self.conv2(h)))
        return F.relu(self.norm3(self.conv3(h)) + self.shortcut(x))


Block = type[BasicBlock] | type[Bottleneck]


def projection(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Shortcut with a 1x1 convolution where the shape changes (option B)."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class PaddedShortcut(nn.Module):
    """Shortcut without parameters: every second pixel, new channels zero (option A)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.added = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.added))


def stem_layers(stem: Stem, outputs: int) -> list[nn.Module]:
    """Layers before the blocks: 7x7 and pooling, three 3x3 and pooling, or one 3x3 alone."""
    half = outputs // 2
    convolutions = {
        "imagenet": [(3, outputs, 7, 2)],
        "deep": [(3, half, 3, 2), (half, half, 3, 1), (half, outputs, 3, 1)],
        "cifar": [(3, outputs, 3, 1)],
    }
    layers = [layer for arguments in convolutions[stem] for layer in normalised(*arguments)]
    return layers if stem == "cifar" else [*layers, nn.MaxPool2d(3, stride=2, padding=1)]


class ResNet(nn.Module):
    """Stages of residual blocks, average pooling and a linear layer.

    Args:
        block: of all stages.
        depths: number of blocks by stage.
        classes: outputs of the linear layer.
        stem: see `stem_layers`.
        width: channels of the first stage's blocks; each stage doubles them.
        dilations: by stage; a stage after the first has stride 2 where its dilation is 1, else stride 1, and then
            computes at more pixels what it would with the stride.
        zero_init: start every block as its shortcut. Source: Goyal et al., arXiv 1706.02677, section 5.1.
    """

    def __init__(
        self,
        block: Block,
        depths: Sequence[int],
        *,
        classes: int = CLASSES_OF_IMAGENET,
        stem: Stem = "imagenet",
        width: int = 64,
        dilations: Sequence[int] = (1, 1, 1, 1),
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(*stem_layers(stem, width))
        self.stages = nn.ModuleList()
        channels, entering = width, 1
        for stage, (depth, dilation) in enumerate(zip(depths, dilations, strict=False)):
            stride = 1 if stage == 0 or dilation > 1 else 2
            blocks: list[nn.Module] = []
            for _ in range(depth):
                blocks.append(block(channels, width << stage, stride=stride, entering=entering, dilation=dilation))
                channels, stride, entering = (width << stage) * block.expansion, 1, dilation
            self.stages.append(nn.Sequential(*blocks))
        self.channels = channels
        self.head = nn.Linear(channels, classes)
        initialise(self, zero_init)

    def features(self, x: Tensor) -> list[Tensor]:
        """Output of every stage."""
        x = self.stem(x)
        outputs = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, height, width) -> (batch, classes)."""
        logits: Tensor = self.head(self.features(x)[-1].mean(dim=(2, 3)))
        return logits


def initialise(model: nn.Module, zero_init: bool = False) -> None:
    """Normal by fan-out for convolutions. Source: He et al., ICCV 2015, arXiv 1502.01852."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif zero_init and isinstance(module, BasicBlock):
            nn.init.zeros_(module.norm2.weight)
        elif zero_init and isinstance(module, Bottleneck):
            nn.init.zeros_(module.norm3.weight)


def resnet20() -> ResNet:
    """The CIFAR family's smallest: (batch, 3, 32, 32) -> (batch, 10), 0.27 million parameters. Source: section 4.2."""
    model = ResNet(BasicBlock, (3, 3, 3), classes=10, stem="cifar", width=16)
    for stage, inputs in ((1, 16), (2, 32)):
        model.stages[stage][0].shortcut = PaddedShortcut(inputs, 2 * inputs)  # type: ignore[index]
    return model


DEPTHS: dict[str, tuple[Block, tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
}


def resnet(
    name: str,
    *,
    classes: int = CLASSES_OF_IMAGENET,
    stem: Stem = "imagenet",
    dilations: Sequence[int] = (1, 1, 1, 1),
    zero_init: bool = False,
) -> ResNet:
    """ResNet-18, 50 or 101 by name."""
    block, depths = DEPTHS[name]
    return ResNet(block, depths, classes=classes, stem=stem, dilations=dilations, zero_init=zero_init)
