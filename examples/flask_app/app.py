"""Flask: one mounted face, and one route of the application's own that asks for a prediction.

Run it with ``gunicorn -c examples/flask_app/gunicorn.conf.py examples.flask_app.app:app``. Which models, and from
where, is read from the environment (``MODELSERVE_REGISTRY``, ``MODELSERVE_ARTIFACTS``) or from the file that
``MODELSERVE_CONFIG`` names.
"""

from __future__ import annotations

import os
from typing import Any

from flask import Flask, Response, request
from werkzeug.middleware.dispatcher import DispatcherMiddleware

import modelserve as ms
from modelserve.http.problems import problem_response

# Made here, started in each worker (gunicorn.conf.py): a started server does not survive a fork.
server = ms.ModelServer.from_config(os.environ.get("MODELSERVE_CONFIG"))

app = Flask(__name__)
app.wsgi_app = DispatcherMiddleware(app.wsgi_app, {"/ml": ms.wsgi(server)})  # type: ignore[method-assign]


@app.post("/flights/delay")
def delay() -> dict[str, Any]:
    """Say how likely a flight is to arrive late."""
    answer = server.predict("flight-delay", request.get_json())
    late = answer.prediction[1]
    advice = "take a book" if late > 0.4 else "expect to be on time"
    return {"probability": late, "advice": advice, "model_version": answer.model_version}


@app.errorhandler(ms.ModelServeError)
def problem(error: ms.ModelServeError) -> Response:
    """Answer the library's errors on this application's own routes as the mounted face does."""
    answer = problem_response(error)
    return Response(answer.body, answer.status, dict(answer.headers), content_type=answer.content_type)
