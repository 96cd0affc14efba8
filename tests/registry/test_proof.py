"""What registration proves on the caller's own rows: they are answered as the model itself does, or there is no row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.compose import make_column_transformer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler
from sklearn.tree import DecisionTreeClassifier

import modelserve as ms
from modelserve.registry.proof import require_same_as_given
from modelserve.types import Array, Columns

Served = Callable[..., list[Any]]
NULLABLE = [ms.Field("city", "string", nullable=True), ms.Field("plan", "string", nullable=True)]
RECORDS = [{"city": city, "plan": plan} for city in ("a", "b", None) for plan in ("x", None, "y")] * 4
WITH_NONE = pd.DataFrame(RECORDS)
WITH_NAN = WITH_NONE.replace({None: np.nan})
IS_ONE_MISSING = np.array([(row["city"] is None) != (row["plan"] is None) for row in RECORDS], dtype=int)
NUMBERS = pd.DataFrame(np.random.default_rng(0).normal(size=(40, 3)) * [1, 100, 1], columns=["a", "b", "c d"])
IS_LARGER = (NUMBERS["a"] * 100 > NUMBERS["b"]).astype(int)
CITIES = pd.DataFrame({"city": pd.Categorical(["u", "v", "w", "z"] * 10), "n": np.arange(40.0) % 7})
KINDS = (CITIES["city"].cat.codes.to_numpy() * 2 + CITIES["n"].to_numpy() % 2).astype(int) % 3


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """Register a model, and return its answers to the rows of a frame as requests bring them."""
    with ms.Registry(f"sqlite:///{tmp_path}/models.db") as registry:

        def answers(model: Any, asked: Any, **options: Any) -> list[Any]:
            registry.register("m", "1", model, **options)
            registry.promote("m", "1")
            columns = {name: asked[name].astype(object).where(asked[name].notna(), None) for name in asked}
            rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
            replicas = {"m": ms.ModelOptions(executor="thread", allow_pickle=True, timeout_ms=30_000)}
            with ms.ModelServer(registry, replicas, cache_dir=tmp_path / "cache") as server:
                return [each.prediction for each in server.predict_many("m", rows)]

        yield answers


def _encoded(rows: Any, labels: Any, **options: Any) -> Pipeline:
    encoder = OneHotEncoder(**{"handle_unknown": "ignore", **options})
    return make_pipeline(encoder, DecisionTreeClassifier(random_state=0)).fit(rows, labels)


def _codes(rows: pd.DataFrame) -> Any:
    """Return a category as the number that it has in its own column: what strings do not carry."""
    return np.column_stack([pd.Categorical(rows["city"]).codes, rows["n"]])


def _places(rows: pd.DataFrame) -> Any:
    return rows.index.to_numpy().reshape(-1, 1)


def _missing_kinds(rows: pd.DataFrame) -> Any:
    return np.column_stack([[value is pd.NA for value in rows[name]] for name in rows])


# -- what is missing ---------------------------------------------------------------------------------------


def test_each_column_has_its_own_mark(served: Served) -> None:
    """None in one column and NaN in another reach the model as what they are in its own rows."""
    rows = pd.DataFrame({"city": ["a", None, "a", None], "plan": pd.Series(["x", "x", np.nan, np.nan], dtype=object)})
    model = _encoded(rows, [0, 1, 1, 0])
    assert served(model, rows, example=rows) == model.predict(rows).tolist() == [0, 1, 1, 0]


def test_the_null_of_a_record_is_none(served: Served) -> None:
    """Records are taken as the frame that pandas makes of them."""
    model = _encoded(WITH_NONE, IS_ONE_MISSING)
    assert served(model, WITH_NONE, example=RECORDS[:8]) == IS_ONE_MISSING.tolist()


def test_the_null_of_a_record_is_nan_to_a_model_that_takes_no_none(served: Served) -> None:
    """Rows from JSON have no NaN, and a model that was fitted on a file has seen nothing else."""
    model = _encoded(WITH_NAN, IS_ONE_MISSING, handle_unknown="error")
    assert served(model, WITH_NAN, example=RECORDS[:8]) == IS_ONE_MISSING.tolist()


@pytest.mark.parametrize(("mark", "rows"), [("None", WITH_NONE), ("NaN", WITH_NAN)])
def test_a_field_says_what_is_missing(served: Served, mark: str, rows: pd.DataFrame) -> None:
    """An example without a gap shows no mark; the signature can say it."""
    signature = ms.Signature([ms.Field(each.name, "string", nullable=True, missing=mark) for each in NULLABLE])
    model = _encoded(rows, IS_ONE_MISSING)
    assert served(model, rows, example=rows.dropna()[:4], signature=signature) == IS_ONE_MISSING.tolist()


@pytest.mark.parametrize("rows", [WITH_NONE, WITH_NAN], ids=["None", "NaN"])
def test_a_mark_that_is_unknown_and_makes_a_difference_is_refused(served: Served, rows: pd.DataFrame) -> None:
    """Where nothing says what a null is to the model, none is chosen for it."""
    model = _encoded(rows, IS_ONE_MISSING)
    with pytest.raises(ms.InvalidInput, match=r"city: .*tells None and NaN apart.*missing='None'"):
        served(model, rows, example=rows.dropna()[:4], signature=ms.Signature(NULLABLE))


def test_a_mark_that_the_model_alone_can_mean_is_taken(served: Served) -> None:
    """A model that takes no None can only have been fitted on NaN."""
    model = _encoded(WITH_NAN, IS_ONE_MISSING, handle_unknown="error")
    found = served(model, WITH_NAN, example=WITH_NAN.dropna()[:4], signature=ms.Signature(NULLABLE))
    assert found == IS_ONE_MISSING.tolist()


def test_two_marks_in_one_column_that_make_a_difference_are_refused(served: Served) -> None:
    """A request has one null, so a column has one mark."""
    rows = pd.DataFrame({"city": pd.Series(["a", None, np.nan, "b"] * 4, dtype=object), "plan": ["x", "y"] * 8})
    with pytest.raises(ms.InvalidInput, match=r"city: .*apart"):
        served(_encoded(rows, [0, 1, 2, 3] * 4), rows, example=rows)


def test_a_mark_that_is_stated_wrongly_is_refused(served: Served) -> None:
    """The example contradicts the signature: the row and the column are named."""
    signature = ms.Signature([ms.Field(each.name, "string", nullable=True, missing="NaN") for each in NULLABLE])
    with pytest.raises(ms.InvalidInput, match=r"(city|plan): row \d of the example is answered . by the model itself"):
        served(_encoded(WITH_NONE, IS_ONE_MISSING), WITH_NONE, example=WITH_NONE, signature=signature)


def test_pandas_na_is_a_mark_too(served: Served) -> None:
    """A column of pandas' own strings lacks a value in a third way."""
    rows = WITH_NONE.astype("string")
    model = make_pipeline(FunctionTransformer(_missing_kinds), DecisionTreeClassifier()).fit(rows, IS_ONE_MISSING)
    assert served(model, rows, example=rows[:8], format="joblib") == IS_ONE_MISSING.tolist()


