"""ResNet-20 on CIFAR-10 in plain PyTorch, to see what the recipe should reach: python plain_resnet20.py DATA EPOCHS.

He et al. 2016, section 4.2, on one process, with nothing of lgc in it. A third argument compresses the images as JPEG
of that quality first.
"""

import io
import itertools
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

BATCH = 128


def read(file: Path, quality: int | None) -> tuple[Tensor, Tensor]:
    """Images in [0, 1], and labels."""
    rows = pq.read_table(file).to_pylist()
    images = np.stack([np.asarray(decode(row["img"]["bytes"], quality)) for row in rows])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255), torch.tensor([row["label"] for row in rows])


def decode(encoded: bytes, quality: int | None) -> Image.Image:
    """The image, compressed once more if there is a quality."""
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    if quality is None:
        return image
    compressed = io.BytesIO()
    image.save(compressed, "JPEG", quality=quality)
    return Image.open(compressed)


class Block(nn.Module):
    """Two convolutions and a shortcut without parameters (option A)."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.stride = after // before
        self.one = nn.Conv2d(before, after, 3, self.stride, 1, bias=False)
        self.two = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norm_one, self.norm_two = nn.BatchNorm2d(after), nn.BatchNorm2d(after)
        self.extra = after - before

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_two(self.two(F.relu(self.norm_one(self.one(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(shortcut, (0, 0, 0, 0, self.extra // 2, self.extra // 2)))


def resnet20() -> nn.Module:
    """Of 269,722 parameters."""
    widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
    blocks = [Block(*pair) for pair in itertools.pairwise(widths)]
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    model = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
    return model


def augment(images: Tensor) -> Tensor:
    """Crops of the images padded by 4 pixels, half of them mirrored."""
    padded = F.pad(images, (4, 4, 4, 4))
    crops = torch.empty_like(images)
    for number, image in enumerate(padded):
        down, right = torch.randint(9, (2,)).tolist()
        crop = image[:, down : down + 32, right : right + 32]
        crops[number] = crop.flip(2) if torch.rand(()) < 0.5 else crop
    return crops


def main(folder: Path, epochs: int, quality: int | None = None) -> None:
    """Train, and print loss and accuracy after every epoch."""
    torch.manual_seed(0)
    (train, labels), (test, truth) = (read(folder / f"{split}.parquet", quality) for split in ("train", "test"))
    mean, deviation = train.mean((0, 2, 3), keepdim=True), train.std((0, 2, 3), keepdim=True)
    train, test = (train - mean) / deviation, (test - mean) / deviation
    model = resnet20().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    print(sum(parameter.numel() for parameter in model.parameters()), "parameters", flush=True)
    steps = len(train) // BATCH
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [epochs * steps // 2, epochs * steps * 3 // 4])
    compiled: nn.Module = torch.compile(model)  # type: ignore[assignment]
    for epoch in range(epochs):
        model.train()
        losses: list[float] = []
        for batch in torch.randperm(len(train))[: steps * BATCH].split(BATCH):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(compiled(augment(train[batch])).float(), labels[batch])
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        model.eval()
        with torch.no_grad():
            right = sum(
                (model(x).argmax(1) == y).sum().item() for x, y in zip(test.split(500), truth.split(500), strict=True)
            )
        print(
            f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.4f}, accuracy {100 * right / len(test):.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
