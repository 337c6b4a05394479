"""Where training images come from, and in which order: every order is a pure function of (seed, epoch)."""

from __future__ import annotations

import hashlib
import math
import os
import zipfile
import zlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from ..crops import by
from ..errors import DecompkError
from ..fx.imports import brief, imported

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "food101": "Food101"}
SAMPLED = 256  # training files that the mean is taken over

Batches = Generator[tuple[Tensor, Tensor], None, None]


class Images:
    """N labelled images of one shape (C, H, W).

    labels: (N,) int64 on the CPU. resident: whether all images lie in one tensor, so that a batch reads nothing.
    """

    resident: bool
    shape: tuple[int, int, int]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, order: Sequence[Tensor], device: torch.device | str) -> Batches:
        """For each index tensor of `order`: x (n, C, H, W), uint8 or float32, and y (n,) int64, both on `device`."""
        raise NotImplementedError

    def _mean(self) -> tuple[float, ...]:
        """One number per channel, of uint8 images in units of 255."""
        raise NotImplementedError

    def _identify(self, digest: Any) -> None:
        """Adds to a hash what tells these images from others."""


class ResidentImages(Images):
    """All images in one tensor, which moves to the device of the first batch and stays there."""

    resident = True

    def __init__(self, pixels: np.ndarray, labels: np.ndarray):
        self.pixels, self.labels = torch.from_numpy(pixels), torch.from_numpy(labels.astype(np.int64))
        self.shape = pixels.shape[1:]

    def batches(self, order: Sequence[Tensor], device: torch.device | str) -> Batches:
        self.pixels = self.pixels.to(device)
        pixels, labels = self.pixels, self.labels.to(device)
        for picked in order:
            picked = picked.to(device, non_blocking=True)
            yield pixels.index_select(0, picked), labels.index_select(0, picked)

    def _mean(self) -> tuple[float, ...]:
        unit = 255 if self.pixels.dtype == torch.uint8 else 1
        return tuple((self.pixels.numpy().mean((0, 2, 3), dtype=np.float64) / unit).tolist())

    def _identify(self, digest: Any) -> None:
        digest.update(f"{tuple(self.pixels.shape)} {self.pixels.dtype}".encode())
        digest.update(self.pixels.numpy().reshape(-1))


class FileImages(Images):
    """Image files, decoded when a batch picks them: RGB, the centre scaled (bilinear, antialiased) to `size` (H, W).

    workers: processes that decode ahead; the batches are the same for any number of them.
    """

    resident = False

    def __init__(self, files: Sequence[Path], labels: Sequence[int], size: tuple[int, int], workers: int = 0):
        imported("PIL.Image", "image files are decoded with Pillow: pip install 'decompk[train]'")
        self.files, self.labels = list(files), torch.tensor(labels, dtype=torch.int64)
        self.shape, self.workers = (3, *size), workers

    def batches(self, order: Sequence[Tensor], device: torch.device | str) -> Batches:
        files: Any = self.files  # any sequence is a Dataset
        loader: DataLoader[Any] = DataLoader(
            files,
            batch_sampler=[picked.tolist() for picked in order],
            collate_fn=partial(_decoded, size=self.shape[1:]),
            num_workers=self.workers,
            pin_memory=torch.device(device).type == "cuda",
            generator=torch.Generator(),  # its own: the loader would advance torch's global one
        )
        for picked, x in zip(order, loader, strict=True):
            if isinstance(x, str):
                raise DecompkError(x)
            yield x.to(device, non_blocking=True), self.labels[picked].to(device, non_blocking=True)

    def _mean(self) -> tuple[float, ...]:
        spread = torch.linspace(0, len(self) - 1, min(len(self), SAMPLED), dtype=torch.float64).round().long()
        sums = [x.sum((0, 2, 3), dtype=torch.float64) for x, _ in self.batches(spread.split(16), "cpu")]
        _, height, width = self.shape
        return tuple((torch.stack(sums).sum(0) / (255 * len(spread) * height * width)).tolist())

    def _identify(self, digest: Any) -> None:
        for file in self.files:
            digest.update(f"{file.parent.name}/{file.name} {file.stat().st_size}\n".encode())


