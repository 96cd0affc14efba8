"""What Feast's registry says of the features that a model takes, and what an answer of its SDK holds."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

from modelserve.errors import ConfigError
from modelserve.ports import FeatureRow, NoValue
from modelserve.types import Json

Key: TypeAlias = str | int
_Cell: TypeAlias = tuple[Json | NoValue, float]
_WHOLE_NUMBERS: Final = {"INT32": 2**31, "INT64": 2**63}
_SCALARS: Final = ("BOOL", "DOUBLE", "FLOAT", "INT32", "INT64", "STRING")
_TYPES: Final = (*_SCALARS, *(f"{each}_LIST" for each in _SCALARS))
_NO_KEY: Final = "__dummy_id"  # what Feast gives a view without an entity
_NOT_FOUND: Final = 3  # FieldStatus of Feast's serving protocol
_LISTED: Final = 12


class Reading(NamedTuple):
    """How rows of a group are read: what the SDK is asked for, and the name and type of the one join key."""

    references: tuple[str, ...]
    join_key: str
    key_type: str

    def key_of(self, text: str) -> Key | None:
        """Return the key of an entity as the SDK takes it; None for one that no row can have."""
        limit = _WHOLE_NUMBERS.get(self.key_type)
        if limit is None:
            return text
        try:
            number = int(text)
        except ValueError:
            return None
        return number if str(number) == text and -limit <= number < limit else None  # "007" is not the entity 7


class _View(NamedTuple):
    """A feature view, and those of its features that the group has."""

    view: Any
    fields: Mapping[str, Any]


# -- what the registry says --------------------------------------------------------------------------------


def reading_of(feast: Any, store: Any, group: str, names: Sequence[str]) -> Reading:
    """Look a group and its features up in the registry, as far as the SDK has it in memory.

    Raises ``ConfigError`` that names the view and the feature for what is not there, or cannot be read by one key.
    """
    views = _views_of(feast, store, group)
    owners = [_owner(group, views, name) for name in names]
    joins = dict.fromkeys(_join_of(owner.view) for owner in owners)
    if len(joins) > 1:
        found = " and ".join(sorted(f"{name} ({kind})" for name, kind in joins))
        raise ConfigError(f"features: the views of the feature service {group!r} have no one join key, but {found}")
    (join_key, key_type), *_ = joins
    references = (f"{owner.view.name}:{name}" for owner, name in zip(owners, names, strict=True))
    return Reading(tuple(dict.fromkeys(references)), join_key, key_type)


def some_group(feast: Any, store: Any) -> tuple[str, tuple[str, ...]] | None:
    """Return a group and a feature of it, any that can be read; None where there is none."""
    for name, view in _registered(store).items():
        for field in view.features:
            with contextlib.suppress(ConfigError):
                reading_of(feast, store, name, [field.name])
                return name, (field.name,)
    return None


def _registered(store: Any) -> dict[str, Any]:
    """Return the feature views by name, without their transformations: those are code, and would be run."""
    views = store.registry.list_all_feature_views(store.project, allow_cache=True, skip_udf=True)
    return {view.name: view for view in views}


def _views_of(feast: Any, store: Any, group: str) -> list[_View]:
    views = _registered(store)
    if group in views:
        return [_readable(feast, views[group])]
    services = {each.name: each for each in store.registry.list_feature_services(store.project, allow_cache=True)}
    if group not in services:
        project = f"Feast's project {store.project!r}"
        problem = f"has neither a feature view nor a feature service {group!r}; it has {_listing([*views, *services])}"
        raise ConfigError(f"features: {project} {problem}")
    return [_projected(feast, views, group, each) for each in services[group].feature_view_projections]


def _projected(feast: Any, views: Mapping[str, Any], group: str, projection: Any) -> _View:
    service = f"features: the feature service {group!r}"
    if projection.name_alias or projection.join_key_map or projection.version_tag is not None:
        problem = f"renames the feature view {projection.name!r} or pins its version; name the view itself as group="
        raise ConfigError(f"{service} {problem}")
    if projection.name not in views:
        raise ConfigError(f"{service} has a feature view {projection.name!r} that the registry has not")
    view = _readable(feast, views[projection.name])
    return view._replace(fields={field.name: field for field in projection.features})


def _readable(feast: Any, view: Any) -> _View:
    if not isinstance(view, feast.FeatureView):
        raise ConfigError(f"features: {view.name!r} is a {type(view).__name__}; only what is stored can be read")
    if not view.online:
        raise ConfigError(f"features: the feature view {view.name!r} has online=False: nothing of it can be read")
    return _View(view, {field.name: field for field in view.features})


def _owner(group: str, views: Sequence[_View], name: str) -> _View:
    owners = [each for each in views if name in each.fields]
    what = f"the feature view {group!r}" if len(views) == 1 and views[0].view.name == group else f"{group!r}"
    if not owners:
        known = _listing(field for each in views for field in each.fields)
        raise ConfigError(f"features: {what} has no feature {name!r}; it has {known}")
    if len(owners) > 1:
        both = " and ".join(each.view.name for each in owners)
        raise ConfigError(f"features: {what} has the feature {name!r} of {both}; name one of them as group=")
    kind = owners[0].fields[name].dtype.to_value_type().name
    if kind not in _TYPES:
        raise ConfigError(f"features: {name!r} of {what} is of Feast's type {kind}, which no input of a model takes")
    return owners[0]


def _join_of(view: Any) -> tuple[str, str]:
    keys = [column for column in view.entity_columns if column.name != _NO_KEY]
    if len(keys) != 1:
        found = _listing(column.name for column in keys) if keys else "none"
        problem = f"is read by {len(keys)} join keys ({found}); rows are read by one key"
        raise ConfigError(f"features: the feature view {view.name!r} {problem}")
    kind = keys[0].dtype.to_value_type().name
    if kind != "STRING" and kind not in _WHOLE_NUMBERS:
        problem = f"has the join key {keys[0].name!r} of type {kind}; it has to be STRING, INT32 or INT64"
        raise ConfigError(f"features: the feature view {view.name!r} {problem}")
    return keys[0].name, kind


def _listing(names: Iterable[str]) -> str:
    found = sorted(set(names))
    rest = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return ", ".join(found[:_LISTED]) + rest if found else "none"


# -- what an answer holds ----------------------------------------------------------------------------------


def rows_of(answer: Any, names: Sequence[str]) -> Iterator[FeatureRow]:
    """Return the rows of an answer, in the order in which they were asked for, which its columns are not in."""
    columns = dict(zip(answer.metadata.feature_names.val, answer.results, strict=True))
    cells = [_cells(columns[name]) for name in names]
    for row in zip(*cells, strict=True):
        times = [moment for _, moment in row if moment]
        yield FeatureRow(tuple(value for value, _ in row), min(times, default=None))


def nothing(names: Sequence[str]) -> FeatureRow:
    """Return the row that is not there."""
    return FeatureRow((NoValue.MISSING,) * len(names), None)


def _cells(column: Any) -> list[_Cell]:
    return [
        _cell(value, status, moment.seconds + moment.nanos / 1e9)
        for value, status, moment in zip(column.values, column.statuses, column.event_timestamps, strict=True)
    ]


def _cell(value: Any, status: int, moment: float) -> _Cell:
    """Tell a null from what is not there. Some of Feast's stores answer PRESENT for both, but a row has a time."""
    if not moment:
        return NoValue.MISSING, 0.0
    kind = value.WhichOneof("val")
    if kind is None or kind == "null_val":
        return (NoValue.MISSING if status == _NOT_FOUND else None), moment
    found = getattr(value, kind)
    if kind.endswith("_list_val"):
        return list(found.val), moment
    if isinstance(found, float) and math.isnan(found):
        return None, moment
    return found, moment
