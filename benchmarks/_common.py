"""What the benchmarks share: the small model and its rows, alternating repeats, tables, results as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
import json
import math
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import modelserve as ms

T = TypeVar("T")
MODEL: Final = "cancer"
TELLTALE: Final = "telltale"
RESULTS: Final = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True, slots=True)
class Budget:
    """A promised figure and the one found; ``at_least`` says on which side of the target it should lie."""

    what: str
    target: float
    found: float
    at_least: bool = True

    @property
    def met(self) -> bool:
        return self.found >= self.target if self.at_least else self.found <= self.target

    def __str__(self) -> str:
        sign, verdict = ("≥" if self.at_least else "≤"), ("met" if self.met else "MISSED")
        return f"{verdict:<6}  {self.what}: {shown(self.found)} (budget {sign} {shown(self.target)})"


# -- the small model ---------------------------------------------------------------------------------------


def real_rows() -> Any:
    """Return 569 measured cell nuclei: float64, shape (569, 30)."""
    from sklearn.datasets import load_breast_cancer  # noqa: PLC0415  # a load generator must not pay for it

    return load_breast_cancer(return_X_y=True)[0]


def small_model() -> Any:
    """Fit the model that all figures about overhead are taken with: a scaler and a logistic regression."""
    from sklearn.datasets import load_breast_cancer  # noqa: PLC0415  # as above
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415  # as above
    from sklearn.pipeline import make_pipeline  # noqa: PLC0415  # as above
    from sklearn.preprocessing import StandardScaler  # noqa: PLC0415  # as above

    x, y = load_breast_cancer(return_X_y=True)
    return make_pipeline(StandardScaler(), LogisticRegression()).fit(x, y)


def open_registry(folder: Path) -> ms.Registry:
    """Open the registry that a benchmark keeps in its scratch folder."""
    return ms.Registry(f"sqlite:///{folder}/models.db", artifacts=str(folder / "artifacts"))


def register_small_model(folder: Path) -> ms.Registry:
    """Put the small model into production as version 1 of ``cancer``."""
    registry = open_registry(folder)
    registry.register(MODEL, "1", small_model(), example=real_rows()[:4])
    registry.promote(MODEL, "1")
    return registry


# -- measuring ---------------------------------------------------------------------------------------------


def alternate(sides: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Measure every side once a round, so that whatever else the machine does hits all of them alike."""
    found: dict[str, list[T]] = {name: [] for name in sides}
    for i in range(rounds):
        # Every other round backwards: no side always runs behind the same neighbour.
        for name in list(sides)[:: 1 if i % 2 == 0 else -1]:
            found[name].append(sides[name]())
    return found


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def ratio(values: Sequence[float], bare: Sequence[float]) -> float:
    """Return the median of the ratios within each round."""
    return median(value / limit for value, limit in zip(values, bare, strict=True))


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that ``share`` of the values do not exceed; NaN when there are none."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(share * len(ranked)) - 1)] if ranked else math.nan


# -- telling -----------------------------------------------------------------------------------------------


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Return the parser that every benchmark starts from."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds: to see that it works")
    return parser


def machine() -> str:
    """Describe what this runs on in one line."""
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    system = f"{platform.platform(terse=True)}, Python {platform.python_version()}"
    return f"{_processor()}, {os.cpu_count()} cores, {system}, load average {load}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows of equal keys, the first column left, the others right."""
    lines = [list(rows[0]), *([shown(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"\n{title}")
    for first, *others in lines:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        print("  ".join([first.ljust(widths[0]), *cells]))


def shown(value: Any) -> str:
    """Format a figure to about three digits."""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def report(name: str, *, quick: bool, rows: Sequence[Mapping[str, Any]], budgets: Sequence[Budget]) -> None:
    """Print the budgets and write everything to ``benchmarks/results/<name>.json``."""
    print()
    for budget in budgets:
        print(budget)
    RESULTS.mkdir(exist_ok=True)
    document = {
        "benchmark": name,
        "at": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "quick": quick,
        "rows": list(rows),
        "budgets": [dataclasses.asdict(budget) | {"met": budget.met} for budget in budgets],
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(f"\n{path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
