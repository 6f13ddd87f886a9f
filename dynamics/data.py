"""Image data sets, 32 × 32 and in memory, served as normalised batches on any device."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from zlib import error as DecompressionError

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

from .errors import first_line

if TYPE_CHECKING:
    from torchvision.datasets import VisionDataset

Batch = tuple[Tensor, Tensor]
Splits = tuple[Batch, Batch]

SIZE = 32
PADDING = 4
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")

# What torchvision and the unpacking raise, between them, for files cut short, overwritten, unreadable or unreachable.
UNREADABLE = (
    AssertionError, DecompressionError, EOFError, HTTPException, LookupError, OSError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip


class DataError(RuntimeError):
    """Files of a data set are damaged, or cannot be downloaded. The message is one line."""


def normalise(images: Tensor) -> Tensor:
    """uint8 in [0, 255] → x / 127.5 − 1 in [−1, 1], in torch's default floating type: mean = std = 0.5 of x / 255."""
    return images / 127.5 - 1


def crop_and_flip(images: Tensor, *, flip: bool, generator: torch.Generator | None) -> Tensor:
    """Each image of (N, C, S, S) shifted by −4 … 4 pixels both ways, zeros moving in, and mirrored half of the time.

    A random crop of the image padded by 4, drawn per image; no mirroring where `flip` is false. The draws come from
    `generator` on the CPU (None: torch's global one), so that a seed means the same on every device.
    """
    count = len(images)
    rows, columns = torch.randint(2 * PADDING + 1, (2, count), generator=generator).to(images.device, non_blocking=True)
    windows = functional.pad(images, (PADDING,) * 4).unfold(2, images.shape[2], 1).unfold(3, images.shape[3], 1)
    crops = windows[torch.arange(count, device=images.device), :, rows, columns]
    if not flip:
        return crops
    mirrored = torch.randint(2, (count, 1, 1, 1), generator=generator).to(images.device, non_blocking=True)
    return torch.where(mirrored == 1, crops.flip(3), crops)


@dataclass(frozen=True, eq=False, repr=False)
class ImageSet(Dataset[Batch]):
    """Images (N, C, 32, 32) as uint8 with labels (N,) as int64; `flip` says that a mirrored image keeps its label."""

    images: Tensor
    labels: Tensor
    flip: bool

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: int | list[int]) -> Batch:
        """The raw image and label at one index, or all those at a list of indices in one operation."""
        where = torch.as_tensor(indices).to(self.images.device, non_blocking=True)
        return self.images[where], self.labels[where]

    def __repr__(self) -> str:
        return f"ImageSet({' × '.join(map(str, self.images.shape))}, flip={self.flip})"

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool = False,
        augment: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> DataLoader[Batch]:
        """Iterate over (inputs, labels) on `device`: inputs (B, C, 32, 32) in [−1, 1], labels (B,); B ≤ batch_size.

        shuffle: a new order in each pass. augment: `crop_and_flip` of every image. Both draw from `generator`
        (None: torch's global one); without them nothing is drawn. The last batch may be smaller. Inputs are
        channels-last in memory, as are the weights of `dynamics.models`.
        The set moves to `device` here, once, as bytes; batches are then cut there, and training never waits for a copy.
        """
        resident = replace(self, images=self.images.to(device), labels=self.labels.to(device))
        order = RandomSampler(self, generator=generator) if shuffle else SequentialSampler(self)

        def prepare(batch: Any) -> Batch:
            images, labels = batch
            shown = crop_and_flip(images, flip=self.flip, generator=generator) if augment else images
            return normalise(shown.contiguous(memory_format=torch.channels_last)), labels

        return DataLoader(
            resident,
            batch_size=None,
            sampler=BatchSampler(order, batch_size, drop_last=False),
            collate_fn=prepare,
            # A loader draws a seed for its workers in every pass, even with none: not from the caller's generator.
            generator=torch.Generator(),
        )

    def sample(self, n: int, generator: torch.Generator | None = None) -> ImageSet:
        """n images drawn without replacement, or all of them (in a random order) if there are fewer.

        Raises ValueError for n below 1.
        """
        if n < 1:
            raise ValueError(f"n is {n}: a sample has at least 1 image")
        return self._subset(torch.randperm(len(self), generator=generator)[:n])

    def class_balanced(self, per_class: int, generator: torch.Generator | None = None) -> ImageSet:
        """`per_class` images of each class drawn without replacement, class after class; all if a class has fewer.

        Raises ValueError for per_class below 1.
        """
        if per_class < 1:
            raise ValueError(f"per_class is {per_class}: a balanced sample has at least 1 image of each class")
        order = torch.randperm(len(self), generator=generator)
        shuffled = self.labels[order]
        return self._subset(torch.cat([order[shuffled == label][:per_class] for label in shuffled.unique()]))

    def _subset(self, indices: Tensor) -> ImageSet:
        return replace(self, images=self.images[indices], labels=self.labels[indices])


