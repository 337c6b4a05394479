"""Recipes: presets, TOML files over them, single values over both; and the rates they come to."""

import json

import pytest

from decompk.errors import DecompkError
from decompk.train import Phase, load_recipe, presets
from decompk.train.recipe import toml_value
from decompk.train.schedule import Schedule


def test_the_papers_cifar_training_is_a_preset():
    recipe = load_recipe("cifar")
    assert (recipe.model, recipe.batch, recipe.crop, recipe.partitions) == ("resnet32", 32, 20, 4)
    epochs = [recipe.phase(name).epochs for name in ("members", "global", "random")]
    assert epochs == [120, 80, 200] and epochs[0] + epochs[1] == epochs[2]
    rates = Schedule(recipe.random, [0])
    assert [rates.rates(e)[0] for e in (0, 79, 80, 140, 160, 180)] == pytest.approx(
        [1e-3, 1e-3, 1e-4, 1e-5, 1e-6, 5e-7]
    )
    rates = Schedule(recipe.global_, [0])
    assert [rates.rates(e)[0] for e in (0, 20, 40, 60)] == pytest.approx([1e-4, 1e-5, 1e-6, 5e-7])
    assert recipe.augment.flip and recipe.augment.shift == 0.1 and recipe.augment.rotate == 0


def test_the_papers_food101_training_is_a_preset():
    recipe = load_recipe("food101")
    assert (recipe.batch, recipe.iterations, recipe.crop, recipe.size) == (128, 300, 140, 224)
    assert [recipe.phase(name).epochs for name in ("members", "global", "random")] == [100, 100, 200]
    assert recipe.augment.rotate > 0 and recipe.augment.zoom > 0


def test_every_preset_loads_and_survives_json():
    assert set(presets()) >= {"quick", "cifar", "food101"}
    for name in presets():
        recipe = load_recipe(name)
        assert load_recipe(json.loads(json.dumps(recipe.as_dict()))) == recipe


def test_a_toml_file_goes_before_the_preset_and_single_values_before_both(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text("batch = 16\n[members]\nepochs = 3\nlr = [1e-3, 2e-3, 3e-3, 4e-3]\n")
    recipe = load_recipe("quick", path, {"members.epochs": 5, "random": False})
    assert recipe.batch == 16 and recipe.members.epochs == 5 and recipe.random is None
    assert recipe.members.lr == (1e-3, 2e-3, 3e-3, 4e-3)
    assert recipe.global_ == load_recipe("quick").global_


def test_values_of_a_command_line_are_tomls():
    assert [toml_value(text) for text in ("3", "1e-3", "true", "[1, 2]", "adam", '"x"')] == [
        3,
        1e-3,
        True,
        [1, 2],
        "adam",
        "x",
    ]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"btach": 3}, "no 'btach'"),
        ({"members.epoch": 3}, "no 'members.epoch'"),
        ({"batch": "many"}, "'batch' is 'many'"),
        ({"batch": 1.5}, "'batch' is 1.5"),
        ({"batch": True}, "'batch' is True"),
        ({"batch": 1}, "at least 2"),
        ({"members.lr": -1}, "lr = -1.0 must not be negative"),
        ({"members.lr": "fast"}, "'members.lr' is 'fast'"),
        ({"members.optimizer": "lion"}, "'lion' is none of sgd, adam, adamw"),
        ({"members.drops": [[3]]}, "'members.drops'"),
        ({"members.drops": [[3, 0]]}, "pairs of an epoch and a divisor"),
        ({"members.epochs": -1}, "epochs = -1 must not be negative"),
        ({"precision": "int8"}, "'int8' is none of float32, bf16, float64"),
        ({"parallel": "magic"}, "'magic' is none of ddp, fsdp"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "seeds"),
        ({"augment.shift": 2.0}, "shift"),
        ({"save_seconds": -1}, "save_seconds"),
    ],
)
def test_wrong_values_are_refused_by_name(changes, sentence):
    with pytest.raises(DecompkError, match=r"recipe|preset") as caught:
        load_recipe("quick", changes=changes)
    assert sentence in str(caught.value)


def test_unknown_presets_and_unreadable_files_are_refused(tmp_path):
    with pytest.raises(DecompkError, match=r"no preset is called 'slow'; choose one of cifar, food101, quick\."):
        load_recipe("slow")
    with pytest.raises(DecompkError, match="cannot be read"):
        load_recipe(config=tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("batch = = 3")
    with pytest.raises(DecompkError, match="is not TOML"):
        load_recipe(config=tmp_path / "bad.toml")
    (tmp_path / "part.toml").write_text("batch = 3")
    with pytest.raises(DecompkError, match=r"lacks 'model'; give a --preset"):
        load_recipe(config=tmp_path / "part.toml")


def test_a_plateau_divides_one_members_rate_by_the_root_of_ten_and_leaves_the_others():
    schedule = Schedule(Phase(epochs=9, lr=(1e-2, 2e-2), plateau=2, least_lr=1e-3, drops=((6, 10.0),)), [0, 1])
    for epoch, accuracy in enumerate([(50, 50), (50, 60), (49, 70)]):
        assert schedule.rates(epoch) == pytest.approx([1e-2, 2e-2])
        schedule.observe(accuracy)
    assert schedule.rates(3) == pytest.approx([1e-2 / 10**0.5, 2e-2])
    for _ in range(2):
        schedule.observe((40, 80))
    assert schedule.rates(5) == pytest.approx([1e-3, 2e-2])
    for _ in range(2):
        schedule.observe((40, 80.5))
    assert schedule.rates(5)[0] == 1e-3  # not below least_lr
    assert schedule.rates(6)[1] == pytest.approx(2e-3)


def test_patience_names_each_member_once_and_its_state_can_be_carried_over():
    schedule = Schedule(Phase(epochs=9, patience=2), [0, 1, 2])
    assert schedule.observe((1, 1, 1)) == []
    assert schedule.observe((1, 2, 1)) == []
    again = Schedule(Phase(epochs=9, patience=2), [0, 1, 2])
    again.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
    for one in (schedule, again):
        assert one.observe((1, 3, 1)) == [0, 2]
        assert one.observe((1, 3, 1)) == []
        assert one.observe((1, 3, 1)) == [1]
