"""Django under ASGI: the face in front of it, which starts the server, since Django has no lifespan.

Run it with ``uvicorn examples.django_app.asgi:application`` or ``hypercorn examples.django_app.asgi:application``.
"""

from __future__ import annotations

import os

from django.core.asgi import get_asgi_application

import modelserve as ms
from examples.django_app.serving import server

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "examples.django_app.settings")

application = ms.asgi(server, prefix="/ml", otherwise=get_asgi_application())
