"""FastAPI: one mounted face, and one route of the application's own that asks for a prediction.

Run it with ``uvicorn examples.fastapi_app.app:app``. Which models, and from where, is read from the environment
(``MODELSERVE_REGISTRY``, ``MODELSERVE_ARTIFACTS``) or from the file that ``MODELSERVE_CONFIG`` names.
"""

from __future__ import annotations

import gc
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel

import modelserve as ms
from modelserve.http.problems import problem_response

server = ms.AsyncModelServer.from_config(os.environ.get("MODELSERVE_CONFIG"))


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Load the models before the first request, and finish the last ones before leaving."""
    async with server:
        gc.freeze()  # what is loaded by now stays: no garbage collection has to pause the loop to look at it again
        yield


app = FastAPI(title="Departures", lifespan=lifespan)
app.mount("/ml", ms.asgi(server))


class Flight(BaseModel):
    """A departure as this application knows it."""

    carrier: str
    origin: str
    dest: str
    hour: int
    weekday: int
    distance: int
    temp: float
    humid: float
    wind_speed: float
    precip: float = 0.0
    visib: float = 10.0


class Delay(BaseModel):
    """What it tells its users."""

    probability: float
    advice: str
    model_version: str


@app.post("/flights/delay")
async def delay(flight: Flight) -> Delay:
    """Say how likely a flight is to arrive late."""
    answer = await server.predict("flight-delay", flight.model_dump())
    late = answer.prediction[1]
    advice = "take a book" if late > 0.4 else "expect to be on time"
    return Delay(probability=late, advice=advice, model_version=answer.model_version)


@app.exception_handler(ms.ModelServeError)
async def problem(_: Request, error: ms.ModelServeError) -> Response:
    """Answer the library's errors on this application's own routes as the mounted face does."""
    answer = problem_response(error)
    return Response(answer.body, answer.status, dict(answer.headers), answer.content_type)
