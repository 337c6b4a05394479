import pytest
import torch

from decompk import Crop, PartitionError
from decompk.crops import make_crops


def starts(*arguments, **options):
    return [crop.start for crop in make_crops(*arguments, **options)]


def test_a_grid_drops_the_last_pixels_that_do_not_divide():
    crops = make_crops((9, 11), 4)
    assert crops == (Crop(0, 0, 4, 5), Crop(0, 5, 4, 5), Crop(4, 0, 4, 5), Crop(4, 5, 4, 5))


def test_the_papers_crops():
    assert starts((32, 32), 4, 20) == [(0, 0), (0, 12), (12, 0), (12, 12)]
    assert starts((224, 224), 4, 140)[-1] == (84, 84)
    sixteen = make_crops((224, 224), 16, 70, margin=24)
    assert sixteen[0] == Crop(24, 24, 70, 70) and sixteen[-1] == Crop(130, 130, 70, 70) and len(sixteen) == 16
    assert len(make_crops((224, 224), (2, 4), 96)) == 8


def test_signals_and_volumes_are_cut_too():
    assert make_crops((10,), 3) == (Crop(0, 3), Crop(3, 3), Crop(6, 3))
    assert len(make_crops((4, 4, 4), 8)) == 8
    assert make_crops((4, 4, 4), (1, 2, 1))[1] == Crop(0, 2, 0, 4, 2, 4)


def test_a_number_of_partitions_is_the_squarest_grid_there_is():
    grids = {2: (1, 2), 3: (1, 3), 4: (2, 2), 5: (1, 5), 6: (2, 3), 8: (2, 4), 12: (3, 4), 16: (4, 4), 18: (3, 6)}
    for K, grid in grids.items():
        assert make_crops((36, 72), K) == make_crops((36, 72), grid)
    cubes = {2: (1, 1, 2), 4: (1, 2, 2), 8: (2, 2, 2), 12: (2, 2, 3), 27: (3, 3, 3), 7: (1, 1, 7)}
    for K, grid in cubes.items():
        assert make_crops((12, 12, 84), K) == make_crops((12, 12, 84), grid)


def test_a_crop_is_a_view_with_named_sides():
    crop = Crop(1, 2, 3, 4)
    assert (crop.top, crop.left, crop.height, crop.width) == (1, 2, 3, 4)
    x = torch.arange(100).reshape(1, 1, 10, 10)
    assert torch.equal(crop.cut(x), x[:, :, 1:4, 2:6])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (((32, 32), 0), "a positive number"),
        (((8, 8, 8), -8), "a positive number"),
        (((32, 32), (2, 2, 2)), "2 axes"),
        (((32, 32), 4, 40), "between 1 and 32"),
        (((32, 32), 4, None, 16), "margin of 16"),
        (((32, 32), 4, None, -1), "margin of -1 is no border"),
        (((32, 32), 4, None, 1.5), "margin of 1.5 is no border"),
        (((32, 32), "4"), "partitions '4' must be a number"),
        (((32, 32), 4, "8"), "crop_size '8' must be whole numbers"),
        (((32, 32), [Crop(20, 20, 16, 16)]), "outside"),
        (((32, 32), [Crop(0, 0, 16, 16), Crop(0, 0, 8, 8)]), "differ in size"),
        (((32, 32), [Crop(0, 16)]), "has 1 axes"),
        (((32, 32), [Crop(0, 0, 8, 8)], 8), "fixes both"),
        (((32, 32), 4, (8, 8, 8)), "2 spatial axes"),
        (((3, 3), 16), "crop"),
    ],
)
def test_a_cut_that_does_not_fit_is_refused_in_one_sentence(arguments, words):
    with pytest.raises(PartitionError, match=words) as caught:
        make_crops(*arguments)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_a_crop_needs_starts_and_sizes():
    with pytest.raises(PartitionError, match="3 numbers"):
        Crop(1, 2, 3)
