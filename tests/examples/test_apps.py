"""The reference applications, over real sockets."""

from __future__ import annotations

import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

import modelserve as ms
from examples import flights
from tests.examples.conftest import Serve

FLIGHT = {
    "carrier": "UA",
    "origin": "EWR",
    "dest": "IAH",
    "hour": 5,
    "weekday": 1,
    "distance": 1400,
    "temp": 39.0,
    "humid": 59.4,
    "wind_speed": 10.4,
    "precip": 0.0,
    "visib": 10.0,
}
PREDICT = f"/ml/predict/{flights.MODEL}"
APPS = {
    "fastapi": ["-m", "uvicorn", "examples.fastapi_app.app:app", "--port", "PORT", "--log-level", "warning"],
    "flask": ["-m", "gunicorn", "-c", "examples/flask_app/gunicorn.conf.py", "--log-level", "warning",
              "-b", "127.0.0.1:PORT", "examples.flask_app.app:app"],
    "django-uvicorn": ["-m", "uvicorn", "examples.django_app.asgi:application", "--port", "PORT",
                       "--log-level", "warning"],
    "django-hypercorn": ["-m", "hypercorn", "examples.django_app.asgi:application", "-b", "127.0.0.1:PORT",
                         "--log-level", "warning"],
    "django-gunicorn": ["-m", "gunicorn", "-c", "examples/django_app/gunicorn.conf.py", "--log-level", "warning",
                        "-b", "127.0.0.1:PORT", "examples.django_app.wsgi:application"],
}  # fmt: skip


@pytest.mark.timeout(180)
@pytest.mark.parametrize("app", APPS)
def test_an_application_serves_its_mounted_face_and_its_own_route(
    serve: Serve, app: str, flights_registry: ms.Registry
) -> None:
    """Both ways give the model's answer, errors are problems, and a promotion elsewhere is served by every worker."""
    own = "/sync/flights/delay" if app == "django-gunicorn" else "/flights/delay"
    with serve(APPS[app]) as client:
        _answers_right(client, own)
        _refuses_clearly(client, own)
        _follows_a_promotion(client, flights_registry)


def _answers_right(client: httpx.Client, route: str) -> None:
    mounted = client.post(PREDICT, json={"inputs": FLIGHT}).json()
    own = client.post(route, json=FLIGHT).json()
    assert mounted["model_version"] == own["model_version"] == "1.0.0"
    assert mounted["prediction"][1] == pytest.approx(own["probability"])
    assert sum(mounted["prediction"]) == pytest.approx(1)
    many = client.post(PREDICT, json={"instances": [FLIGHT] * 3}).json()
    assert [row == pytest.approx(mounted["prediction"]) for row in many["predictions"]] == [True] * 3


def _refuses_clearly(client: httpx.Client, route: str) -> None:
    bad = client.post(PREDICT, json={"inputs": FLIGHT | {"hour": "five"}})
    assert (bad.status_code, bad.json()["field"]) == (422, "inputs.hour")
    assert bad.headers["content-type"] == "application/problem+json"
    own = client.post(route, json=FLIGHT | {"hour": 1.5})
    assert own.status_code == 422
    assert client.get("/ml/models").json()["models"][0]["name"] == flights.MODEL
    assert f"/predict/{flights.MODEL}" in client.get("/ml/openapi.json").json()["paths"]


def _follows_a_promotion(client: httpx.Client, registry: ms.Registry) -> None:
    def version(_: Any = None) -> str:
        response = client.post(PREDICT, json={"inputs": FLIGHT})
        assert response.status_code == 200, response.text
        return str(response.json()["model_version"])

    registry.promote(flights.MODEL, "2.0.0")
    try:
        give_up = time.monotonic() + 30
        with ThreadPoolExecutor(8) as threads:
            for _ in itertools.count():
                versions = set(threads.map(version, range(40)))
                assert versions <= {"1.0.0", "2.0.0"}
                if versions == {"2.0.0"}:
                    return
                assert time.monotonic() < give_up, "the new version is not served everywhere"
    finally:
        registry.rollback(flights.MODEL)
