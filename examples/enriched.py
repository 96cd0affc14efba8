"""The demo's second part: the weather comes from a feature store, and an answer that is known from the cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from rich.console import Console

import modelserve as ms
from examples import flights

WEATHER: Final = ["temp", "humid", "wind_speed", "precip", "visib"]
OPTIONS: Final = ms.ModelOptions(
    cache_ttl_s=60,
    features=ms.Features("origin", WEATHER, defaults={"precip": 0.0, "visib": 10.0}, max_age_s=3600),
)


def show(registry: ms.Registry, folder: Path, flight: dict[str, Any], console: Console) -> None:
    """Serve the same model in this process, to callers who know the airport and not its weather."""
    writer = ms.FeatureWriter("memory://")  # in production redis://, dynamodb:// or feast://, for all processes
    writer.put("origin", flight["origin"], {name: flight[name] for name in WEATHER})
    asked = {name: value for name, value in flight.items() if name not in WEATHER}
    console.print(f"\n[bold]The weather from a feature store, by the key[/bold] origin={flight['origin']!r}")
    console.print_json(data=asked)
    with ms.ModelServer(
        registry, {flights.MODEL: OPTIONS}, cache_dir=folder / "cache", features=writer.store
    ) as server:
        _print(console, "first", server.predict(flights.MODEL, asked))
        _print(console, "again", server.predict(flights.MODEL, asked))
        writer.put("origin", flight["origin"], {name: flight[name] for name in WEATHER[:3]})
        _print(console, "a gauge fails", server.predict(flights.MODEL, asked))


def _print(console: Console, when: str, answer: ms.Prediction) -> None:
    told = json.dumps({"cached": answer.cached, "degraded": answer.degraded})
    console.print(
        f"  {when:<13}  late with {answer.prediction[1]:.3f}   {answer.latency_ms:6.2f} ms   {told}", soft_wrap=True
    )
