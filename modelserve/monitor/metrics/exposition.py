"""Figures as Prometheus reads them (text format, version 0.0.4), and those of several processes as one. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
KEPT_S: Final = 86400.0
"""How long the counts of a version are kept that no process has loaded: should it come back, they go on."""

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

    ``counts`` are those of the versions that it has loaded, by version, and under ``""`` what belongs to none;
    ``unloaded`` those of versions that it had before. ``gauges`` are how things stand, and end with the process.
    """

    counts: dict[str, Samples]
    gauges: Samples
    unloaded: dict[str, Samples] = {}  # noqa: RUF012  # nobody writes to it


def sample(name: str, labels: Mapping[str, str]) -> str:
    """Return ``name{label="value",…}``."""
    return f"{name}{{{subject(labels)}}}" if labels else name


def subject(labels: Mapping[str, str]) -> str:
    """Return labels as they are written between the braces."""
    return ",".join(f'{key}="{_escaped(value)}"' for key, value in labels.items())


def histogram(
    name: str, labels: Mapping[str, str], bounds: Sequence[float], counts: Sequence[int], total: float
) -> Samples:
    """Return the samples of a histogram: ``counts`` has a number per bound, and one for what is above them all."""
    found: Samples = {}
    seen = 0
    ends = [*map(_number, bounds), "+Inf"]
    bucket = f"{name}_bucket{{{subject(labels)}{',' if labels else ''}le="
    for bound, count in zip(ends, counts, strict=True):
        seen += count
        found[f'{bucket}"{bound}"}}'] = seen
    found[sample(f"{name}_sum", labels)] = total
    found[sample(f"{name}_count", labels)] = seen
    return found


def loaded(alive: Iterable[Figures]) -> set[str]:
    """Return the versions that living processes have loaded."""
    return {version for figures in alive for version in figures.counts}


def merged(alive: Sequence[Figures], ended: Sequence[Figures], families: Sequence[Family]) -> Samples:
    """Return the figures of all processes as those of one.

    What was counted by processes that have ended, and of versions since they were unloaded, still counts, or sums would
    go back: as long as any living process has the version. How things stood in those that have ended does not.
    """
    found = [samples for each in alive for samples in (*each.counts.values(), each.gauges)]
    here = {"", *loaded(alive)}
    past = [each.unloaded for each in alive] + [counts for each in ended for counts in (each.counts, each.unloaded)]
    found += [samples for counts in past for version, samples in counts.items() if version in here]
    values: dict[str, list[float]] = {}
    for samples in found:
        for key, value in samples.items():
            values.setdefault(key, []).append(value)
    merge = {family.name: family.merge for family in families}
    return {key: merge.get(_name_of(key), sum)(given) for key, given in values.items()}


def add(total: Samples, samples: Samples) -> None:
    """Add counts to others."""
    for key, value in samples.items():
        total[key] = total.get(key, 0.0) + value


def text(samples: Samples, families: Sequence[Family]) -> str:
    """Write samples, each under its family. Those of none are left out: a process of another release has others."""
    lines: dict[str, list[str]] = {family.name: [] for family in families}
    for key, value in samples.items():
        if (family := lines.get(_family_of(_name_of(key), lines))) is not None:
            family.append(f"{key} {_number(value)}")
    written = [
        "\n".join(
            (f"# HELP {family.name} {family.help}", f"# TYPE {family.name} {family.kind}", *lines[family.name], "")
        )
        for family in families
        if lines[family.name]
    ]
    return "".join(written)


def _name_of(key: str) -> str:
    return key.partition("{")[0]


def _family_of(name: str, known: Mapping[str, Any]) -> str:
    return name if name in known else name.rpartition("_")[0]


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(float(value))