def test_a_version_from_before_has_one_mark_for_all(tmp_path: Path) -> None:
    """What the rows of the first releases say is read as it was meant."""
    from modelserve.adapters.frameworks.sklearn import SklearnFramework  # noqa: PLC0415

    model = _encoded(WITH_NONE, IS_ONE_MISSING)
    wrapped = SklearnFramework().wrap(model, {"method": "predict", "none_is_missing": True})
    columns = {str(name): WITH_NONE[name].to_numpy() for name in WITH_NONE}
    assert wrapped.infer(columns)["output"].tolist() == IS_ONE_MISSING.tolist()


# -- other ways in which a row can change ------------------------------------------------------------------


@pytest.mark.parametrize("count", [4, 40])
def test_a_category_that_would_be_lost_is_refused(served: Served, count: int) -> None:
    """As a string it has another number than in its own column; a few rows are enough to see it."""
    rows = CITIES.assign(city=pd.Categorical(CITIES["city"], categories=["z", "u", "w", "v"]))
    labels = (rows["city"].cat.codes.to_numpy() * 2 + rows["n"].to_numpy() % 2).astype(int) % 3
    model = make_pipeline(FunctionTransformer(_codes), DecisionTreeClassifier()).fit(rows, labels)
    with pytest.raises(ms.InvalidInput, match=r"city: row \d+ of the example is answered"):
        served(model, rows, example=rows[:count], format="joblib")


