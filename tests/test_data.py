"""Data sets arrive whole, in order and in range; augmentation is the published one; what lacks is said in a line."""

import gzip
import hashlib
import pickle
from collections import Counter
from http.client import IncompleteRead
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional
from torchvision.datasets import CIFAR10, CIFAR100

from dynamics import data
from dynamics.data import DATASETS, ImageSet, crop_and_flip, load

STORED = [name for name in DATASETS if name != "digits"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(count: int, *, channels: int = 3, flip: bool = True) -> ImageSet:
    """Random images, no two alike, each labelled with its own position."""
    images = torch.randint(256, (count, channels, 32, 32), dtype=torch.uint8, generator=seeded())
    return ImageSet(images, torch.arange(count), flip)


def shifted(image: Tensor, down: int, right: int) -> Tensor:
    """The 32 × 32 window of a black canvas with the image in its middle that shows it moved down and right."""
    canvas = torch.zeros(len(image), 40, 40, dtype=image.dtype)
    canvas[:, 4:36, 4:36] = image
    return canvas[:, 4 - down : 36 - down, 4 - right : 36 - right]


def possible(image: Tensor) -> list[bytes]:
    """The 9 × 9 shifts of an image, then the same mirrored."""
    shifts = [shifted(image, down, right) for down in range(-4, 5) for right in range(-4, 5)]
    return [version.numpy().tobytes() for version in (*shifts, *(shift.flip(-1) for shift in shifts))]


def write_cifar(kind: type[CIFAR10], root: Path) -> dict[str, tuple[np.ndarray, list[int]]]:
    """Four images a file in CIFAR's own format: a pickled dictionary with rows of 1024 red, green, then blue bytes."""
    random, written = np.random.default_rng(0), {}
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    for name, _ in kind.train_list + kind.test_list:
        rows = random.integers(0, 256, (4, 3072), dtype=np.uint8)
        labels = random.integers(0, 100 if kind is CIFAR100 else 10, 4).tolist()
        key = "fine_labels" if kind is CIFAR100 else "labels"
        (folder / name).write_bytes(pickle.dumps({"data": rows, key: labels}, protocol=2))
        written[name] = (rows, labels)
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: ["a", "b"]}, protocol=2))
    return written


