"""Every source of images with real files, its refusals, and orders that depend on (seed, epoch) alone."""

import builtins
import hashlib
import json
import multiprocessing
import pickle
import shutil
import sys
import types
import zipfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from zoo import torchvision as real_torchvision

from decompk import DecompkError
from decompk.train import data
from decompk.train.data import epoch_order, open_data, seed_of


def refused(spec, words, **options):
    with pytest.raises(DecompkError) as caught:
        open_data(str(spec), **options)
    message = str(caught.value)
    assert words in message and "\n" not in message and message.endswith("."), message


def everything(images, batch=3):
    """All batches in order, joined."""
    x, y = zip(*images.batches(data.test_order(len(images), batch), "cpu"), strict=True)
    return torch.cat(x), torch.cat(y)


def draw(path, number, size=(12, 10)):
    """A picture, (width, height), that differs for every number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGB", size, (number * 7 % 256, number * 31 % 256, 40))
    picture.paste((250, number * 13 % 256, 9), (2, 2, 6, 5))
    picture.save(path)


@pytest.fixture
def folder(tmp_path):
    """Two classes; 7 pictures to train, 4 to test; beside them files that are none."""
    root = tmp_path / "pets"
    for k, name in enumerate(("dog", "cat")):
        for i in range(3 + k):
            draw(root / "train" / name / f"{i}.{('png', 'bmp', 'JPG', 'webp')[i]}", 10 * k + i)
        for i in range(2):
            draw(root / "test" / name / f"{i}.jpeg", 50 + 10 * k + i)
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    (root / "train" / "cat" / "._0.png").write_text("no image")
    (root / "train" / ".cache").mkdir()
    return root


def test_a_folder_is_read_class_by_class_in_sorted_order(folder):
    pets = open_data(str(folder), size=8)
    assert (pets.name, pets.input_size, pets.classes) == ("pets", (3, 8, 8), ("cat", "dog"))
    assert len(pets.train) == 7 and len(pets.test) == 4 and not pets.train.resident
    assert pets.train.labels.dtype == torch.int64 and pets.train.labels.tolist() == [0] * 4 + [1] * 3
    x, y = everything(pets.train)
    assert x.dtype == torch.uint8 and x.shape == (7, 3, 8, 8) and x.is_contiguous()
    assert torch.equal(y, pets.train.labels)
    assert pets.mean == pytest.approx((x.double() / 255).mean((0, 2, 3)).tolist(), abs=1e-12)
    assert open_data(str(folder)).input_size == (3, 224, 224)


@pytest.mark.parametrize("other", ["val", "validation"])
def test_the_images_to_test_with_may_lie_in_val_or_validation(folder, other):
    (folder / "test").rename(folder / other)
    assert len(open_data(str(folder), size=8).test) == 4


def test_an_image_of_the_right_size_is_taken_pixel_by_pixel(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / split / "a" / "0.png")
    x, _ = everything(open_data(str(tmp_path), size=(6, 8)).train)
    assert torch.equal(x[0], torch.from_numpy(pixels).permute(2, 0, 1))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_other_colour_modes_become_rgb(tmp_path, mode):
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        suffix = "jpg" if mode == "CMYK" else "png"
        grey = Image.new("RGB", (9, 9), (90, 90, 90))
        (grey.quantize(2) if mode == "P" else grey.convert(mode)).save(tmp_path / split / "a" / f"0.{suffix}")
    x, _ = everything(open_data(str(tmp_path), size=5).train)
    assert x.shape == (1, 3, 5, 5) and (x.int() - 90).abs().max() <= 2


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (44, 44), (21, 90)])
def test_the_shorter_side_is_scaled_and_the_centre_cut(tmp_path, shape):
    """Beside torch's own antialiased resizing: the whole image scaled, then the centre cut."""
    height, width = shape
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([y * 255 / height, x * 255 / width, (x + y) * 255 / (height + width)], -1).astype(np.uint8)
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.fromarray(smooth).save(tmp_path / split / "a" / "0.png")
    ours, _ = everything(open_data(str(tmp_path), size=20).train)
    scale = 20 / min(shape)
    scaled = (round(height * scale), round(width * scale))
    whole = F.interpolate(
        torch.from_numpy(smooth).permute(2, 0, 1)[None].float(), scaled, mode="bilinear", antialias=True
    )
    top, left = (scaled[0] - 20) // 2, (scaled[1] - 20) // 2
    theirs = whole[:, :, top : top + 20, left : left + 20]
    one_pixel = 255 * max(1 / scaled[0], 1 / scaled[1])  # the cut may fall between two pixels
    assert (ours - theirs).abs().max() <= one_pixel + 1


