"""What a version takes from a request, what from the feature store, and how the two become one row. Pure."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from modelserve.errors import BackendUnavailable, InvalidInput, LoadFailed, ModelServeError
from modelserve.features.declaration import Features
from modelserve.features.layout import AHEAD_S, key_of
from modelserve.ports import FeatureKey, FeatureRow, NoValue
from modelserve.signature import Field, Signature
from modelserve.types import Row

FeatureStatus: TypeAlias = Literal["present", "given", "null", "missing", "stale", "timeout", "error"]
Unread: TypeAlias = Literal["timeout", "error"]
"""Why a row could not be read."""
BACKEND: Final = "the feature store"
_USABLE: Final = ("present", "given")
_REQUIRED: Final = object()


class Pending(NamedTuple):
    """A validated request without its features: its own values, the rows to read (None: not needed), what it gave."""

    own: Row
    wanted: tuple[FeatureKey | None, ...]
    given: Mapping[str, Any]


class Completed(NamedTuple):
    """A row as the model takes it, the features that have their default, how many had which status.

    With a ``refusal`` the row is none that a model takes.
    """

    row: Row
    degraded: tuple[str, ...]
    statuses: Mapping[FeatureStatus, int]
    refusal: ModelServeError | None = None


class _Feature(NamedTuple):
    """One feature: how a value is examined, and what stands in for it."""

    field: Field
    alone: Signature
    declared: Features
    default: Any

    def examined(self, value: Any) -> Any:
        return self.alone.validate({self.field.name: value})[0]


class _Source(NamedTuple):
    """A row of the store that a request needs: whose key, which group, which features of it."""

    entity: str
    group: str
    names: tuple[str, ...]


class FeaturePlan:
    """Takes requests without the features that are declared for a model, and completes them.

    Raises ``LoadFailed`` where the declarations do not fit the version's signature.
    """

    def __init__(self, model_name: str, signature: Signature, declared: Sequence[Features]) -> None:
        self.model_name = model_name
        self.budget_s = max(each.budget_ms for each in declared) / 1000
        self.signature = signature
        self.entities = tuple(dict.fromkeys(each.entity for each in declared))
        self._sources = _sources_of(declared)
        fields = {field.name: field for field in signature.inputs}
        owner = {name: each for each in declared for name in each.names}
        names = [name for source in self._sources for name in source.names]
        self._features = tuple(_feature(fields.get(name), name, owner[name]) for name in names)
        self._feature_of = {each.field.name: each for each in self._features}
        self._read = Signature(each.field for each in self._features)
        own = [field for field in signature.inputs if field.name not in owner]
        self._own = Signature(own) if own else None
        self._own_names = frozenset(field.name for field in own)
        self._order = _order([field.name for field in own] + names, [field.name for field in signature.inputs])
        self._oldest = min((each.max_age_s for each in declared if each.max_age_s is not None), default=None)
        self._all_present: Mapping[FeatureStatus, int] = {"present": len(names)}
        self._declared = hashlib.sha256(repr(list(declared)).encode()).hexdigest()

    # -- what a request gives ------------------------------------------------------------------------------

    @property
    def own(self) -> tuple[Field, ...]:
        """The inputs that a request gives itself, without the keys that are none of the model's inputs."""
        return () if self._own is None else self._own.inputs

    @property
    def overridable(self) -> tuple[Field, ...]:
        """The features that a request may give itself."""
        return tuple(each.field for each in self._features if each.declared.overridable)

    @property
    def keys_of_features(self) -> dict[str, str]:
        """Each feature, and the entity by whose key it is read."""
        return {name: each.declared.entity for name, each in self._feature_of.items()}

    @property
    def needed_keys(self) -> tuple[str, ...]:
        """The entities without whose key no request can be answered."""
        needed = {each.declared.entity for each in self._features if not each.declared.overridable}
        return tuple(entity for entity in self.entities if entity in needed)

    def validate(self, inputs: Any) -> Pending:
        """Check what a request gives. Raises ``InvalidInput`` naming the field."""
        if not isinstance(inputs, Mapping):
            return Pending(self.signature.validate(inputs), (), {})  # which refuses it
        own = {name: value for name, value in inputs.items() if name in self._own_names}
        given: dict[str, Any] = {}
        if len(inputs) > len(own):
            given = self._given(inputs)
        values = () if self._own is None else self._own.validate(own)
        return Pending(values, tuple(self._wanted(source, inputs, given) for source in self._sources), given)

    def canonical(self, pending: Pending) -> bytes:
        """Return bytes that are equal for equal requests under equal declarations.

        In them is what a request gives itself, the rows that it names, and how their features are judged.
        """
        own = b"" if self._own is None else self._own.canonical(pending.own)
        given = {name: self._feature_of[name].alone.canonical((value,)).hex() for name, value in pending.given.items()}
        return json.dumps([self._declared, own.hex(), pending.wanted, given], sort_keys=True).encode()

    def _given(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        given = {}
        for name, value in inputs.items():
            if name in self._own_names or name in self.entities:
                continue
            feature = self._feature_of.get(name)
            if feature is None:
                raise InvalidInput(str(name)[:256], f"unknown input; a request gives {self._listing()}")
            if not feature.declared.overridable:
                problem = f"is read from the feature store by {feature.declared.entity}, and not taken from a request"
                raise InvalidInput(name, problem)
            given[name] = feature.examined(value)
        return given

    def _wanted(self, source: _Source, inputs: Mapping[str, Any], given: Mapping[str, Any]) -> FeatureKey | None:
        if given and all(name in given for name in source.names):
            return None
        if source.entity not in inputs:
            raise InvalidInput(source.entity, "missing; it is the key of what is read from the feature store")
        return FeatureKey(source.group, key_of(source.entity, inputs[source.entity]), source.names)

    def _listing(self) -> str:
        names = dict.fromkeys((*self.entities, *(field.name for field in self.own + self.overridable)))
        return ", ".join(list(names)[:12])

    # -- what the store gave -------------------------------------------------------------------------------

    def complete(self, pending: Pending, found: Sequence[FeatureRow | Unread | None], now: float) -> Completed:
        """Put a request and the rows read for it together.

        ``found`` has what became of each row wanted, ``now`` is the Unix time that ages are counted to.
        """
        whole = None if pending.given else self._whole(found, now)
        if whole is not None:
            return Completed(self._order(pending.own + whole), (), self._all_present)
        return self._one_by_one(pending, found, now)

    def _whole(self, found: Sequence[FeatureRow | Unread | None], now: float) -> Row | None:
        """Return the values of all features if nothing is wrong with any: the ordinary case, with few checks."""
        values: list[Any] = []
        for row in found:
            if not isinstance(row, FeatureRow) or _too_old(row, self._oldest, now):
                return None
            values += row.values
        if any(value is None for value in values):
            return None
        try:
            return self._read.validate(dict(zip(self._feature_of, values, strict=True)))
        except InvalidInput:
            return None

    def _one_by_one(self, pending: Pending, found: Sequence[FeatureRow | Unread | None], now: float) -> Completed:
        values: list[Any] = []
        degraded: list[str] = []
        statuses: Counter[FeatureStatus] = Counter()
        refusal: ModelServeError | None = None
        for (name, feature), (row, stored) in zip(self._feature_of.items(), self._stored(found), strict=True):
            status, value = _judged(feature, row, stored, now)
            if name in pending.given:
                status, value = "given", pending.given[name]
            statuses[status] += 1
            if status not in _USABLE and not (status == "null" and feature.field.nullable):
                if feature.default is _REQUIRED:
                    refusal = refusal or _refusal(feature, status, self.budget_s)
                degraded.append(name)
                value = feature.default
            values.append(value)
        return Completed(self._order(pending.own + tuple(values)), tuple(degraded), statuses, refusal)

    def _stored(self, found: Sequence[FeatureRow | Unread | None]) -> list[tuple[FeatureRow | Unread | None, Any]]:
        """Return, feature by feature, the row it should be in and what that holds."""
        return [
            (row, row.values[i] if isinstance(row, FeatureRow) else None)
            for source, row in zip(self._sources, found, strict=True)
            for i in range(len(source.names))
        ]


def _judged(feature: _Feature, row: FeatureRow | Unread | None, stored: Any, now: float) -> tuple[FeatureStatus, Any]:
    if not isinstance(row, FeatureRow):
        return "missing" if row is None else row, None
    if isinstance(stored, NoValue):
        return stored.value, None
    if _too_old(row, feature.declared.max_age_s, now):
        return "stale", None
    if stored is None and not feature.field.nullable:
        return "null", None
    try:
        return "present" if stored is not None else "null", feature.examined(stored)
    except InvalidInput:
        return "error", None


def _too_old(row: FeatureRow, max_age_s: float | None, now: float) -> bool:
    """Whether a row is older than allowed. One that tells no time, or one that is yet to come, may be of any age."""
    if max_age_s is None:
        return False
    return row.written_at is None or not -AHEAD_S <= now - row.written_at <= max_age_s


def _refusal(feature: _Feature, status: FeatureStatus, budget_s: float) -> ModelServeError:
    name, entity = feature.field.name, feature.declared.entity
    if status in {"missing", "null"}:
        return InvalidInput(entity, f"the feature store has no {name} for this key, and the model needs it")
    problem = {
        "stale": f"is older than {feature.declared.max_age_s} s",
        "timeout": f"did not arrive within {budget_s * 1000:g} ms",
        "error": "could not be read",
    }[status]
    return BackendUnavailable(BACKEND, f"{name} {problem}, and the model needs it")


# -- making a plan -----------------------------------------------------------------------------------------


def plan_of(model_name: str, signature: Signature, declared: Sequence[Features]) -> FeaturePlan | None:
    """Return the plan of a version; None for a model that has no features. Raises ``LoadFailed``."""
    return FeaturePlan(model_name, signature, declared) if declared else None


def groups_of(declared: Sequence[Features]) -> list[tuple[str, tuple[str, ...]]]:
    """Return what requests read: the features of each group, named as in the keys of a plan."""
    return [(source.group, source.names) for source in _sources_of(declared)]


def _sources_of(declared: Sequence[Features]) -> tuple[_Source, ...]:
    """Return the rows that a request needs: declarations of one entity and group share theirs."""
    names: dict[tuple[str, str], list[str]] = {}
    for each in declared:
        names.setdefault((each.entity, each.stored_as), []).extend(each.names)
    return tuple(_Source(entity, group, tuple(listed)) for (entity, group), listed in names.items())


def _feature(field: Field | None, name: str, declared: Features) -> _Feature:
    if field is None:
        raise LoadFailed(f"the version has no input {name!r}, which the features of {declared.entity} name")
    feature = _Feature(field, Signature([dataclasses.replace(field)]), declared, _REQUIRED)
    if name not in declared.defaults:
        return feature
    try:
        return feature._replace(default=feature.examined(declared.defaults[name]))
    except InvalidInput as error:
        raise LoadFailed(f"the default of the feature {name!r} does not fit the version: {error.problem}") from error


def _order(names: Sequence[str], wanted: Sequence[str]) -> Any:
    """Return what puts values, in the order of ``names``, into the order of the model's inputs."""
    places = [names.index(name) for name in wanted]
    if places == list(range(len(places))):
        return tuple
    return operator.itemgetter(*places)