@dataclass(frozen=True)
class Dataset:
    """Labelled images for training and for testing.

    input_size: (C, H, W). classes: their names, in the order of the labels. mean: per channel, of the training images
    (of files, of up to 256 spread evenly over them), in the units the network sees: uint8 images in units of 255,
    float images in their own. fingerprint: 16 hex digits that are equal for equal data, wherever it lies; of files,
    their names and sizes count, not their bytes.
    """

    name: str
    input_size: tuple[int, int, int]
    classes: tuple[str, ...]
    train: Images
    test: Images
    mean: tuple[float, ...]
    fingerprint: str


def open_data(spec: str, size: int | tuple[int, int] | None = None, workers: int = 0) -> Dataset:
    """The data that `spec` names.

    spec: "digits" (scikit-learn's, enlarged to 32×32, a fifth held out), "FILE.npz" with x_train, y_train, x_test and
    y_test (x: N×H×W or N×H×W×C, uint8 or float, y: 0..n−1), a folder with train/CLASS/ and test/CLASS/ (or val/ or
    validation/) holding images, "cifar10:ROOT", "cifar100:ROOT" or "food101:ROOT" (torchvision's, already there).
    size: pixels, or (height, width), of digits and files (224 if None); the others keep theirs. workers: processes that
    decode files. Raises DecompkError.
    """
    if workers < 0:
        raise DecompkError(f"{workers} workers cannot decode images; give 0 to decode in the process itself, or more.")
    pixels = None if size is None else (size, size) if isinstance(size, int) else tuple(size)
    if pixels is not None and (len(pixels) != 2 or not all(isinstance(p, int) and p > 0 for p in pixels)):
        raise DecompkError(f"{size!r} is no size; give pixels, or (height, width), each 1 or more.")
    check_named(spec)
    kind, _, root = spec.partition(":")
    path = Path(spec).expanduser()
    try:
        if spec == "digits":
            return _digits(pixels or (32, 32))
        if kind in TORCHVISION and root:
            return _torchvision(kind, Path(root).expanduser(), pixels, workers)
        return _folder(path, pixels or (224, 224), workers) if path.is_dir() else _npz(path, pixels)
    except OSError as error:
        raise DecompkError(f"{error.filename or spec} cannot be read ({error.strerror or error}).") from error


def check_named(spec: str) -> None:
    """Raise DecompkError unless `spec` names data that may be read."""
    kind, _, root = spec.partition(":")
    path = Path(spec).expanduser()
    there = bool(spec) and os.path.exists(path)
    named = root if kind in TORCHVISION else there and (path.is_dir() or path.suffix.lower() == ".npz")
    if not (spec == "digits" or named):
        lacking = "" if there or kind in TORCHVISION or not spec else ", and no such file or folder exists"
        raise DecompkError(
            f"{spec!r} names no data{lacking}: give 'digits', a FILE.npz with x_train, y_train, x_test and y_test, a "
            "folder with train/CLASS/ and test/CLASS/ (or val/), 'cifar10:ROOT', 'cifar100:ROOT' or 'food101:ROOT'."
        )


def seed_of(*numbers: int) -> int:
    """A seed of 63 bits that depends on all the numbers and their order, the same on every machine."""
    text = ",".join(str(int(number)) for number in numbers)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def epoch_order(n: int, batch: int, seed: int, epoch: int, iterations: int | None = None) -> list[Tensor]:
    """The batches of an epoch as index tensors (int64, CPU), drawn from (seed, epoch) alone.

    One permutation of n samples; the last batch is smaller where n does not divide, but never a single sample, which
    batch norm cannot take: that one joins the batch before. `iterations` asks for so many full batches instead, drawn
    from one permutation after the other.
    """
    _check_positive(samples=n, batch=batch, iterations=1 if iterations is None else iterations)
    generator = torch.Generator().manual_seed(seed_of(seed, epoch))
    wanted = n if iterations is None else iterations * batch
    passes = [torch.randperm(n, generator=generator) for _ in range(math.ceil(wanted / n))]
    drawn = torch.cat(passes)[:wanted]
    order = list(drawn.split(batch))
    if len(order) > 1 and len(order[-1]) == 1 < batch:
        order[-2:] = [drawn[-batch - 1 :]]
    return order


