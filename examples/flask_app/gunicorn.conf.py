"""gunicorn: every worker starts the server after the fork, and closes it when it leaves."""

from __future__ import annotations

import gc
from typing import Any

workers = 2
threads = 16
worker_class = "gthread"


def post_worker_init(worker: Any) -> None:
    """Load the models before the worker takes its first request."""
    from examples.flask_app.app import server  # noqa: PLC0415  # after the fork

    server.start()
    gc.freeze()  # what is loaded by now stays: no garbage collection has to look at it again
    worker.log.info("models ready: %s", [status.model_name for status in server.status()])


def worker_exit(_server: Any, _worker: Any) -> None:
    """Let the requests in flight finish."""
    from examples.flask_app.app import server  # noqa: PLC0415

    server.close()