def test_workers_change_nothing_and_leave_the_global_random_state_alone(folder):
    order = [torch.tensor(rows) for rows in ([6, 0, 3], [1, 1], [5], [2, 4])]
    state = torch.get_rng_state()
    alone, helped = (list(open_data(str(folder), 8, workers).train.batches(order, "cpu")) for workers in (0, 2))
    assert torch.equal(torch.get_rng_state(), state)
    for rows, (x, y), (same_x, same_y) in zip(order, alone, helped, strict=True):
        assert torch.equal(x, same_x) and torch.equal(y, same_y) and len(x) == len(rows)
        assert y.tolist() == [int(row >= 4) for row in rows]


def test_each_picked_file_is_opened_once_and_no_other(folder, monkeypatch):
    images = open_data(str(folder), size=8).train
    opened, really = Counter(), builtins.open

    def counting(file, *arguments, **options):
        opened[str(file)] += 1
        return really(file, *arguments, **options)

    monkeypatch.setattr(builtins, "open", counting)
    list(images.batches([torch.tensor([0, 5]), torch.tensor([2])], "cpu"))
    assert opened == {str(images.files[i]): 1 for i in (0, 5, 2)}


def test_an_iterator_closed_early_stops_its_workers(folder):
    batches = open_data(str(folder), 8, workers=2).train.batches(epoch_order(7, 2, 0, 0) * 5, "cpu")
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named_in_one_sentence(folder, workers):
    images = open_data(str(folder), 8, workers).train
    broken = images.files[1]
    broken.write_bytes(broken.read_bytes()[:40])
    batches = images.batches([torch.tensor([0]), torch.tensor([2, 1])], "cpu")
    next(batches)
    with pytest.raises(DecompkError) as caught:
        next(batches)
    message = str(caught.value)
    assert message.startswith(f"{broken} cannot be read as an image: ") and "\n" not in message
    assert message.endswith("; repair or remove it.")
    assert not multiprocessing.active_children()


def test_a_file_removed_since_is_named_too(folder):
    images = open_data(str(folder), 8).train
    images.files[3].unlink()
    with pytest.raises(DecompkError, match="No such file"):
        everything(images)


def test_the_mean_of_many_files_is_taken_over_256_of_them(tmp_path, monkeypatch):
    for i in range(9):
        draw(tmp_path / "train" / "a" / f"{i}.png", i)
    draw(tmp_path / "test" / "a" / "0.png", 0)
    monkeypatch.setattr(data, "SAMPLED", 3)
    some = open_data(str(tmp_path), size=8)
    x, _ = everything(some.train)
    assert some.mean == pytest.approx((x[[0, 4, 8]].double() / 255).mean((0, 2, 3)).tolist(), abs=1e-12)


def test_a_folder_that_lacks_something_is_refused(folder):
    shutil.move(folder / "test", folder / "elsewhere")
    refused(folder, "no folder test, val or validation")
    shutil.move(folder / "elsewhere", folder / "test")
    shutil.move(folder / "train", folder / "elsewhere")
    refused(folder, "no folder train")
    (folder / "train").mkdir()
    refused(folder, "holds no folders")
    (folder / "train" / "cat").mkdir()
    refused(folder, "holds no images (.jpg, .jpeg, .png, .bmp, .webp)")


def test_classes_that_differ_between_the_splits_are_refused(folder):
    draw(folder / "test" / "bird" / "0.png", 1)
    refused(folder, "the class 'bird' is in")
    shutil.rmtree(folder / "test" / "bird")
    shutil.rmtree(folder / "test" / "cat")
    refused(folder, "the class 'cat' is in")


