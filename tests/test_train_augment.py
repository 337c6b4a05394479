"""Augmenting a batch against doing it image by image, pixel by pixel, in NumPy."""

import math

import numpy as np
import pytest
import torch

from decompk import DecompkError
from decompk.train.augment import Augment, normalise

EVERYTHING = Augment(flip=True, shift=0.3, rotate=40, zoom=0.4)


def images(n=6, channels=2, height=9, width=12, dtype=torch.uint8):
    random = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (n, channels, height, width), generator=random).to(dtype)


def slowly(x, drawn):
    """Each pixel looked up where it came from: bilinear, beyond the edge the edge's own. float64."""
    x = x.numpy().astype(np.float64)
    out = np.empty_like(x)
    _, _, height, width = x.shape
    for n, (sign, down, right, angle, factor) in enumerate(drawn.tolist()):
        for i in range(height):
            for j in range(width):
                up, across = (height - 1) / 2 - (i - down), (j - right) - (width - 1) / 2  # from the centre
                turned = complex(across, up) * complex(math.cos(angle), -math.sin(angle)) / factor
                row = min(max((height - 1) / 2 - turned.imag, 0), height - 1)
                column = min(max((width - 1) / 2 + sign * turned.real, 0), width - 1)
                top, left = int(row), int(column)
                below, beside = min(top + 1, height - 1), min(left + 1, width - 1)
                a, b = row - top, column - left
                upper = (1 - b) * x[n, :, top, left] + b * x[n, :, top, beside]
                lower = (1 - b) * x[n, :, below, left] + b * x[n, :, below, beside]
                out[n, :, i, j] = (1 - a) * upper + a * lower
    return out


def error(ours, theirs):
    return np.abs(ours.double().numpy() - theirs).max()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("augment", [Augment(flip=True), Augment(shift=0.4), Augment(flip=True, shift=0.4)])
def test_flips_and_shifts_are_exact_and_keep_the_dtype(augment, dtype):
    x = images(16, dtype=dtype)
    drawn = augment.draw(7, 16, 9, 12)
    out = augment(x, seed=7)
    assert out.dtype == dtype and out.is_contiguous()
    assert np.array_equal(out, slowly(x, drawn))
    for n, (sign, down, right, angle, factor) in enumerate(drawn.tolist()):  # said with NumPy's own flip and edges
        assert (angle, factor) == (0, 1) and down == int(down) and right == int(right)
        one = np.flip(x[n].numpy(), -1) if sign < 0 else x[n].numpy()
        one = np.pad(one, ((0, 0), (9, 9), (12, 12)), mode="edge")
        assert np.array_equal(out[n], one[:, 9 - int(down) :, 12 - int(right) :][:, :9, :12])


@pytest.mark.parametrize("augment", [Augment(rotate=180), Augment(zoom=0.5), Augment(True, 0.2, zoom=0.3), EVERYTHING])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_turning_and_zooming_is_one_bilinear_sampling(augment, dtype):
    x = images(dtype=dtype)
    out = augment(x, seed=3)
    assert out.dtype == torch.float32 and out.min() >= 0 and out.max() <= 255
    assert error(out, slowly(x, augment.draw(3, 6, 9, 12))) < 0.01


def test_both_ways_agree_on_flips_and_shifts():
    x = images(32)
    exact = Augment(flip=True, shift=0.4)(x, seed=1)
    sampled = Augment(flip=True, shift=0.4, zoom=1e-7)(x, seed=1)  # the same flips and shifts are drawn
    assert (sampled - exact).abs().max() < 0.01


def always(monkeypatch, *change):
    """Every image gets this change: sign, down, right, radians, magnification."""
    monkeypatch.setattr(Augment, "draw", lambda self, seed, n, height, width: torch.tensor([change] * n))


@pytest.mark.parametrize("quarters", [1, 2, -1])
def test_a_quarter_turn_is_torchs_own(monkeypatch, quarters):
    x = images(height=8, width=8)
    always(monkeypatch, 1.0, 0.0, 0.0, quarters * math.pi / 2, 1.0)
    assert (Augment(rotate=90)(x, seed=0) - torch.rot90(x, quarters, (2, 3))).abs().max() < 0.01


def test_zooming_magnifies_about_the_centre(monkeypatch):
    x = torch.zeros(1, 1, 9, 9)
    x[:, :, 3:6, 3:6] = 1.0
    always(monkeypatch, 1.0, 0.0, 0.0, 0.0, 1.5)
    larger = Augment(zoom=0.5)(x, seed=0)
    assert larger[0, 0, 4, 4] == pytest.approx(1) and larger.sum() > 1.8 * x.sum()
    assert torch.allclose(larger, larger.flip(2)) and torch.allclose(larger, larger.transpose(2, 3))
    always(monkeypatch, 1.0, 0.0, 0.0, 0.0, 0.5)
    assert Augment(zoom=0.5)(x, seed=0).sum() < 0.5 * x.sum()