@pytest.mark.parametrize("count", [4, 40])
def test_a_category_that_is_not_lost_is_served(served: Served, count: int) -> None:
    """Gradient boosting of scikit-learn knows its categories by their names."""
    model = HistGradientBoostingClassifier(min_samples_leaf=2, max_iter=10).fit(CITIES, KINDS)
    found = served(model, CITIES, example=CITIES[:count], format="joblib")
    assert found == model.predict(CITIES).tolist()


def test_an_index_that_the_model_looks_at_is_refused(served: Served) -> None:
    """A request has none. No column is to blame."""
    rows = NUMBERS.set_index(np.arange(40)[::-1])
    model = make_pipeline(FunctionTransformer(_places), DecisionTreeClassifier()).fit(rows, IS_LARGER)
    with pytest.raises(ms.InvalidInput, match=r"example: row \d+ of the example is answered"):
        served(model, rows, example=rows, format="joblib")


def test_a_type_that_loses_digits_is_refused(served: Served) -> None:
    """A signature may declare a narrower type than the model was fitted on, as long as that changes no answer."""
    rows = pd.DataFrame({"a": 1.0 + np.arange(40) * 1e-9, "b": 1.0})
    model = make_pipeline(FunctionTransformer(_after_the_point), DecisionTreeClassifier()).fit(rows, np.arange(40) % 2)
    signature = ms.Signature([ms.Field("a", "float32"), ms.Field("b", "float32")])
    with pytest.raises(ms.InvalidInput, match=r"a: row \d+ of the example is answered"):
        served(model, rows, example=rows, signature=signature, format="joblib")


def _after_the_point(rows: Any) -> Any:
    return np.asarray(rows, dtype=float) * 1e9 - 1e9


def test_inputs_in_another_order_than_a_model_without_names_was_fitted_on_are_refused(served: Served) -> None:
    """Such a model goes by the place, and the signature changes it."""
    model = LogisticRegression().fit(NUMBERS.to_numpy(), IS_LARGER)
    signature = ms.Signature([ms.Field(name, "float64") for name in reversed(NUMBERS.columns)])
    with pytest.raises(ms.InvalidInput, match=r"row \d+ of the example"):
        served(model, NUMBERS, example=NUMBERS, signature=signature)


def test_a_row_that_the_model_does_not_take_speaks_for_no_other(served: Served) -> None:
    """One row on which the model itself fails does not hide the difference in the others."""
    rows = pd.DataFrame({"city": ["a", None] * 20, "plan": ["x", "y"] * 20})
    model = _encoded(rows, [0, 1] * 20, handle_unknown="error")
    signature = ms.Signature([ms.Field("city", "string", nullable=True), ms.Field("plan", "string")])
    example = pd.concat([rows, pd.DataFrame({"city": ["never seen"], "plan": ["x"]})])
    assert served(model, rows, example=example, signature=signature) == [0, 1] * 20


@pytest.mark.parametrize("as_frame", [True, False])
def test_a_model_of_texts_takes_a_column_of_them(served: Served, *, as_frame: bool) -> None:
    """A frame, or a record, gives the input its name; the model gets the bare texts, as it was fitted on them."""
    words = [f"{a} {b}" for a in ("good", "bad") for b in ("food", "staff", "room")]
    model = make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(words, [1, 1, 1, 0, 0, 0])
    frame = pd.DataFrame({"text": words})
    assert served(model, frame, example=frame if as_frame else [{"text": words[5]}]) == [1, 1, 1, 0, 0, 0]


