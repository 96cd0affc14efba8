"""Django under WSGI: the face beside it.

Run it with ``gunicorn -c examples/django_app/gunicorn.conf.py examples.django_app.wsgi:application``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any
from wsgiref.util import shift_path_info

from django.core.wsgi import get_wsgi_application

import modelserve as ms
from examples.django_app.serving import sync_server

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "examples.django_app.settings")

_django = get_wsgi_application()
_models = ms.wsgi(sync_server)


def application(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    """Answer what lies under ``/ml`` with the models, and the rest with Django."""
    if environ["PATH_INFO"].startswith("/ml/"):
        shift_path_info(environ)
        return _models(environ, start_response)
    return _django(environ, start_response)  # type: ignore[no-any-return]  # Django is published without types
