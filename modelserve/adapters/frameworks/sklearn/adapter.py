"""The scikit-learn adapter: which format a model is kept in, and the method that requests call."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from modelserve.adapters.frameworks.sklearn.formats import Format
from modelserve.adapters.frameworks.sklearn.joblib_pickle import JoblibPickle
from modelserve.adapters.frameworks.sklearn.lightgbm_text import LightGBMText
from modelserve.adapters.frameworks.sklearn.model import USUAL_MARK, SklearnModel
from modelserve.adapters.frameworks.sklearn.skops_zip import SkopsZip
from modelserve.adapters.frameworks.sklearn.xgboost_json import XGBoostJson
from modelserve.contents import contents
from modelserve.errors import InvalidInput, LoadFailed
from modelserve.ports import SavedModel
from modelserve.types import SAFE, Columns, FrameworkName, Json, Runtime

_FORMATS: Final[dict[str, Format]] = {
    each.name: each for each in (SkopsZip(), JoblibPickle(), XGBoostJson(), LightGBMText())
}
_OWN_FORMATS: Final = {"xgboost": XGBoostJson.name, "lightgbm": LightGBMText.name}


class SklearnFramework:
    """The scikit-learn adapter of :class:`modelserve.ports.Framework`."""

    name: FrameworkName = "sklearn"

    def save(self, model: Any, folder: Path, options: Mapping[str, Json], example: Columns | None = None) -> SavedModel:  # noqa: ARG002  # no format records the inputs
        """Write an estimator, or take the file at a path as it is.

        ``options``: ``method`` (default ``predict``), ``trusted`` (type names), ``format`` (``skops``, ``joblib``,
        ``xgboost-json`` or ``lightgbm-text``; by default the own format of an XGBoost or a LightGBM estimator, else
        skops). Raises ``ArtifactUnsafe`` listing the types that skops would have to be told to trust.
        """
        _refuse_factory(options)
        load_options: dict[str, Json] = {"method": options.get("method") or "predict"}
        if options.get("missing_strings"):
            load_options["missing_strings"] = dict(options["missing_strings"])
        if isinstance(model, str | Path):
            path = Path(model)
            chosen = _format(options.get("format") or _name_by_suffix(path))
        else:
            chosen = _format(options.get("format") or _default_format(model))
            path = folder / f"model{chosen.suffixes[0]}"
            load_options |= chosen.write(model, path)
        load_options = chosen.inspect(path, options) | load_options
        return SavedModel(path, chosen.name, load_options, runs_code=chosen.runs_code)

    def wrap(self, model: Any, load_options: Mapping[str, Json]) -> SklearnModel:
        """Make an estimator answer batches through the method that was registered."""
        # Versions of the first releases have one mark for all of their columns.
        other_mark = "None" if load_options.get("none_is_missing") else USUAL_MARK
        method = load_options.get("method", "predict")
        return SklearnModel(model, method, marks=load_options.get("missing_strings"), other_mark=other_mark)

    def load(self, path: Path, format: str, load_options: Mapping[str, Json], runtime: Runtime = SAFE) -> SklearnModel:  # noqa: A002
        """Read an estimator by the one reader of its format."""
        if format not in _FORMATS:
            raise LoadFailed(f"scikit-learn has no format {format!r}")
        if runtime.device != "cpu":
            raise LoadFailed(
                f"scikit-learn runs on the CPU, not on {runtime.device!r}; leave out ModelOptions(device=)"
            )
        if runtime.compile:
            raise LoadFailed("scikit-learn has no compiler: leave out compile=True, or register with optimize='onnx'")
        return self.wrap(_FORMATS[format].read(contents(path, runtime.sha256), load_options, runtime), load_options)


def _format(name: str) -> Format:
    found = _FORMATS.get(name)
    if found is None:
        raise InvalidInput("format", f"scikit-learn has no format {name!r}; use {', '.join(map(repr, _FORMATS))}")
    return found


def _default_format(estimator: Any) -> str:
    return _OWN_FORMATS.get(type(estimator).__module__.partition(".")[0], SkopsZip.name)


def _name_by_suffix(path: Path) -> str:
    for each in _FORMATS.values():
        if path.suffix in each.suffixes:
            return each.name
    raise InvalidInput("format", f"cannot tell the format of {path.name}; pass format= ({', '.join(_FORMATS)})")


def _refuse_factory(options: Mapping[str, Json]) -> None:
    if options.get("factory"):
        raise InvalidInput("factory", "an estimator is saved whole; a factory is for PyTorch weights")
