"""Configs: overrides from text, refusals that help, JSON there and back."""

import json

import pytest
import timm

from dpdl_core.config import (
    direction_spaces,
    from_json,
    override,
    pooled_stages,
    quartered_stages,
    recipe,
    stage_numbers,
    to_json,
)


def test_overrides_are_typed():
    config = override(recipe("edge"), {"eps": "0.01", "folds": "3", "patch_spaces": "5+7, 3-7s"})
    assert (config.eps, config.folds) == (0.01, 3)
    assert config.patch_spaces == ("5+7", "3-7s")
    assert override(config, {"pooled_spaces": ""}).pooled_spaces == ()
    assert override(config, {"rotate": "true", "tuned_stages": "2"}).rotate is True


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("no_key", "1", "patch_prototypes"),
        ("folds", "many", "whole number"),
        ("rotate", "perhaps", "true or false"),
        ("folds", "1", "at least 2"),
        ("eps", "0", "above 0"),
        ("eps", "inf", "finite"),
        ("head_learning_rate", "nan", "finite"),
        ("head_weight_decay", "-1", "head_weight_decay=-1.0: need a finite number, 0 or more"),
        ("dispersion_weight", "nan", "finite"),
        ("patch_worst", "1.5", "at most 1"),
        ("patch_spaces", "7-5", "7-5"),
        ("pooled_spaces", "zero", "zero"),
        ("pooled_spaces", "5-7q", "5-7q.*of one stage"),
        ("patch_spaces", "", "at least one"),
        ("patch_spaces", "5s, 3-7, 5s", "patch_spaces=5s,3-7,5s: need each space once"),
        ("pooled_spaces", "7,7", "pooled_spaces=7,7: need each space once"),
        ("tune_batch", "16", "multiple of 3"),
        ("renew_every_epochs", "5", "tuned_stages=0: renew_every_epochs=5 would do nothing"),
        ("kappa", "5", "tuned_stages=0: kappa=5.0 would do nothing"),
        ("literal_loss", "true", "tuned_stages=0: literal_loss=True would do nothing"),
        ("tune_epochs", "9", "set tuned_stages"),
    ],
)
def test_what_cannot_be_is_told(key, value, told):
    with pytest.raises(ValueError, match=told):
        override(recipe("edge"), {key: value})


def test_the_papers_trunk_has_torchvisions_weights():
    """Whose normalisation and name timm knows; by `resnet18` alone it would give others."""
    trunk = recipe("paper").trunk
    assert timm.create_model(trunk, pretrained=False).pretrained_cfg["tag"] == "tv_in1k"


@pytest.mark.parametrize("name", ["edge", "paper"])
def test_json_there_and_back(name):
    assert from_json(to_json(recipe(name))) == recipe(name)


def test_a_saved_config_with_settings_that_did_nothing_is_read():
    saved = json.loads(to_json(recipe("edge"))) | {"kappa": 5.0, "rotate": True, "eps": 0.01}
    assert from_json(json.dumps(saved)) == override(recipe("edge"), {"eps": "0.01"})
    tuned = saved | {"tuned_stages": 2}
    assert from_json(json.dumps(tuned)).kappa == 5.0


def test_a_recipe_that_tunes_needs_all_of_it_undone():
    with pytest.raises(ValueError, match="rotate=True would do nothing"):
        override(recipe("paper"), {"tuned_stages": "0"})
    override(recipe("paper"), {"tuned_stages": "0", "rotate": "false"})


@pytest.mark.parametrize("text", ["", "[1]", '{"later": 1}', '{"folds": "x"}'])
def test_broken_json_is_a_value_error(text):
    with pytest.raises(ValueError):
        from_json(text)


def test_unknown_recipe():
    with pytest.raises(ValueError, match="edge"):
        recipe("soup")


def test_pooled_spaces_by_their_names():
    config = override(recipe("edge"), {"pooled_spaces": "7q,5qe,3-4e,2+6"})
    assert direction_spaces(config) == ["7q", "2+6"]
    assert quartered_stages(config) == [4, 6]
    assert pooled_stages(config) == [1, 2, 3, 4, 5, 6]


def test_stage_numbers():
    assert stage_numbers("3+5-7") == [2, 4, 5, 6]