def test_what_is_drawn_covers_its_range_evenly():
    drawn = Augment(flip=True, shift=0.3, rotate=40, zoom=0.2).draw(0, 20000, 9, 12)
    sign, down, right, angle, factor = drawn.unbind(1)
    assert set(sign.tolist()) == {-1, 1} and abs(sign.mean()) < 0.03
    for pixels, most in ((down, 2), (right, 3)):
        counts = (pixels.long() + most).bincount()
        assert len(counts) == 2 * most + 1 and counts.min() > 0.9 * 20000 / len(counts)
    for value, low, high in ((angle.rad2deg(), -40, 40), (factor, 0.8, 1.2)):
        middle, width = (low + high) / 2, high - low
        assert low <= value.min() < low + 0.01 * width and high - 0.01 * width < value.max() <= high
        assert abs(value.mean() - middle) < 0.01 * width
    assert drawn.T.corrcoef().fill_diagonal_(0).abs().max() < 0.03


def test_what_is_off_leaves_the_rest_as_drawn():
    whole = EVERYTHING.draw(4, 50, 9, 12)
    assert torch.equal(Augment(rotate=40).draw(4, 50, 9, 12)[:, 3], whole[:, 3])
    assert torch.equal(Augment(shift=0.3).draw(4, 50, 9, 12)[:, 1:3], whole[:, 1:3])
    off = torch.tensor([1.0, 0, 0, 0, 1]).expand(50, 5)
    assert torch.equal(Augment().draw(4, 50, 9, 12), off)


@pytest.mark.parametrize("augment", [Augment(flip=True, shift=0.4), EVERYTHING])
def test_slices_of_a_batch_become_slices_of_its_result(augment):
    x = images(7)
    whole = augment(x, seed=2)
    for rows in (slice(0, 3), slice(3, 7), slice(6, 7)):
        assert torch.equal(augment(x[rows], 2, rows, 7), whole[rows])
    with pytest.raises(DecompkError, match="make them agree"):
        augment(x[:2], 2, slice(0, 3), 7)
    with pytest.raises(DecompkError, match="make them agree"):
        augment(x[:2], 2, of=7)


@pytest.mark.parametrize("augment", [Augment(flip=True, shift=0.4), EVERYTHING])
def test_the_seed_alone_decides_and_the_global_random_state_is_left_alone(augment):
    x = images()
    state = torch.get_rng_state()
    first = augment(x, seed=2**62)
    torch.manual_seed(11)
    assert torch.equal(augment(x, seed=2**62), first) and not torch.equal(augment(x, seed=1), first)
    torch.set_rng_state(state)
    augment(x, seed=3)
    assert torch.equal(torch.get_rng_state(), state)


def test_with_everything_off_the_batch_itself_comes_back():
    x = images()
    assert Augment()(x, seed=0) is x


def test_the_input_is_not_changed_and_any_memory_format_will_do():
    x = images(dtype=torch.float32)
    last = x.clone().contiguous(memory_format=torch.channels_last)
    for augment in (Augment(flip=True, shift=0.4), EVERYTHING):
        assert torch.allclose(augment(last, seed=0), augment(x, seed=0), atol=1e-3)
    assert torch.equal(x, images(dtype=torch.float32))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"flip": 0.5}, "flip=0.5"),
        ({"shift": -0.1}, "shift=-0.1"),
        ({"shift": 1}, "shift=1"),
        ({"rotate": -5}, "rotate=-5"),
        ({"rotate": 181}, "rotate=181"),
        ({"rotate": math.nan}, "rotate=nan"),
        ({"zoom": -0.1}, "zoom=-0.1"),
        ({"zoom": 1.0}, "zoom=1.0"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(options, words):
    with pytest.raises(DecompkError, match=words) as caught:
        Augment(**options)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize("mean", [(0.25, 0.5), torch.tensor([0.25, 0.5], dtype=torch.float64)])
def test_normalising_takes_off_the_mean_in_float32(mean):
    x = images()
    expected = x.numpy() / 255 - np.array([0.25, 0.5])[:, None, None]
    ours = normalise(x, mean)
    assert ours.dtype == torch.float32 and error(ours, expected) < 1e-6
    assert torch.equal(normalise(x.float(), mean, scale=True), ours)
    own = normalise(x.float(), mean)
    assert error(own, expected + x.numpy() * (1 - 1 / 255)) < 1e-4
    assert torch.equal(normalise(x.expand(3, *x.shape), mean)[2], ours)


def test_a_mean_of_other_channels_is_refused():
    with pytest.raises(DecompkError, match="images of 2 channels need one each"):
        normalise(images(), (0.5,))
