"""What a model takes from a feature store, as its options say it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Final

DEFAULT_BUDGET_MS: Final = 5.0
RESERVED: Final = ("_id", "_ts")
"""Names that the stores use themselves."""
_GROUP: Final = re.compile(r"[A-Za-z0-9_.-]{1,128}")


@dataclasses.dataclass(frozen=True, slots=True)
class Features:
    """Inputs of a model that are read from the feature store, by the key of an entity that the request names.

    ``entity`` is the member of a request that holds the key (``"user_id"``), ``names`` are the model's inputs that are
    read; their types are those of the model's signature. A feature that has a value in ``defaults`` gets it where the
    store has none to give; any other is required, and a request without it fails. Values older than ``max_age_s``
    seconds count as stale (None: at any age they are good). A request waits ``budget_ms`` for the store, and no longer.

    ``group`` names the rows in the store (None: as the entity), for an entity whose features are published by several
    jobs. With ``overridable`` a request may give a feature itself, and what it gives wins; without, it is refused.
    """

    entity: str
    names: Sequence[str]
    _: dataclasses.KW_ONLY
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    max_age_s: float | None = None
    budget_ms: float = DEFAULT_BUDGET_MS
    group: str | None = None
    overridable: bool = False
    __pydantic_config__: ClassVar[Mapping[str, str]] = {"extra": "forbid"}  # a misspelt option in a file is an error

    def __post_init__(self) -> None:
        if isinstance(self.names, str):
            raise ValueError(f"names is a list of features: [{self.names!r}]")  # noqa: TRY004  # pydantic tells these
        object.__setattr__(self, "names", tuple(self.names))
        for problem in self._problems():
            raise ValueError(problem)

    @property
    def stored_as(self) -> str:
        """The name of the group of rows in the store."""
        return self.entity if self.group is None else self.group

    def _problems(self) -> Iterator[str]:
        if not self.entity or not self.names:
            yield "name an entity and at least one feature"
        if len(set(self.names)) != len(self.names):
            yield "a feature is named twice"
        yield from self._problems_of_names()
        problem = group_problem(self.stored_as)
        if problem is not None:
            yield f"{problem}; set group="
        if not 0.0 < self.budget_ms < math.inf:
            yield "budget_ms must be a positive number"
        if self.max_age_s is not None and not 0.0 < self.max_age_s < math.inf:
            yield "max_age_s must be a positive number"

    def _problems_of_names(self) -> Iterator[str]:
        for name in self.names:
            if not name or name in RESERVED:
                yield f"{name!r} cannot be a feature: {' and '.join(RESERVED)} belong to the store"
            if name == self.entity:
                yield f"{name!r} is the key; it cannot be a feature as well"
        for name in self.defaults:
            if name not in self.names:
                yield f"defaults has {name!r}, which is not among the names"


def group_problem(group: str) -> str | None:
    """Say what is wrong with the name of a group of rows, if anything is."""
    if _GROUP.fullmatch(group):
        return None
    return f"{group[:140]!r} cannot name a group of rows: it takes up to 128 letters, digits, '_', '.' and '-'"


def check_apart(declared: Sequence[Features]) -> None:
    """Raise ``ValueError`` when two declarations of one model name the same feature, or one the other's key."""
    names = [name for each in declared for name in each.names]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"the feature {twice!r} is declared twice")
    keys = {each.entity for each in declared}
    both = next((name for name in names if name in keys), None)
    if both is not None:
        raise ValueError(f"{both!r} is declared both as a key and as a feature")
