"""The application's own routes, which ask for a prediction: one for each way of serving."""

from __future__ import annotations

import json

from django.http import HttpRequest, HttpResponse, JsonResponse
from django.urls import path

import modelserve as ms
from examples.django_app.serving import server, sync_server
from modelserve.http.problems import problem_response


async def delay(request: HttpRequest) -> HttpResponse:
    """Say how likely a flight is to arrive late, under ASGI."""
    try:
        return _shown(await server.predict("flight-delay", json.loads(request.body)))
    except ms.ModelServeError as error:
        return _problem(error)


def sync_delay(request: HttpRequest) -> HttpResponse:
    """Say how likely a flight is to arrive late, under WSGI."""
    try:
        return _shown(sync_server.predict("flight-delay", json.loads(request.body)))
    except ms.ModelServeError as error:
        return _problem(error)


def _shown(answer: ms.Prediction) -> HttpResponse:
    late = answer.prediction[1]
    advice = "take a book" if late > 0.4 else "expect to be on time"
    return JsonResponse({"probability": late, "advice": advice, "model_version": answer.model_version})


def _problem(error: ms.ModelServeError) -> HttpResponse:
    """Answer the library's errors as the face does."""
    answer = problem_response(error)
    return HttpResponse(answer.body, answer.content_type, answer.status, headers=dict(answer.headers))


urlpatterns = [path("flights/delay", delay), path("sync/flights/delay", sync_delay)]