def test_pillow_is_asked_for_by_name(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    refused(folder, "pip install 'decompk[train]'")


def test_the_fingerprint_of_files_follows_names_labels_sizes_but_not_the_place(folder, tmp_path):
    def fingerprint(path=folder, size=8):
        return open_data(str(path), size).fingerprint

    first = fingerprint()
    assert len(first) == 16 and int(first, 16) >= 0
    shutil.copytree(folder, tmp_path / "copy")
    assert fingerprint(tmp_path / "copy") == first == fingerprint()
    seen = {first, fingerprint(size=9)}
    (folder / "train" / "cat" / "0.png").rename(folder / "train" / "cat" / "9.png")
    seen.add(fingerprint())
    draw(folder / "test" / "dog" / "1.jpeg", 3, size=(30, 31))
    seen.add(fingerprint())
    shutil.move(folder / "train" / "cat" / "9.png", folder / "train" / "dog" / "9.png")
    seen.add(fingerprint())
    assert len(seen) == 5


def arrays(**changes):
    random = np.random.default_rng(1)
    whole = {
        "x_train": random.integers(0, 256, (8, 5, 6, 3), dtype=np.uint8),
        "y_train": np.array([0, 1, 2, 0, 1, 2, 0, 1]),
        "x_test": random.integers(0, 256, (4, 5, 6, 3), dtype=np.uint8),
        "y_test": np.array([2, 1, 0, 0]),
    }
    return {name: array for name, array in {**whole, **changes}.items() if array is not None}


def saved(tmp_path, **changes):
    path = tmp_path / "mine.npz"
    np.savez(path, **arrays(**changes))
    return path


def test_uint8_arrays_stay_uint8(tmp_path):
    mine = open_data(str(saved(tmp_path)))
    assert (mine.name, mine.input_size, mine.classes) == ("mine", (3, 5, 6), ("0", "1", "2"))
    x, y = everything(mine.train)
    assert mine.train.resident and x.dtype == torch.uint8 and x.is_contiguous() and y.dtype == torch.int64
    assert np.array_equal(x.permute(0, 2, 3, 1), arrays()["x_train"])
    assert y.tolist() == [0, 1, 2, 0, 1, 2, 0, 1] and mine.test.labels.tolist() == [2, 1, 0, 0]
    assert mine.mean == pytest.approx((arrays()["x_train"] / 255).mean((0, 1, 2)).tolist(), abs=1e-12)


@pytest.mark.parametrize("dtype", ["float64", ">f8", "float16", "float32"])
def test_float_arrays_keep_their_units_in_float32(tmp_path, dtype):
    x = np.random.default_rng(2).normal(3, 50, (8, 5, 6)).astype(dtype)
    mine = open_data(str(saved(tmp_path, x_train=x, x_test=x[:4])))
    got, _ = everything(mine.train)
    assert mine.input_size == (1, 5, 6) and got.dtype == torch.float32
    assert np.array_equal(got[:, 0], x.astype(np.float32))
    assert mine.mean == pytest.approx([x.astype(np.float32).mean(dtype=np.float64)], rel=1e-9)


def test_labels_may_stand_in_a_column_and_have_any_integer_type(tmp_path):
    mine = open_data(str(saved(tmp_path, y_train=arrays()["y_train"][:, None].astype(np.uint8))))
    assert mine.train.labels.tolist() == arrays()["y_train"].tolist() and mine.train.labels.dtype == torch.int64


def test_a_batch_holds_the_picked_images_and_the_tensor_stays_where_it_is(tmp_path):
    images = open_data(str(saved(tmp_path))).train
    (x, y), (again, _) = images.batches([torch.tensor([7, 0]), torch.tensor([3])], "cpu")
    assert torch.equal(x, images.pixels[[7, 0]]) and y.tolist() == [1, 0] and torch.equal(again[0], images.pixels[3])
    where = images.pixels.data_ptr()
    list(images.batches([torch.tensor([1])], "cpu"))
    assert images.pixels.data_ptr() == where
    images_elsewhere = images.batches([torch.tensor([1])], "meta")
    assert next(images_elsewhere)[0].device.type == images.pixels.device.type == "meta"


def test_arrays_that_need_no_conversion_are_not_copied():
    x = np.zeros((4, 6, 7, 1), np.uint8)
    assert np.shares_memory(data._channels_first(x, np.uint8), x)


FLOATS = np.zeros((8, 5, 6, 3), np.float32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"y_test": None}, "holds no array y_test; it needs x_train, y_train, x_test, y_test"),
        ({"x_train": None}, "holds no array x_train"),
        (
            {"x_train": np.zeros((8, 5), np.uint8)},
            "x_train is uint8 (8, 5); images are uint8 or float, N×H×W or N×H×W×C",
        ),
        ({"x_train": np.uint8(3)}, "x_train is uint8 ()"),
        ({"x_train": np.zeros((0, 5, 6, 3), np.uint8)}, "not empty"),
        ({"x_test": np.zeros((0, 5, 6, 3), np.uint8)}, "x_test is uint8 (0, 5, 6, 3)"),
        ({"x_train": np.zeros((8, 5, 6, 3), np.int16)}, "x_train is int16"),
        ({"x_train": np.zeros((8, 5, 6, 3), complex)}, "x_train is complex128"),
        ({"x_train": np.zeros((8, 3, 32, 32), np.uint8)}, "looks like N×C×H×W; put the channels last"),
        ({"x_train": np.array([{}] * 8)}, "x_train cannot be read as a plain array (Object arrays"),
        ({"y_test": np.array([None] * 4)}, "y_test cannot be read as a plain array (Object arrays"),
        ({"x_train": np.full_like(FLOATS, np.nan)}, "x_train holds numbers that are not finite"),
        ({"x_train": FLOATS.astype(np.float64) - 1e300}, "x_train holds numbers that are not finite in float32"),
        ({"x_train": FLOATS}, "x_train and x_test differ, float32 3×5×6 and uint8 3×5×6"),
        ({"x_test": np.zeros((4, 5, 5, 3), np.uint8)}, "differ, uint8 3×5×6 and uint8 3×5×5"),
        ({"y_train": np.zeros(7, int)}, "y_train is int64 (7,); labels are integers, one for each of 8 images"),
        ({"y_train": np.zeros((8, 3), int)}, "y_train is int64 (8, 3)"),
        ({"y_train": np.zeros(8)}, "y_train is float64 (8,); labels are integers"),
        ({"y_train": np.zeros(8, bool)}, "y_train is bool"),
        ({"y_test": np.zeros(3, int)}, "y_test is int64 (3,)"),
        ({"y_train": np.array([0, 1, 2, -1, 0, 1, 2, 0])}, "y_train holds the label -1; labels are 0 to n−1"),
        ({"y_train": np.array([0, 1, 2, 2**63, 0, 1, 2, 0], np.uint64)}, "y_train holds the label 9223372036854775808"),
        (
            {"y_test": np.array([0, 3, 0, 0])},
            "y_test holds the label 3; labels are 0 to n−1 for n classes; the classes",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_refused_by_name(tmp_path, changes, words):
    path = saved(tmp_path, **changes)
    refused(path, words)
    refused(path, str(path))


def test_a_file_that_holds_no_arrays_is_refused(tmp_path):
    path = tmp_path / "mine.npz"
    refused(path, "names no data, and no such file or folder exists: give 'digits'")
    path.write_bytes(b"")
    refused(path, "is no npz file, or is cut short")
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    refused(path, "is no npz file")
    with zipfile.ZipFile(path, "w") as archive:
        for name in arrays():
            archive.writestr(f"{name}.npy", b"no array")
    refused(path, "x_train is |S8 (); images are uint8 or float")
    content = bytearray(saved(tmp_path).read_bytes())
    content[200:220] = bytes(20)  # inside x_train: its checksum is wrong now
    path.write_bytes(content)
    refused(path, "x_train cannot be read as a plain array (Bad CRC-32")
    path.write_bytes(content[:-100])
    refused(path, "cut short")


def test_arrays_and_cifar_are_not_resized(tmp_path):
    path = saved(tmp_path)
    assert open_data(str(path), size=(5, 6)).input_size == (3, 5, 6)
    refused(path, "holds images of 5×6, used as they are; leave out the size 8×8", size=8)


def test_the_fingerprint_of_arrays_follows_every_pixel_and_label(tmp_path):
    first = open_data(str(saved(tmp_path))).fingerprint
    assert open_data(str(saved(tmp_path))).fingerprint == first
    seen = {first}
    for name in arrays():
        changed = arrays()[name].copy()
        changed.reshape(-1)[-1] ^= 1
        seen.add(open_data(str(saved(tmp_path, **{name: changed}))).fingerprint)
    seen.add(open_data(str(saved(tmp_path, x_train=arrays()["x_train"][::-1].copy()))).fingerprint)
    assert len(seen) == 6


def test_digits_are_enlarged_and_a_fifth_is_held_out_of_every_class():
    digits = open_data("digits")
    assert (digits.name, digits.input_size, digits.classes) == ("digits", (1, 32, 32), tuple("0123456789"))
    assert (len(digits.train), len(digits.test)) == (1437, 360) and digits.train.resident
    assert digits.test.labels.bincount().min() >= 34
    x, _ = everything(digits.train, 500)
    assert x.dtype == torch.uint8 and x.min() == 0 and x.max() == 255
    assert digits.mean == pytest.approx([x.double().mean().item() / 255], abs=1e-12)
    again, small = open_data("digits"), open_data("digits", size=(8, 8))
    assert again.fingerprint == digits.fingerprint != small.fingerprint
    assert torch.equal(again.test.pixels, digits.test.pixels)
    sixteenths = small.train.pixels.float() * 16 / 255
    assert (sixteenths - sixteenths.round()).abs().max() < 0.04  # 0..16, not interpolated


def test_digits_ask_for_scikit_learn_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    refused("digits", "pip install 'decompk[train]'")


@pytest.fixture
def torchvision(monkeypatch, tmp_path):
    """Stands in for torchvision.datasets: the attributes that are used, as the library has them."""

    class CIFAR10:
        classes = ["plane", "car"]

        def __init__(self, root, train=True, download=True):
            assert download is False
            if root != str(tmp_path):
                raise RuntimeError("Dataset not found or corrupted. You can use download=True to download it")
            chw = np.random.default_rng(train).integers(0, 256, (6 if train else 4, 3, 32, 32), dtype=np.uint8)
            self.data, self.targets = chw.transpose(0, 2, 3, 1), [i % 2 for i in range(len(chw))]

    class CIFAR100(CIFAR10):
        classes = ["apple", "bear"]

    class Food101:
        classes = ["apple_pie", "baklava"]

        def __init__(self, root, split="train", download=True):
            assert download is False
            if root != str(tmp_path):
                raise FileNotFoundError(2, "No such file or directory")
            self._image_files = [tmp_path / "food-101" / "images" / name / f"{split}.jpg" for name in self.classes]
            self._labels = [0, 1]
            for i, file in enumerate(self._image_files):
                draw(file, i, (300, 260))

    module = types.ModuleType("torchvision")
    module.datasets = types.SimpleNamespace(CIFAR10=CIFAR10, CIFAR100=CIFAR100, Food101=Food101)
    monkeypatch.setitem(sys.modules, "torchvision", module)
    return module.datasets


@pytest.mark.parametrize(("kind", "classes"), [("cifar10", ("plane", "car")), ("cifar100", ("apple", "bear"))])
def test_cifar_lies_in_memory(torchvision, tmp_path, kind, classes):
    cifar = open_data(f"{kind}:{tmp_path}")
    assert (cifar.name, cifar.input_size, cifar.classes) == (kind, (3, 32, 32), classes)
    assert cifar.train.resident and cifar.train.labels.tolist() == [0, 1] * 3 and len(cifar.test) == 4
    x, _ = everything(cifar.train)
    theirs = torchvision.CIFAR10(str(tmp_path), train=True, download=False).data
    assert np.array_equal(x.permute(0, 2, 3, 1), theirs) and x.is_contiguous()
    refused(f"{kind}:{tmp_path}", "holds images of 32×32, used as they are", size=64)


def test_food101_is_read_from_its_files(torchvision, tmp_path):
    food = open_data(f"food101:{tmp_path}")
    assert (food.name, food.input_size, food.classes) == ("food101", (3, 224, 224), ("apple_pie", "baklava"))
    x, y = everything(food.test)
    assert x.shape == (2, 3, 224, 224) and y.tolist() == [0, 1] and not food.train.resident
    assert open_data(f"food101:{tmp_path}", size=32).input_size == (3, 32, 32)


@pytest.mark.parametrize("kind", ["cifar10", "cifar100", "food101"])
def test_what_torchvision_does_not_find_is_named_with_the_place(torchvision, kind):
    refused(f"{kind}:/nowhere", "was looked for in /nowhere and is not there")


@pytest.mark.parametrize("kind", ["cifar10", "cifar100", "food101"])
def test_torchvision_is_asked_for_by_name(monkeypatch, kind):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    refused(f"{kind}:/nowhere", "is read with torchvision: pip install torchvision")


needs_torchvision = pytest.mark.skipif(real_torchvision is None, reason="torchvision is not installed")


def write_cifar(root, cls, monkeypatch, images=6):
    """Miniature batches in the layout of `cls`, whose table of MD5 sums is made theirs; the pixels by file name."""
    table, pixels, random = {}, {}, np.random.default_rng(0)
    fine = cls.meta["key"].startswith("fine")

    def write(name, content):
        file = root / cls.base_folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(pickle.dumps(content, protocol=2))
        table[name] = hashlib.md5(file.read_bytes()).hexdigest()

    for name, _ in cls.train_list + cls.test_list:
        pixels[name] = random.integers(0, 256, (images, 3, 32, 32), dtype=np.uint8)
        labels = [i % 3 for i in range(images)]
        named = {"coarse_labels": [0] * images, "fine_labels": labels} if fine else {"labels": labels}
        write(name, {"data": pixels[name].reshape(images, 3072), **named})
    write(cls.meta["filename"], {cls.meta["key"]: ["ant", "bee", "cow"], "coarse_label_names": ["animal"]})
    for split in ("train_list", "test_list"):
        monkeypatch.setattr(cls, split, [[name, table[name]] for name, _ in getattr(cls, split)])
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": table[cls.meta["filename"]]})
    return pixels


@needs_torchvision
@pytest.mark.parametrize(("kind", "files"), [("cifar10", 5), ("cifar100", 1)])
def test_torchvisions_own_cifar_is_opened_from_its_pickled_batches(tmp_path, monkeypatch, kind, files):
    cls = getattr(real_torchvision.datasets, kind.upper())
    pixels = write_cifar(tmp_path, cls, monkeypatch)
    cifar = open_data(f"{kind}:{tmp_path}")
    assert (cifar.name, cifar.input_size, cifar.classes) == (kind, (3, 32, 32), ("ant", "bee", "cow"))
    assert (len(cifar.train), len(cifar.test)) == (6 * files, 6)
    for images, listed in ((cifar.train, cls.train_list), (cifar.test, cls.test_list)):
        x, y = everything(images)
        assert np.array_equal(x, np.concatenate([pixels[name] for name, _ in listed])) and x.is_contiguous()
        assert y.tolist() == [0, 1, 2] * (2 * len(listed)) and y.dtype == torch.int64
    batch = tmp_path / cls.base_folder / cls.train_list[0][0]
    batch.write_bytes(batch.read_bytes()[:-1])
    refused(f"{kind}:{tmp_path}", "is not there, or not whole (Dataset not found or corrupted")
    batch.unlink()
    refused(f"{kind}:{tmp_path}", f"download it with torchvision.datasets.{kind.upper()}, or name another folder")


@needs_torchvision
def test_torchvisions_own_food101_is_opened_from_its_lists_and_pictures(tmp_path):
    root = tmp_path / "food-101"
    listed = {"train": {"waffles": [3, 4], "apple_pie": [0, 1, 2]}, "test": {"apple_pie": [5], "waffles": [6]}}
    (root / "meta").mkdir(parents=True)
    (root / "meta" / "classes.txt").write_text("apple_pie\nwaffles\n")
    for split, found in listed.items():
        names = {name: [f"{name}/{number}" for number in numbers] for name, numbers in found.items()}
        (root / "meta" / f"{split}.json").write_text(json.dumps(names))
        (root / "meta" / f"{split}.txt").write_text("\n".join(sum(names.values(), [])))
        for name in sum(names.values(), []):
            draw(root / "images" / f"{name}.jpg", int(name.rpartition("/")[2]), (48, 40))
    draw(root / "images" / "apple_pie" / "9.jpg", 9, (48, 40))  # in neither list
    food = open_data(f"food101:{tmp_path}", size=16)
    assert (food.name, food.input_size, food.classes) == ("food101", (3, 16, 16), ("apple_pie", "waffles"))
    for images, number in ((food.train, [3, 4, 0, 1, 2]), (food.test, [5, 6])):
        x, y = everything(images)
        assert [int(file.stem) for file in images.files] == number and not images.resident
        assert y.tolist() == [int(n in (3, 4, 6)) for n in number]
        background = [n * 7 % 256 for n in number]  # the red of the corner that `draw` leaves
        assert (x[:, 0, -1, -1].int() - torch.tensor(background)).abs().max() <= 8
    (root / "meta" / "test.json").unlink()
    refused(f"food101:{tmp_path}", "is not there, or not whole ([Errno 2] No such file or directory")
    shutil.rmtree(root / "meta")
    refused(f"food101:{tmp_path}", "is not there, or not whole (Dataset not found")


@pytest.mark.parametrize("spec", ["", "cifar10", "cifar10:", __file__, "mnist", "/no/such/folder", "images.tar"])
def test_anything_else_is_refused_with_what_is_possible(spec):
    missing = ", and no such file or folder exists" * (spec in ("mnist", "/no/such/folder", "images.tar"))
    refused(spec, f"names no data{missing}: give 'digits', a FILE.npz")


@pytest.mark.parametrize("size", [0, -3, (8, 0), (8, 8, 8), (8.0, 8), ()])
def test_a_size_that_is_none_is_refused(size):
    refused("digits", "is no size; give pixels, or (height, width)", size=size)


def test_fewer_than_no_workers_are_refused(folder):
    refused(folder, "-1 workers cannot decode images", workers=-1)


@pytest.mark.parametrize(("n", "batch"), [(10, 3), (12, 4), (11, 4), (5, 8), (1, 4), (3, 1)])
def test_an_epoch_sees_every_sample_once(n, batch):
    order = epoch_order(n, batch, seed=3, epoch=5)
    assert all(rows.dtype == torch.int64 for rows in order)
    assert sorted(torch.cat(order).tolist()) == list(range(n))
    assert [len(rows) for rows in order[:-1]] == [batch] * (len(order) - 1)


@pytest.mark.parametrize(
    ("n", "batch", "sizes"),
    [(10, 4, [4, 4, 2]), (9, 4, [4, 5]), (5, 4, [5]), (1, 4, [1]), (3, 1, [1, 1, 1]), (8, 4, [4, 4])],
)
def test_a_tail_of_one_sample_joins_the_batch_before(n, batch, sizes):
    assert [len(rows) for rows in epoch_order(n, batch, 0, 0)] == sizes


def test_an_order_depends_on_seed_and_epoch_alone():
    def joined(seed, epoch):
        return tuple(torch.cat(epoch_order(50, 8, seed, epoch)).tolist())

    state = torch.get_rng_state()
    first = joined(1, 2)
    torch.manual_seed(99)
    assert joined(1, 2) == first
    torch.set_rng_state(state)
    assert len({joined(1, 2), joined(2, 1), joined(1, 3), joined(12, 0), joined(0, 12)}) == 5
    assert torch.equal(torch.get_rng_state(), state)


def test_iterations_fix_the_number_of_full_batches_and_repeat_nothing_too_soon():
    few = epoch_order(100, 8, 0, 0, iterations=5)
    assert [len(rows) for rows in few] == [8] * 5 and len(set(torch.cat(few).tolist())) == 40
    many = torch.cat(epoch_order(10, 4, 0, 0, iterations=7)).tolist()
    assert len(many) == 28
    assert sorted(many[:10]) == sorted(many[10:20]) == list(range(10)) and len(set(many[20:])) == 8
    assert many[:10] != many[10:20]
    assert [len(rows) for rows in epoch_order(3, 8, 0, 0, iterations=2)] == [8, 8]


def test_the_order_of_a_test_is_the_order_of_the_data():
    assert [rows.tolist() for rows in data.test_order(5, 2)] == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: epoch_order(0, 4, 0, 0), "samples is 0"),
        (lambda: epoch_order(4, 0, 0, 0), "batch is 0"),
        (lambda: epoch_order(4, 2, 0, 0, iterations=0), "iterations is 0"),
        (lambda: data.test_order(4, -1), "batch is -1"),
    ],
)
def test_an_order_of_nothing_is_refused(call, words):
    with pytest.raises(DecompkError, match=words):
        call()


def test_a_mixed_seed_is_stable_and_tells_its_numbers_apart():
    assert seed_of(0, 1) == 1506311409109703068
    some = {seed_of(), seed_of(0), seed_of(0, 0), seed_of(1, 0), seed_of(0, 1), seed_of(-1), seed_of(11), seed_of(1, 1)}
    assert len(some) == 8 and all(0 <= seed < 2**63 for seed in some)