def test_order(n: int, batch: int) -> list[Tensor]:
    """All n samples in order, `batch` at a time; the last batch may be smaller."""
    _check_positive(samples=n, batch=batch)
    return list(torch.arange(n).split(batch))


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise DecompkError(f"the order of an epoch needs 1 or more: {name} is {number}.")


def _dataset(name: str, classes: Sequence[str], train: Images, test: Images) -> Dataset:
    digest: Any = hashlib.sha256(repr((train.shape, tuple(classes))).encode())
    for images in (train, test):
        digest.update(images.labels.numpy())
        images._identify(digest)
    return Dataset(name, train.shape, tuple(classes), train, test, train._mean(), digest.hexdigest()[:16])


def _digits(size: tuple[int, int]) -> Dataset:
    needs = "'digits' are scikit-learn's: pip install 'decompk[train]'"
    load = imported("sklearn.datasets", needs).load_digits
    split = imported("sklearn.model_selection", needs).train_test_split
    images, labels = load(return_X_y=True)
    x = torch.from_numpy(images).reshape(-1, 1, 8, 8) * (255 / 16)
    pixels = F.interpolate(x, size, mode="bilinear").round().to(torch.uint8).numpy()
    parts = split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    train, test = (ResidentImages(pixels[part], labels[part]) for part in parts)
    return _dataset("digits", [str(k) for k in range(10)], train, test)


def _torchvision(kind: str, root: Path, size: tuple[int, int] | None, workers: int) -> Dataset:
    name = TORCHVISION[kind]
    make = getattr(imported("torchvision", f"{name} is read with torchvision: pip install torchvision").datasets, name)
    food = kind == "food101"
    splits = [{"split": "train"}, {"split": "test"}] if food else [{"train": True}, {"train": False}]
    try:
        parts = [make(str(root), download=False, **split) for split in splits]
    except (RuntimeError, OSError, ValueError) as error:
        raise DecompkError(
            f"{name} was looked for in {root} and is not there, or not whole ({brief(error)}): "
            f"download it with torchvision.datasets.{name}, or name another folder."
        ) from error
    both: list[Images]
    if food:
        both = [FileImages(part._image_files, part._labels, size or (224, 224), workers) for part in parts]
    else:
        _keep_size(root, parts[0].data.shape[1:3], size)
        both = [ResidentImages(_channels_first(part.data, np.uint8), np.array(part.targets)) for part in parts]
    return _dataset(kind, parts[0].classes, *both)


def _folder(root: Path, size: tuple[int, int], workers: int) -> Dataset:
    train = root / "train"
    test = next((root / name for name in ("test", "val", "validation") if (root / name).is_dir()), None)
    if not train.is_dir() or test is None:
        lacking = "no folder train" if test else "no folder test, val or validation"
        raise DecompkError(f"{root} holds {lacking}; data in a folder needs train/CLASS/ and test/CLASS/ (or val/).")
    listed = {split: _class_files(split) for split in (train, test)}
    for name in sorted(listed[train].keys() ^ listed[test].keys()):
        has, lacks = (train, test) if name in listed[train] else (test, train)
        raise DecompkError(f"the class {name!r} is in {has} but not in {lacks}; give both the same classes.")
    both = []
    for found in listed.values():
        files, labels = zip(*((file, k) for k, files in enumerate(found.values()) for file in files), strict=True)
        both.append(FileImages(files, labels, size, workers))
    return _dataset(root.resolve().name, list(listed[train]), *both)