def test_a_conversion_is_proven_on_the_rows_as_given(served: Served) -> None:
    """The original that a converted model is compared with is called as its owner calls it."""
    rows = NUMBERS.set_index(np.arange(40)[::-1])
    model = make_pipeline(StandardScaler(), LinearRegression()).fit(rows.to_numpy(), rows["a"])
    signature = ms.Signature([ms.Field(name, "float64") for name in reversed(rows.columns)])
    with pytest.raises(ms.InvalidInput, match=r"row \d+ of the example"):
        served(model, rows, example=rows, signature=signature, optimize="onnx")


# -- names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"format": "joblib"}, {"optimize": "onnx"}], ids=str)
@pytest.mark.parametrize("as_records", [False, True], ids=["frame", "records"])
def test_columns_in_another_order_go_where_their_names_are(
    served: Served, options: dict[str, Any], *, as_records: bool
) -> None:
    """An estimator that was fitted on a frame knows its columns by name; the example may have them in any order."""
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(NUMBERS, IS_LARGER)
    example = NUMBERS[["c d", "b", "a"]]
    given = example.to_dict("records") if as_records else example
    assert served(model, NUMBERS, example=given, **options) == model.predict(NUMBERS).tolist()


def test_columns_of_other_names_are_refused(served: Served) -> None:
    """A column that the model was not fitted on does not stand in for one that it was."""
    model = LogisticRegression().fit(NUMBERS, IS_LARGER)
    renamed = NUMBERS.rename(columns={"a": "z"})
    with pytest.raises(ms.InvalidInput, match="z: the model was not fitted on it, but on a, b, c d"):
        served(model, renamed, example=renamed)


def test_a_column_transformer_keeps_taking_more_columns_than_it_needs(served: Served) -> None:
    """It chooses by name, and leaves the rest."""
    model = make_pipeline(make_column_transformer((StandardScaler(), ["a", "b"])), LogisticRegression())
    model.fit(NUMBERS, IS_LARGER)
    more = NUMBERS[["b", "c d", "a"]].assign(e=1.0)
    assert served(model, more, example=more) == model.predict(NUMBERS).tolist()


# -- how long it takes -------------------------------------------------------------------------------------


class _Slow:
    """A model that takes a second of the test's own clock for each row, and knows one row by a number."""

    def __init__(self, odd: float | None = None) -> None:
        self.clock = 0.0
        self._odd = odd

    def infer(self, columns: Columns) -> dict[str, Array]:
        """Answer a batch."""
        return self._answers(columns["n"])

    def answer_as_given(self, example: pd.DataFrame) -> dict[str, Array]:
        """Answer the rows of a frame, one of them otherwise than in a batch."""
        own = self._answers(example["n"].to_numpy(dtype=float))
        own["prediction"][example["n"] == self._odd] = -1.0
        return own

    def _answers(self, numbers: Array) -> dict[str, Array]:
        self.clock += len(numbers)
        return {"prediction": numbers * 2}

    def prove(self, rows: pd.DataFrame) -> None:
        """Prove it on rows, by its own clock."""
        require_same_as_given(self, self, ms.Signature.infer(rows), rows, {}, now=lambda: self.clock)


def test_a_slow_model_is_proven_on_fewer_rows(caplog: pytest.LogCaptureFixture) -> None:
    """A model of a second a row is registered in half a minute with a long example, and the log says what it saw."""
    model = _Slow()
    model.prove(pd.DataFrame({"n": np.arange(4000.0), "k": pd.Categorical(np.arange(4000) % 32)}))
    assert model.clock <= 60
    assert "shortened: " in caplog.text


def test_a_quick_model_is_proven_on_all_rows() -> None:
    """Rows are compared in growing parts: a difference in the last one is found, under its own number."""
    model = _Slow(odd=2.0)
    rows = pd.DataFrame({"n": [0.0] * 1023 + [2.0]})
    with pytest.raises(ms.InvalidInput, match="row 1023 of the example"):
        require_same_as_given(model, model, ms.Signature.infer(rows), rows, {}, now=lambda: 0.0)