def expect_cifar(kind: type[CIFAR10], root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torchvision expect the checksums of the files under root; its check stays as strict as it is."""

    def checksum(name: str) -> str:
        return hashlib.md5((root / kind.base_folder / name).read_bytes()).hexdigest()

    for attribute in ("train_list", "test_list"):
        files = [[name, checksum(name)] for name, _ in getattr(kind, attribute)]
        monkeypatch.setattr(kind, attribute, files)
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": checksum(kind.meta["filename"])})


def fashion_files(counts: dict[str, int]) -> dict[str, bytes]:
    """Fashion-MNIST's files with a few images: big-endian header (magic number, sizes), then bytes (IDX format)."""
    random, files = np.random.default_rng(0), {}
    for split, count in counts.items():
        pixels = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        files[f"{split}-images-idx3-ubyte"] = np.array([2051, count, 28, 28], dtype=">i4").tobytes() + pixels.tobytes()
        labels = np.arange(count, dtype=np.uint8) % 10
        files[f"{split}-labels-idx1-ubyte"] = np.array([2049, count], dtype=">i4").tobytes() + labels.tobytes()
    return files


def write_fashion(folder: Path, *, packed: bool) -> dict[str, bytes]:
    folder.mkdir(parents=True)
    files = fashion_files({"train": 5, "t10k": 3})
    for name, content in files.items():
        (folder / (name + ".gz" if packed else name)).write_bytes(gzip.compress(content) if packed else content)
    return files


@pytest.fixture
def no_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(data, "DEBIAN_FASHION_MNIST", tmp_path / "no-package")


def assert_one_line(caught: pytest.ExceptionInfo[Exception]) -> None:
    assert len(str(caught.value).splitlines()) == 1


# What a data set holds


def test_digits_are_all_of_scikit_learns_split_by_class() -> None:
    digits = load("digits")
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    together = Counter(digits.train.labels.tolist()) + Counter(digits.test.labels.tolist())
    assert together == Counter(load_digits().target.tolist())
    share = digits.test.labels.bincount() / digits.train.labels.bincount()
    torch.testing.assert_close(share, torch.full((10,), 0.25), rtol=0, atol=0.02)


def test_enlarged_digit_averages_back_to_the_original_with_its_label() -> None:
    digits, original = load("digits"), load_digits()
    images = torch.cat([digits.train.images, digits.test.images])
    labels = torch.cat([digits.train.labels, digits.test.labels])
    # The middle 2 × 2 of a pixel's 4 × 4 tile lies 1/8 of a pixel around its centre: weights 1/16, 14/16, 1/16.
    weights = torch.tensor([1, 14, 1], dtype=torch.float64) / 16
    framed = functional.pad(torch.as_tensor(original.images).unsqueeze(1) * 255 / 16, (1,) * 4, mode="replicate")
    expected = functional.conv2d(framed, torch.outer(weights, weights).view(1, 1, 3, 3))
    middles = images.double().unfold(2, 4, 4).unfold(3, 4, 4)[..., 1:3, 1:3].mean((-2, -1))
    distances, nearest = torch.cdist(expected.flatten(1), middles.flatten(1), p=float("inf")).min(1)
    assert distances.max() <= 0.5
    assert labels[nearest].tolist() == original.target.tolist()


@pytest.mark.parametrize(("name", "kind"), [("cifar10", CIFAR10), ("cifar100", CIFAR100)])
def test_cifar_holds_the_files_bytes(
    name: str, kind: type[CIFAR10], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = write_cifar(kind, tmp_path)
    expect_cifar(kind, tmp_path, monkeypatch)
    cifar = load(name, root=tmp_path)
    for split, files in ((cifar.train, kind.train_list), (cifar.test, kind.test_list)):
        rows = np.concatenate([written[file][0] for file, _ in files])
        assert split.images.numpy().tobytes() == rows.tobytes()
        assert split.images.shape == (len(rows), 3, 32, 32)
        assert split.labels.tolist() == [label for file, _ in files for label in written[file][1]]


@pytest.mark.parametrize("packed", [False, True], ids=["torchvision layout", "Debian package"])
def test_fashion_mnist_sits_in_a_black_frame(packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package"
    monkeypatch.setattr(data, "DEBIAN_FASHION_MNIST", package)
    files = write_fashion(package if packed else tmp_path / "FashionMNIST" / "raw", packed=packed)
    fashion = load("fashion-mnist", root=tmp_path)
    for split, prefix in ((fashion.train, "train"), (fashion.test, "t10k")):
        pixels = files[f"{prefix}-images-idx3-ubyte"][16:]
        assert split.images[:, 0, 2:30, 2:30].numpy().tobytes() == pixels
        assert split.images.sum() == sum(pixels)
        assert bytes(split.labels.tolist()) == files[f"{prefix}-labels-idx1-ubyte"][8:]


@pytest.mark.skipif(not data.DEBIAN_FASHION_MNIST.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist_package_is_the_whole_set(tmp_path: Path) -> None:
    fashion = load("fashion-mnist", root=tmp_path)
    assert fashion.train.labels.bincount().tolist() == [6000] * 10
    assert fashion.test.labels.bincount().tolist() == [1000] * 10
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", DATASETS)
def test_every_set_has_the_shape_its_row_announces(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_package: None
) -> None:
    write_fashion(tmp_path / "FashionMNIST" / "raw", packed=False)
    for kind in (CIFAR10, CIFAR100):
        write_cifar(kind, tmp_path)
        expect_cifar(kind, tmp_path, monkeypatch)
    row, loaded = DATASETS[name], load(name, root=str(tmp_path))
    assert (loaded.name, loaded.num_classes, loaded.channels) == (name, row.num_classes, row.channels)
    for split in (loaded.train, loaded.test):
        assert split.images.shape == (len(split), row.channels, 32, 32)
        assert (split.images.dtype, split.labels.dtype) == (torch.uint8, torch.int64)
        assert 0 <= split.labels.min() <= split.labels.max() < row.num_classes
        assert split.flip == row.flip
    assert len(repr(loaded)) < 250


# Batches


@pytest.mark.parametrize("batch_size", [1, 4, 10, 99])
def test_plain_batches_are_the_set_in_order_and_in_range(batch_size: int) -> None:
    images = numbered(10)
    batches = images.batches(batch_size)
    inputs, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    expected = (images.images.to(torch.get_default_dtype()) / 255 - 0.5) / 0.5
    assert len(batches) == len(list(batches)) == -(-10 // batch_size)
    assert inputs.dtype == torch.get_default_dtype()
    assert (inputs.min(), inputs.max()) == (-1, 1)
    torch.testing.assert_close(inputs, expected, rtol=0, atol=1e-6)
    assert labels.tolist() == list(range(10))


def test_shuffled_batches_are_a_permutation_and_keep_labels_with_their_images() -> None:
    images = numbered(50)
    inputs, labels = (torch.cat(parts) for parts in zip(*images.batches(8, shuffle=True), strict=True))
    assert labels.tolist() != list(range(50))
    assert sorted(labels.tolist()) == list(range(50))
    assert torch.equal(inputs, data.normalise(images.images[labels]))


@pytest.mark.parametrize("flip", [False, True])
def test_augmented_image_is_one_of_its_shifts_and_mirrors(flip: bool) -> None:
    images = numbered(12, flip=flip)
    for inputs, labels in images.batches(5, shuffle=True, augment=True, generator=seeded()):
        pixels = ((inputs + 1) * 127.5).round().to(torch.uint8)
        for image, label in zip(pixels, labels, strict=True):
            assert image.numpy().tobytes() in possible(images.images[label])[: 162 if flip else 81]


@pytest.mark.parametrize("flip", [False, True])
def test_shifts_and_mirrors_are_equally_likely(flip: bool) -> None:
    image = numbered(1, channels=1).images
    versions = possible(image[0])[: 162 if flip else 81]
    crops = crop_and_flip(image.expand(50 * len(versions), -1, -1, -1), flip=flip, generator=seeded())
    counts = Counter(crop.numpy().tobytes() for crop in crops)
    assert set(counts) == set(versions)
    assert chisquare([counts[version] for version in versions]).pvalue > 0.01


def test_seed_decides_order_and_augmentation() -> None:
    images = numbered(20)

    def first_pass(seed: int) -> Tensor:
        return torch.cat(
            [inputs for inputs, _ in images.batches(8, shuffle=True, augment=True, generator=seeded(seed))]
        )

    assert torch.equal(first_pass(1), first_pass(1))
    assert not torch.equal(first_pass(1), first_pass(2))
    batches = images.batches(8, shuffle=True, generator=seeded())
    orders = [torch.cat([labels for _, labels in batches]).tolist() for _ in range(2)]
    assert orders[0] != orders[1]


def test_without_a_generator_the_global_seed_decides() -> None:
    images = numbered(20)
    passes = []
    for _ in range(2):
        torch.manual_seed(3)
        passes.append(torch.cat([inputs for inputs, _ in images.batches(8, shuffle=True, augment=True)]))
    assert torch.equal(*passes)


@pytest.mark.parametrize("options", [{}, {"shuffle": True, "augment": True, "generator": seeded()}])
def test_global_random_state_is_left_alone(options: dict[str, object]) -> None:
    before = torch.get_rng_state()
    list(numbered(20).batches(8, **options))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_does_not_change_the_batches() -> None:
    images = numbered(20)
    options = {"shuffle": True, "augment": True}
    here = images.batches(8, **options, generator=seeded())
    there = images.batches(8, **options, generator=seeded(), device="cuda")
    for (inputs, labels), (device_inputs, device_labels) in zip(here, there, strict=True):
        assert device_inputs.is_cuda
        torch.testing.assert_close(device_inputs.cpu(), inputs, rtol=0, atol=1e-6)
        assert torch.equal(device_labels.cpu(), labels)


# Samples


def test_balanced_sample_has_as_many_of_each_class_without_repeats() -> None:
    train = load("digits").train
    balanced = train.class_balanced(7, seeded())
    assert balanced.labels.bincount().tolist() == [7] * 10
    assert len({image.numpy().tobytes() for image in balanced.images}) == 70
    originals = {(image.numpy().tobytes(), int(label)) for image, label in zip(train.images, train.labels, strict=True)}
    assert {
        (i.numpy().tobytes(), int(label)) for i, label in zip(balanced.images, balanced.labels, strict=True)
    } < originals


def test_balanced_sample_takes_all_of_a_smaller_class() -> None:
    images = ImageSet(numbered(9).images, torch.tensor([0, 2, 2, 0, 2, 2, 5, 2, 0]), flip=False)
    assert images.class_balanced(3).labels.tolist() == [0, 0, 0, 2, 2, 2, 5]


def test_every_member_of_a_class_may_be_chosen() -> None:
    images, generator = ImageSet(numbered(8).images, torch.arange(8) % 2, flip=False), seeded()
    chosen = {image.numpy().tobytes() for _ in range(60) for image in images.class_balanced(1, generator).images}
    assert len(chosen) == 8


@pytest.mark.parametrize(("n", "size"), [(1, 1), (6, 6), (10, 10), (11, 10)])
def test_sample_has_n_different_images_or_all(n: int, size: int) -> None:
    images = numbered(10)
    sampled = images.sample(n, seeded())
    assert len(sampled) == len(set(sampled.labels.tolist())) == size
    assert torch.equal(sampled.images, images.images[sampled.labels])


def test_seed_decides_the_samples() -> None:
    images = numbered(100)
    for draw in (images.sample, load("digits").train.class_balanced):
        first, again, other = (draw(5, seeded(seed)).images for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


@pytest.mark.parametrize(("method", "argument"), [("sample", "n"), ("class_balanced", "per_class")])
def test_empty_sample_is_refused(method: str, argument: str) -> None:
    with pytest.raises(ValueError, match=f"^{argument} is 0: "):
        getattr(numbered(3), method)(0)


# What is missing, damaged or out of reach


def test_unknown_name_lists_the_options() -> None:
    with pytest.raises(ValueError, match=f"^unknown data set 'mnist': choose one of {', '.join(DATASETS)}$"):
        load("mnist")


@pytest.mark.parametrize("name", STORED)
def test_missing_set_says_where_it_was_looked_for_and_what_to_do(name: str, tmp_path: Path, no_package: None) -> None:
    with pytest.raises(FileNotFoundError, match=rf"found no {tmp_path}.*--download.*--root.*download: true") as caught:
        load(name, root=tmp_path)
    assert_one_line(caught)
    assert ("apt-get install dataset-fashion-mnist" in str(caught.value)) == (name == "fashion-mnist")


def test_root_is_the_environments_or_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("THETADOT_DATA", str(tmp_path / "chosen"))
    with pytest.raises(FileNotFoundError, match=f"found no {tmp_path}/chosen/cifar-10"):
        load("cifar10")
    monkeypatch.delenv("THETADOT_DATA")
    with pytest.raises(FileNotFoundError, match=f"found no {tmp_path}/home/.cache/thetadot/cifar-10"):
        load("cifar10")


@pytest.mark.parametrize(("name", "kind"), [("cifar10", CIFAR10), ("cifar100", CIFAR100)])
def test_cifar_with_a_wrong_checksum_is_damaged(
    name: str, kind: type[CIFAR10], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar(kind, tmp_path)
    expect_cifar(kind, tmp_path, monkeypatch)
    with (tmp_path / kind.base_folder / kind.test_list[0][0]).open("ab") as file:
        file.write(b"!")
    with pytest.raises(RuntimeError, match=r"is damaged or incomplete .*; delete it and .* --download$") as caught:
        load(name, root=tmp_path)
    assert_one_line(caught)


@pytest.mark.parametrize("name", list(fashion_files({"train": 1, "t10k": 1})))
@pytest.mark.parametrize("kept", [0, 2, 3, 6, 8, 10, -1])
def test_fashion_mnist_cut_short_is_damaged(name: str, kept: int, tmp_path: Path, no_package: None) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    content = write_fashion(raw, packed=False)[name]
    (raw / name).write_bytes(content[:kept])
    with pytest.raises(RuntimeError, match=r"is damaged or incomplete .*; delete it and .* --download$") as caught:
        load("fashion-mnist", root=tmp_path)
    assert_one_line(caught)


@pytest.mark.parametrize("magic", [2560 + 3, 2304 + 3, 2048 + 2], ids=["no such type", "int8", "two dimensions"])
def test_fashion_mnist_of_another_kind_is_damaged(magic: int, tmp_path: Path, no_package: None) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    content = write_fashion(raw, packed=False)["train-images-idx3-ubyte"]
    (raw / "train-images-idx3-ubyte").write_bytes(magic.to_bytes(4, "big") + content[4:])
    with pytest.raises(RuntimeError, match=r"is damaged or incomplete .*; delete it and .* --download$") as caught:
        load("fashion-mnist", root=tmp_path)
    assert_one_line(caught)


@pytest.mark.parametrize(
    "damage",
    [b"", b"no gzip", gzip.compress(bytes(99))[:-9], gzip.compress(b"garbage"), gzip.compress(b"")[:10] + b"\xff" * 9],
    ids=["empty", "not packed", "cut short", "other content", "not deflated"],
)
def test_damaged_package_is_named(damage: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package"
    monkeypatch.setattr(data, "DEBIAN_FASHION_MNIST", package)
    write_fashion(package, packed=True)
    (package / "train-images-idx3-ubyte.gz").write_bytes(damage)
    with pytest.raises(RuntimeError, match=f"^cannot read {package} .*apt-get install --reinstall") as caught:
        load("fashion-mnist", root=tmp_path)
    assert_one_line(caught)


@pytest.mark.parametrize("failure", [URLError("no route to host"), IncompleteRead(b"half"), PermissionError(13, "no")])
@pytest.mark.parametrize("name", STORED)
def test_failed_download_is_one_line_with_its_cause(
    name: str, failure: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_package: None
) -> None:
    def unreachable(*arguments: object, **options: object) -> None:
        raise failure

    for module in ("mnist", "cifar"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", unreachable)
    with pytest.raises(RuntimeError, match=f"^cannot download .* to {tmp_path} .*; check the network") as caught:
        load(name, root=tmp_path, download=True)
    assert_one_line(caught)
    assert caught.value.__cause__ is not None


def test_download_fetches_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []

    def fetch(url: str, root: str, **options: object) -> None:
        fetched.append(url)
        write_cifar(CIFAR10, Path(root))

    write_cifar(CIFAR10, tmp_path / "twin")
    expect_cifar(CIFAR10, tmp_path / "twin", monkeypatch)
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fetch)
    for _ in range(2):
        assert len(load("cifar10", root=tmp_path, download=True).train) == 20
    assert fetched == [CIFAR10.url]
