"""gunicorn: every worker starts the server after the fork, and closes it when it leaves."""

from __future__ import annotations

from typing import Any

workers = 2
threads = 16
worker_class = "gthread"


def post_worker_init(_worker: Any) -> None:
    """Load the models before the worker takes its first request."""
    from examples.django_app.serving import sync_server  # noqa: PLC0415  # after the fork

    sync_server.start()


def worker_exit(_server: Any, _worker: Any) -> None:
    """Let the requests in flight finish."""
    from examples.django_app.serving import sync_server  # noqa: PLC0415

    sync_server.close()