def _class_files(split: Path) -> dict[str, list[Path]]:
    """The image files of each class, both sorted by name."""
    found = {}
    for folder in sorted(p for p in split.iterdir() if p.is_dir() and not p.name.startswith(".")):
        images = (p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
        found[folder.name] = sorted(images)
        if not found[folder.name]:
            raise DecompkError(f"{folder} holds no images ({', '.join(SUFFIXES)}).")
    if not found:
        raise DecompkError(f"{split} holds no folders; put the images of each class in a folder of its name.")
    return found


def _npz(path: Path, size: tuple[int, int] | None) -> Dataset:
    names = ("x_train", "y_train", "x_test", "y_test")
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise DecompkError(f"{path} is no npz file, or is cut short; write it with numpy.savez.")
    arrays, name = {}, names[0]
    try:
        with np.load(path, allow_pickle=False) as archive:
            for name in names:
                arrays[name] = np.asarray(archive[name])  # bytes, if it is no .npy file
    except KeyError as error:
        raise DecompkError(f"{path} holds no array {name}; it needs {', '.join(names)}.") from error
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, RuntimeError) as error:
        raise DecompkError(f"{path}: {name} cannot be read as a plain array ({brief(error)}).") from error
    x_train, x_test = (_npz_images(f"{path}: {name}", arrays.pop(name)) for name in ("x_train", "x_test"))
    if x_train.shape[1:] != x_test.shape[1:] or x_train.dtype != x_test.dtype:
        what = f"{x_train.dtype} {by(x_train.shape[1:])} and {x_test.dtype} {by(x_test.shape[1:])}"
        raise DecompkError(f"{path}: the images of x_train and x_test differ, {what} (C×H×W).")
    _keep_size(path, x_train.shape[2:], size)
    y_train = _npz_labels(f"{path}: y_train", arrays["y_train"], len(x_train), limit=len(x_train))
    classes = int(y_train.max()) + 1
    y_test = _npz_labels(f"{path}: y_test", arrays["y_test"], len(x_test), limit=classes)
    train, test = ResidentImages(x_train, y_train), ResidentImages(x_test, y_test)
    return _dataset(path.stem, [str(k) for k in range(classes)], train, test)


def _npz_images(where: str, x: np.ndarray) -> np.ndarray:
    """(N, C, H, W), uint8 or float32."""
    if x.ndim not in (3, 4) or not x.size or (x.dtype != np.uint8 and x.dtype.kind != "f"):
        raise DecompkError(f"{where} is {x.dtype} {x.shape}; images are uint8 or float, N×H×W or N×H×W×C, not empty.")
    if x.ndim == 4 and x.shape[1] in (1, 3) and x.shape[3] > 4:
        raise DecompkError(f"{where} is {by(x.shape)}, which looks like N×C×H×W; put the channels last.")
    with np.errstate(over="ignore"):  # becomes infinite, which is refused below
        x = _channels_first(x.reshape(*x.shape[:3], -1), np.uint8 if x.dtype == np.uint8 else np.float32)
    if not (np.isfinite(x.min()) and np.isfinite(x.max())):
        raise DecompkError(f"{where} holds numbers that are not finite in float32; repair or remove them.")
    return x


def _npz_labels(where: str, y: np.ndarray, images: int, limit: int) -> np.ndarray:
    if y.dtype.kind not in "iu" or y.shape not in ((images,), (images, 1)):
        raise DecompkError(f"{where} is {y.dtype} {y.shape}; labels are integers, one for each of {images} images.")
    for label in (int(y.min()), int(y.max())):
        if not 0 <= label < limit:
            known = "; the classes are those of y_train" if where.endswith("y_test") else ""
            raise DecompkError(f"{where} holds the label {label}; labels are 0 to n−1 for n classes{known}.")
    return y.reshape(-1)


def _channels_first(x: np.ndarray, dtype: Any) -> np.ndarray:
    """(N, H, W, C) → (N, C, H, W), contiguous and of `dtype`, in one copy or none."""
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2), dtype=dtype)


def _keep_size(source: Path, have: Sequence[int], size: tuple[int, int] | None) -> None:
    if size is not None and tuple(have) != size:
        raise DecompkError(f"{source} holds images of {by(have)}, used as they are; leave out the size {by(size)}.")


def _decoded(files: list[Path], size: tuple[int, int]) -> Tensor | str:
    """(n, 3, H, W) uint8; or, in a sentence, what is wrong: an error raised in a worker would bring its traceback."""
    from PIL import Image, ImageOps

    height, width = size
    batch = torch.empty(len(files), 3, height, width, dtype=torch.uint8)
    for i, file in enumerate(files):
        try:
            with Image.open(file) as image:
                picture = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.BILINEAR)
        except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, …
            return f"{file} cannot be read as an image: {brief(error)}; repair or remove it."
        batch[i] = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    return batch
