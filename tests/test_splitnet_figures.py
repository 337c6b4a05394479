"""What SplitNet's two figures draw: the distribution of assignments over steps, and weights sorted by group."""

import subprocess
import sys

import numpy as np
import pytest
from matplotlib import image as png
from matplotlib.colors import to_rgba

from decompk.report.figure import BLUE, GRAY, ORANGE
from decompk.splitnet import figures
from decompk.splitnet.figures import draw_assignments, draw_weights, shares, step_edges


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn."""
    found, new = [], figures.new_figure
    monkeypatch.setattr(figures, "new_figure", lambda *size: found.append(new(*size)) or found[-1])
    return found


def is_picture(path, width, height):
    """A PNG of about that many inches, with more on it than one colour."""
    pixels = png.imread(path)
    assert pixels.shape[:2] == pytest.approx((110 * height, 110 * width), abs=2)
    return path.stat().st_size > 3000 and pixels[..., :3].std() > 0.05


# ---- assignments ----------------------------------------------------------------------------------------------------


def parting(steps, n, groups=2):
    """values (T, n · groups) of `shares`: from all equal to 0 and 1."""
    rng = np.random.default_rng(0)
    goes = np.eye(groups)[rng.integers(0, groups, n)] * rng.uniform(5, 20, (n, 1))
    z = np.exp(np.linspace(0, 1, steps)[:, None, None] * goes)
    return (z / z.sum(2, keepdims=True)).reshape(steps, -1)


def test_shares_are_those_counted_by_hand():
    values = np.array([[0.0, 0.1, 0.25, 0.49], [0.5, 0.75, 1.0, 1.0], [0.3, 0.3, 0.3, 0.3]])
    expected = [[0.5, 0.5, 0, 0], [0, 0, 0.25, 0.75], [0, 1, 0, 0]]
    assert np.array_equal(shares(values, 4), expected)
    assert np.array_equal(shares(values.astype(np.float32), 4), expected)
    assert np.array_equal(shares(values[:1], 1), [[1]])


def test_rounding_beyond_0_and_1_stays_in_the_outer_bins():
    values = np.array([[-1e-7, 1 + 1e-7, 1 - 1e-7]])
    assert shares(values, 3) == pytest.approx(np.array([[1 / 3, 0, 2 / 3]]))


def test_columns_meet_halfway_between_steps():
    assert np.array_equal(step_edges([1, 2, 4, 10]), [1, 1.5, 3, 7, 10])
    assert np.array_equal(step_edges(range(2)), [0, 0.5, 1])
    assert np.array_equal(step_edges([7]), [6.5, 7.5])


def test_every_panel_shows_its_history(tmp_path, drawn):
    steps = [1, 2, 4, 8, 16, 32]
    histories = {"softmax": (steps, parting(6, 50)), "reduced gradient": (range(1, 41), parting(40, 30, 3))}
    draw_assignments(histories, tmp_path / "a.png")
    assert is_picture(tmp_path / "a.png", 8.6, 3.5)
    *panels, bar = drawn[0].axes
    assert [axes.get_title() for axes in panels] == [*histories] and bar.get_ylabel() == "share of assignments"
    for axes, (at, values) in zip(panels, histories.values(), strict=True):
        (mesh,) = axes.collections
        assert np.array_equal(mesh.get_array().filled(0), shares(values).T)
        assert np.array_equal(mesh.get_array().mask, shares(values).T == 0)
        assert np.array_equal(mesh.get_coordinates()[0, :, 0], step_edges(at))
        assert axes.get_xlim() == (at[0], at[-1]) and axes.get_ylim() == (0, 1)
    assert panels[0].get_ylabel() == "assignment" and panels[0].get_xlabel() == "step"
    assert {"0.1 %", "1 %", "10 %", "100 %"} <= {label.get_text() for label in bar.get_yticklabels()}


def test_where_there_is_nothing_it_is_white_and_what_is_rare_is_not(tmp_path, drawn):
    values = np.zeros((2, 100_000))
    values[:, 0] = 0.5
    draw_assignments({"one of many": ([0, 1], values)}, tmp_path / "a.png")
    mesh = drawn[0].axes[0].collections[0]
    colors = mesh.to_rgba(mesh.get_array())[:, 0]
    assert np.array_equal(np.flatnonzero(colors[:, 3]), [0, figures.BINS // 2])
    assert colors[figures.BINS // 2, :3].max() < 0.98 and colors[0, :3].mean() < 0.4


@pytest.mark.parametrize(("count", "shape"), [(1, (1, 1)), (3, (1, 3)), (4, (2, 2)), (5, (2, 3)), (6, (2, 3))])
def test_panels_stand_in_rows_of_at_most_three(tmp_path, drawn, count, shape):
    draw_assignments({f"run {i}": (range(3), parting(3, 4)) for i in range(count)}, tmp_path / "a.png")
    assert is_picture(tmp_path / "a.png", 1.4 + 3.6 * shape[1], 0.2 + 3.3 * shape[0])
    assert sum(axes.get_visible() for axes in drawn[0].axes) == count + 1


@pytest.mark.parametrize("steps", [1, 2, 2000])
def test_few_and_many_steps_are_drawn(tmp_path, steps):
    draw_assignments({"Deep": (range(1, steps + 1), parting(steps, 2))}, tmp_path / "a.png")
    assert is_picture(tmp_path / "a.png", 5, 3.5)


# ---- weights --------------------------------------------------------------------------------------------------------


def layer(rows, columns, seed=0):
    """before, after, rows and columns of `draw_weights`, from the groups of outputs and inputs; −1 reads all."""
    rows, columns = np.array(rows), np.array(columns)
    by_row, by_column = np.argsort(rows, kind="stable"), np.argsort(columns, kind="stable")
    before = np.random.default_rng(seed).uniform(0.2, 1, (len(rows), len(columns)))
    before[(rows[:, None] != columns) & (columns >= 0)] = 0.01
    return before, before[by_row][:, by_column], rows[by_row], columns[by_column]


def shown(axes, size):
    """The matrix (O, I) of that size that the image of `axes` shows: each entry is cut into equal pieces."""
    pieces = axes.images[0].get_array()
    rows, columns = (whole // part for whole, part in zip(pieces.shape, size, strict=True))
    matrix = pieces[::rows, ::columns]
    assert matrix.shape == size and np.array_equal(matrix.repeat(rows, 0).repeat(columns, 1), pieces)
    return matrix


def strips(axes):
    """{"rows" or "columns": [(colour, first edge, last edge), ...]} of the lines outside the matrix."""
    found = {"rows": [], "columns": []}
    for line in axes.lines:
        if not line.get_clip_on():
            x, y = line.get_data()
            side, ends = ("rows", y) if x[0] == x[1] else ("columns", x)
            found[side].append((line.get_color(), *ends))
    return found


def borders(axes):
    """Where lines cross the matrix: of the rows, of the columns."""
    crossing = [line.get_data() for line in axes.lines if line.get_clip_on()]
    return [y[0] for x, y in crossing if x == [0, 1]], [x[0] for x, y in crossing if y == [0, 1]]


def test_both_orders_of_every_layer_are_drawn_with_the_groups_of_the_sorted_one(tmp_path, drawn):
    weights = {"fc": layer([1, 0, 1], [0, 1, 1, 0, 0]), "layer3.conv1": layer([0, 1, 1, 0], [-1, -1, -1], 1)}
    draw_weights(weights, tmp_path / "w.png")
    assert png.imread(tmp_path / "w.png").shape[1] == 1100 and (tmp_path / "w.png").stat().st_size > 3000
    panels = [axes for axes in drawn[0].axes if axes.images and axes.get_xlabel()]
    assert len(panels) == 4
    for (left, right), (name, (before, after, _, _)) in zip((panels[:2], panels[2:]), weights.items(), strict=True):
        assert np.array_equal(shown(left, before.shape), before) and np.array_equal(shown(right, after.shape), after)
        assert name in left.get_title() and not strips(left)["rows"] and borders(left) == ([], [])
        assert left.images[0].get_clim() == right.images[0].get_clim() == (0, before.max())
        assert all((axes.get_xlabel(), axes.get_ylabel()) == ("inputs", "outputs") for axes in (left, right))
        assert right.get_xlim() == (-0.5, after.shape[1] - 0.5) and right.get_ylim() == (after.shape[0] - 0.5, -0.5)
    assert strips(panels[1]) == {
        "rows": [(BLUE, -0.5, 0.5), (ORANGE, 0.5, 2.5)],
        "columns": [(BLUE, -0.5, 2.5), (ORANGE, 2.5, 4.5)],
    }
    assert borders(panels[1]) == ([0.5], [2.5])
    assert strips(panels[3])["columns"] == [(GRAY, -0.5, 2.5)] and borders(panels[3]) == ([1.5], [])
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["group 1", "group 2", "in no group"]
    assert [patch.get_facecolor() for patch in legend.get_patches()] == [to_rgba(c) for c in (BLUE, ORANGE, GRAY)]


def test_a_few_large_weights_do_not_leave_the_others_white(tmp_path, drawn):
    before, after, rows, columns = layer([0, 1] * 10, [0, 1] * 20)
    before[0, 0] = after[0, 0] = 1000
    draw_weights({"fc": (before, after, rows, columns)}, tmp_path / "w.png")
    assert 0.9 < drawn[0].axes[0].images[0].get_clim()[1] <= 1


@pytest.mark.parametrize(
    "weights",
    [
        layer([0], [0]),
        layer([1], [0, 1, 1]),
        layer(np.arange(10) % 4, np.arange(256) % 4),
        layer(np.arange(10) % 10, np.arange(1300) % 10),
        (np.zeros((2, 3)), np.zeros((2, 3)), np.array([0, 1]), np.array([0, 0, 1])),
    ],
    ids=["one weight", "one row", "wide", "wider than its pixels", "zeros"],
)
def test_layers_of_any_shape_are_drawn(tmp_path, weights, drawn):
    draw_weights({"fc": weights}, tmp_path / "w.png")
    assert is_picture(tmp_path / "w.png", *drawn[0].get_size_inches())
    assert np.array_equal(shown(drawn[0].axes[1], weights[1].shape), weights[1])


def test_matplotlib_is_loaded_only_to_draw():
    code = "import sys, decompk.splitnet.figures; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
