"""Figures as Prometheus reads them (text format, version 0.0.4), and those of several processes as one. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

Samples: TypeAlias = dict[str, float]
"""Values by ``name{labels}``, as they are written."""


class Family(NamedTuple):
    """A metric. ``merge`` makes one value of those of several processes."""

    name: str
    kind: str
    help: str
    merge: Callable[[Iterable[float]], float] = sum


class Figures(NamedTuple):
    """What one process counted.

    ``counts`` are grouped by the version they belong to (``""``: to none), so that those of a version that nobody has
    loaded any more can be left out; ``gauges`` are how things stand, and end with the process.
    """

    counts: dict[str, Samples]
    gauges: Samples


def sample(name: str, labels: Mapping[str, str], *, le: float | str | None = None) -> str:
    """Return ``name{label="value",…}``. ``le`` is the upper bound of a bucket."""
    given = labels if le is None else {**labels, "le": _number(le) if isinstance(le, float) else le}
    return f"{name}{{{subject(given)}}}" if given else name


def subject(labels: Mapping[str, str]) -> str:
    """Return labels as they are written between the braces."""
    return ",".join(f'{key}="{_escaped(value)}"' for key, value in labels.items())


def histogram(
    name: str, labels: Mapping[str, str], bounds: Sequence[float], counts: Sequence[int], total: float
) -> Samples:
    """Return the samples of a histogram: ``counts`` has a number per bound, and one for what is above them all."""
    found: Samples = {}
    seen = 0
    ends: list[float | str] = [*bounds, "+Inf"]
    for bound, count in zip(ends, counts, strict=True):
        seen += count
        found[sample(f"{name}_bucket", labels, le=bound)] = seen
    found[sample(f"{name}_sum", labels)] = total
    found[sample(f"{name}_count", labels)] = seen
    return found


def merged(alive: Sequence[Figures], ended: Sequence[Figures], families: Sequence[Family]) -> Samples:
    """Return the figures of all processes as those of one.

    Counts of processes that have ended still count, or sums would go back. How things stood in them does not, nor do
    their counts of versions that no living process has.
    """
    values: dict[str, list[float]] = {}
    for figures in alive:
        for samples in (*figures.counts.values(), figures.gauges):
            _add(values, samples)
    served = {each for figures in alive for each in figures.counts}
    for figures in ended:
        for version, samples in figures.counts.items():
            if version in served or not version:
                _add(values, samples)
    merge = {family.name: family.merge for family in families}
    return {key: merge.get(_name_of(key), sum)(found) for key, found in values.items()}


def text(samples: Samples, families: Sequence[Family]) -> str:
    """Write samples, each under its family."""
    lines: dict[str, list[str]] = {family.name: [] for family in families}
    for key, value in samples.items():
        lines[_family_of(_name_of(key), lines)].append(f"{key} {_number(value)}")
    written = [
        "\n".join(
            (f"# HELP {family.name} {family.help}", f"# TYPE {family.name} {family.kind}", *lines[family.name], "")
        )
        for family in families
        if lines[family.name]
    ]
    return "".join(written)


def _add(values: dict[str, list[float]], samples: Samples) -> None:
    for key, value in samples.items():
        values.setdefault(key, []).append(value)


def _name_of(key: str) -> str:
    return key.partition("{")[0]


def _family_of(name: str, known: Mapping[str, Any]) -> str:
    return name if name in known else name.rpartition("_")[0]


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(float(value))