@dataclass(frozen=True)
class Data:
    """A data set: its name, number of classes, channels of an image, and the two splits."""

    name: str
    num_classes: int
    channels: int
    train: ImageSet
    test: ImageSet

    def balanced(self, count: int, generator: torch.Generator | None = None) -> ImageSet:
        """About `count` training images, equally many of each class and at least one: see `ImageSet.class_balanced`."""
        return self.train.class_balanced(max(count // self.num_classes, 1), generator)


def load(name: str, *, root: str | os.PathLike[str] | None = None, download: bool = False) -> Data:
    """The data set `name`, a key of `DATASETS`, read into memory.

    root: folder of the files in torchvision's layout; None: environment variable THETADOT_DATA, else ~/.cache/thetadot.
    download: download into root what is not on this machine.

    Raises ValueError for an unknown name, FileNotFoundError for a data set that is not on disk if `download` is false,
    DataError for damaged files or a failed download.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}")
    row = DATASETS[name]
    folder = Path(root or os.environ.get("THETADOT_DATA") or "~/.cache/thetadot").expanduser()
    train, test = (ImageSet(*split, flip=row.flip) for split in row.read(folder, download))
    return Data(name, row.num_classes, row.channels, train, test)


def read_digits(root: Path, download: bool) -> Splits:
    """The 8 × 8 digits that ship with scikit-learn, enlarged bilinearly; a fixed, stratified 80 / 20 split.

    Nothing is read from root nor downloaded. Values 0 … 16 become 0 … 255.
    """
    from sklearn.datasets import load_digits  # what takes seconds to import waits until it is read
    from sklearn.model_selection import train_test_split

    pixels, digits = load_digits(return_X_y=True)
    grey = torch.as_tensor(pixels).view(-1, 1, 8, 8) * (255 / 16)
    images = functional.interpolate(grey, size=(SIZE, SIZE), mode="bilinear").round().to(torch.uint8)
    labels = torch.as_tensor(digits, dtype=torch.int64)
    train, test = train_test_split(range(len(labels)), test_size=0.2, random_state=0, stratify=digits)
    return (images[train], labels[train]), (images[test], labels[test])


def read_fashion_mnist(root: Path, download: bool) -> Splits:
    """Fashion-MNIST, 28 × 28 padded to 32 × 32: from root, else from Debian's package, else downloaded."""
    files = "FashionMNIST/raw/*-ubyte"
    archives = sorted(DEBIAN_FASHION_MNIST.glob("*.gz"))
    if any(root.glob(files)) or not archives:
        elsewhere = f" (nor under {DEBIAN_FASHION_MNIST}: `apt-get install dataset-fashion-mnist` puts it there)"
        return read_stored(root, download, kind="FashionMNIST", files=files, elsewhere=elsewhere)
    problem, remedy = f"cannot read {DEBIAN_FASHION_MNIST}", "try `apt-get install --reinstall dataset-fashion-mnist`"
    from torchvision.datasets.utils import extract_archive

    with TemporaryDirectory() as folder, as_data_error(problem, remedy):
        raw = Path(folder, files).parent
        raw.mkdir(parents=True)
        for archive in archives:
            extract_archive(archive, raw)
        return splits("FashionMNIST", Path(folder), download=False)


def read_stored(root: Path, download: bool, *, kind: str, files: str, elsewhere: str = "") -> Splits:
    """What torchvision's reader of the name `kind` finds under root, where `files` is the pattern of its files.

    elsewhere: where else they were looked for, for the message.
    """
    if download:
        with as_data_error(f"cannot download {kind} to {root}", f"check the network, or delete {root / files}"):
            return splits(kind, root, download=True)
    if not any(root.glob(files)):
        advice = "download it with --download, or give its folder with --root (in a file: `download: true`, `root:`)"
        raise FileNotFoundError(f"{kind} is not on disk: found no {root / files}{elsewhere}; {advice}")
    with as_data_error(f"{root / files} is damaged or incomplete", "delete it and run again with --download"):
        return splits(kind, root, download=False)


@contextmanager
def as_data_error(problem: str, remedy: str) -> Iterator[None]:
    """Whatever reading files raises becomes one DataError of one line, with the original as its cause."""
    try:
        yield
    except UNREADABLE as error:
        raise DataError(f"{problem} ({first_line(error)}); {remedy}") from error


def splits(kind: str, root: Path, *, download: bool) -> Splits:
    """(images, labels) of torchvision's training and test splits, as uint8 (N, C, 32, 32) and int64."""
    from torchvision import datasets

    train, test = (getattr(datasets, kind)(root, train=train, download=download) for train in (True, False))
    return batch(train), batch(test)


def batch(dataset: VisionDataset) -> Batch:
    """All of a torchvision set at once: CIFAR (N, 32, 32, 3) has its channels moved, Fashion-MNIST is padded."""
    pixels = torch.as_tensor(dataset.data)
    images = pixels.movedim(3, 1) if pixels.dim() == 4 else pixels.unsqueeze(1)
    border = (SIZE - images.shape[-1]) // 2
    return functional.pad(images, (border,) * 4).contiguous(), torch.as_tensor(dataset.targets, dtype=torch.int64)


@dataclass(frozen=True)
class DatasetRow:
    """What is known of a data set before it is read; `read` maps (root, download) to its training and test split."""

    num_classes: int
    channels: int
    flip: bool
    read: Callable[[Path, bool], Splits]


read_cifar10 = partial(read_stored, kind="CIFAR10", files="cifar-10-batches-py/*")
read_cifar100 = partial(read_stored, kind="CIFAR100", files="cifar-100-python/*")

DATASETS: dict[str, DatasetRow] = {
    "digits": DatasetRow(10, 1, False, read_digits),  # 1,797 handwritten digits, part of scikit-learn: always there
    "fashion-mnist": DatasetRow(10, 1, True, read_fashion_mnist),  # 70,000 grey images of clothes
    "cifar10": DatasetRow(10, 3, True, read_cifar10),  # 60,000 colour images
    "cifar100": DatasetRow(100, 3, True, read_cifar100),  # 60,000 colour images
}
