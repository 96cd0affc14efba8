"""What a model's options may say about its features."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import modelserve as ms
from modelserve.errors import ConfigError
from modelserve.features.declaration import Features


def test_names_are_kept_in_order_and_the_group_is_the_entity() -> None:
    """Without a group, rows are called as the entity."""
    features = Features("user_id", ["b", "a"], defaults={"a": 1})
    assert features.names == ("b", "a")
    assert features.stored_as == "user_id"
    assert Features("user_id", ["a"], group="user_spend").stored_as == "user_spend"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"names": "avg"}, "list of features"),
        ({"names": []}, "at least one feature"),
        ({"entity": ""}, "name an entity"),
        ({"names": ["a", "a"]}, "named twice"),
        ({"names": ["user_id"]}, "cannot be a feature as well"),
        ({"names": ["_ts"]}, "belong to the store"),
        ({"names": ["_id"]}, "belong to the store"),
        ({"defaults": {"z": 1}}, "not among the names"),
        ({"entity": "user:id"}, "set group="),
        ({"group": ""}, "set group="),
        ({"group": "g" * 129}, "set group="),
        ({"budget_ms": 0}, "budget_ms"),
        ({"budget_ms": math.inf}, "budget_ms"),
        ({"max_age_s": -1}, "max_age_s"),
        ({"max_age_s": math.nan}, "max_age_s"),
    ],
)
def test_what_is_wrong_is_said(wrong: dict[str, Any], said: str) -> None:
    """Each mistake has its sentence."""
    with pytest.raises(ValueError, match=said):
        Features(**({"entity": "user_id", "names": ["a"]} | wrong))


def test_options_take_one_or_several() -> None:
    """A model reads features of any number of entities, in a list or a tuple."""
    one, other = Features("user_id", ["a"]), Features("item_id", ["b"])
    assert ms.ModelOptions().declared_features == ()
    assert ms.ModelOptions(features=one).declared_features == (one,)
    assert ms.ModelOptions(features=(one, other)).declared_features == (one, other)
    assert ms.ModelOptions.model_validate({"features": [one, other]}).declared_features == (one, other)


@pytest.mark.parametrize(
    ("second", "said"), [(Features("item_id", ["a"]), "declared twice"), (Features("a", ["b"]), "as a key and")]
)
def test_declarations_that_contradict_each_other_are_refused(second: Features, said: str) -> None:
    """A feature has one source, and a key is no feature."""
    with pytest.raises(ValidationError, match=said):
        ms.ModelOptions(features=(Features("user_id", ["a"]), second))


def test_a_file_declares_them(tmp_path: Path) -> None:
    """In TOML, features are a table of the model, or a list of them."""
    path = tmp_path / "modelserve.toml"
    path.write_text(
        'features = "redis://localhost"\n'
        "[models.churn.features]\n"
        'entity = "user_id"\nnames = ["a"]\ndefaults = {a = 0.5}\nmax_age_s = 60\n'
        "[[models.ctr.features]]\n"
        'entity = "user_id"\nnames = ["a"]\n'
        "[[models.ctr.features]]\n"
        'entity = "item_id"\nnames = ["b"]\nbudget_ms = 10\n'
    )
    settings = ms.Settings.load(path)
    assert settings.features == "redis://localhost"
    assert settings.models is not None
    assert settings.models["churn"].declared_features == (
        Features("user_id", ["a"], defaults={"a": 0.5}, max_age_s=60),
    )
    assert [each.entity for each in settings.models["ctr"].declared_features] == ["user_id", "item_id"]
    assert settings.models["ctr"].declared_features[1].budget_ms == 10


@pytest.mark.parametrize(
    ("line", "said"), [('names = ["a", "a"]', "named twice"), ('names = ["a"]\nmax_age = 5', "max_age: Unexpected")]
)
def test_a_mistake_in_a_file_is_told_with_its_place(tmp_path: Path, line: str, said: str) -> None:
    """The error names the model's option and what is wrong; an option that there is not is a mistake."""
    path = tmp_path / "modelserve.toml"
    path.write_text(f'[models.churn.features]\nentity = "user_id"\n{line}\n')
    with pytest.raises(ConfigError, match=rf"models\.churn\.features.*{said}"):
        ms.Settings.load(path)
