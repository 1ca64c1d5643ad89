"""CamVid: street scenes of 480 x 360 pixels, 367 to train on and 233 to test, eleven classes; by PSPNet."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lgc_lab.recipes.data import Array, Cell, Column, Data, decode_image, decoded_splits, standardised
from lgc_lab.recipes.imagenet import DEVIATION, MEAN
from lgc_lab.recipes.recipe import Metric, Recipe, poly_decay
from lgc_lab.recipes.resnet import RESNETS, conv, initialise, normalised

CLASSES = 11
VOID = 11
SIZE = (480, 360)
CROP = (240, 240)
SCALES = (0.5, 2.0)
BINS = (1, 2, 3, 6)
AUXILIARY_WEIGHT = 0.4


def scale_crop_and_flip(images: Tensor, annotations: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Crop images scaled by 0.5 to 2 at random, half of them mirrored. Source: Zhao et al. 2017, section 5.1.

    Images are (batch, 3, height, width), normalised; annotations (batch, height, width). One affine map per sample
    takes the crop's pixels to the image's, so that annotations move with the image: bilinear for the image, nearest
    for the annotation. Outside are zeros (the mean) and void.
    """
    count, _, height, width = images.shape
    draws = torch.rand(4, count, generator=generator).to(images.device)
    scale = SCALES[0] + (SCALES[1] - SCALES[0]) * draws[0]
    mirror = torch.where(draws[1] < 0.5, -1.0, 1.0)
    across, down = CROP[1] / (scale * width), CROP[0] / (scale * height)  # the crop's size as a part of the image's
    maps = torch.zeros(count, 2, 3, device=images.device)
    maps[:, 0, 0], maps[:, 0, 2] = mirror * across, (2 * draws[2] - 1) * (1 - across)
    maps[:, 1, 1], maps[:, 1, 2] = down, (2 * draws[3] - 1) * (1 - down)
    grid = F.affine_grid(maps, [count, 1, *CROP], align_corners=False)
    crops = F.grid_sample(images, grid, mode="bilinear", align_corners=False)
    above_void = (annotations - VOID).float().unsqueeze(1)  # outside becomes 0, and then void
    labels = F.grid_sample(above_void, grid, mode="nearest", align_corners=False).squeeze(1)
    return crops, labels.long() + VOID


def to_batch(images: Tensor, annotations: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Make normalised inputs and targets from uint8 images and annotations."""
    inputs, targets = standardised(images, MEAN, DEVIATION), annotations.long()
    return (inputs, targets) if generator is None else scale_crop_and_flip(inputs, targets, generator)


def decode_annotation(annotation: Cell) -> Array:
    """Decode class indices by pixel, (height, width). Raises ValueError for another size or class, or no image."""
    labels = decode_image(annotation, size=SIZE, indices=True)
    if labels.max() > VOID:
        raise ValueError(f"{annotation.where}: classes must be in 0 .. {VOID}, got {labels.max()}.")
    return labels


def load_camvid(path: str | None, limit_train: int | None) -> Data:
    """Load parquet files with columns image and annotation (or mask)."""
    if path is None:
        raise ValueError("CamVid needs data: a folder with train.parquet and test.parquet.")
    width, height = SIZE
    columns = (
        Column(("image",), (3, height, width), partial(decode_image, size=SIZE)),
        Column(("annotation", "mask"), (height, width), decode_annotation),
    )
    return decoded_splits("camvid", path, limit_train, columns, to_batch)


class PSPNet(nn.Module):
    """Pyramid scene parsing network. Source: Zhao et al., CVPR 2017, arXiv 1612.01105.

    A dilated ResNet at an eighth of the resolution; its features beside their averages over grids of 1, 2, 3 and 6
    cells a side; and an auxiliary head on the third stage.

    (batch, 3, height, width) -> (batch, classes, height, width); in training a pair, the auxiliary head's second.

    Layers and widths are those of MMSegmentation's pspnet_r50-d8, 48.98 million parameters at 19 classes: a stem of
    three 3x3 convolutions, a head of a quarter of the features' width, an auxiliary one of an eighth. Without the
    dropout of 0.1 before the two classifiers. `backbone` is one of `RESNETS`.
    """

    def __init__(self, backbone: str, *, classes: int) -> None:
        super().__init__()
        self.backbone = RESNETS[backbone](stem="deep", dilations=(1, 1, 2, 4))
        del self.backbone.head
        channels = self.backbone.channels
        width = channels // 4
        self.pooling = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(bins), normalised(conv(channels, width, 1))) for bins in BINS
        )
        self.head = _classifier(channels + len(BINS) * width, width, classes)
        self.auxiliary = _classifier(channels // 2, width // 2, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        features, size = self.backbone.features(x), x.shape[2:]
        last = features[-1]
        pyramid = [last, *(_resized(level(last), last.shape[2:]) for level in self.pooling)]
        outputs = _resized(self.head(torch.cat(pyramid, dim=1)), size)
        return (outputs, _resized(self.auxiliary(features[-2]), size)) if self.training else outputs


def _classifier(inputs: int, width: int, classes: int) -> nn.Sequential:
    return nn.Sequential(normalised(conv(inputs, width, 3)), nn.Conv2d(width, classes, 1))


def _resized(x: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(x, list(size), mode="bilinear", align_corners=False)


def pspnet_loss(outputs: Tensor | tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
    """Cross entropy of the head and 0.4 times that of the auxiliary head, over the pixels that are not void."""
    if isinstance(outputs, Tensor):
        return F.cross_entropy(outputs, targets, ignore_index=VOID)
    head, auxiliary = (F.cross_entropy(part, targets, ignore_index=VOID) for part in outputs)
    return head + AUXILIARY_WEIGHT * auxiliary


def count_confusion(outputs: Tensor, targets: Tensor) -> Tensor:
    """Count pixels by true class (row) and predicted class (column), without the void ones."""
    known = targets != VOID
    pairs = CLASSES * targets[known] + outputs.argmax(dim=1)[known]
    return torch.bincount(pairs, minlength=CLASSES**2).view(CLASSES, CLASSES).double()


def mean_iou(confusion: Tensor) -> float:
    """Percentage of intersection over union, averaged over the classes that occur."""
    intersection = confusion.diagonal()
    union = confusion.sum(dim=0) + confusion.sum(dim=1) - intersection
    return float(100 * (intersection / union)[union > 0].mean())


CAMVID_PSPNET = Recipe(
    name="camvid-pspnet",
    summary="CamVid, PSPNet from scratch, mean IoU over 11 classes",
    model=partial(PSPNet, classes=CLASSES),
    data=load_camvid,
    memory_format=torch.channels_last,
    loss=pspnet_loss,
    metric=Metric(name="mean_iou", sums=count_confusion, value=mean_iou),
    batch_size=4,
    least_batch_size=2,  # a batch norm over one cell of one image has no variance
    evaluation_batch=4,
    epochs=200,
    learning_rate=0.01,
    weight_decay=1e-4,
    learning_rate_factor=poly_decay(0.9),
    backbones=tuple(RESNETS),
    scheme_defaults={"rate": 0.001, "dense_steps": 200, "warmup_steps": 200, "train_steps": 300},
)
"""Zhao et al. 2017, section 5.1: 16 images a step (here 4 on each of 4 ranks), "poly" with power 0.9. The paper starts
from ImageNet weights, this from random ones."""
