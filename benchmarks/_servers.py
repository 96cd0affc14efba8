"""The web applications that are measured, each in a process of its own: ``python -m benchmarks._servers NAME``."""

from __future__ import annotations

import argparse
import contextlib
import gc
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

import modelserve as ms
from benchmarks._common import MODEL, TELLTALE, open_registry, small_model

_ECHO: Final = b'{"prediction":1,"model_version":"1","latency_ms":1.234,"request_id":"","cached":false}'
_JSON_HEAD: Final = [(b"content-type", b"application/json"), (b"content-length", str(len(_ECHO)).encode())]


def echo(_: Path) -> Any:
    """Answer a fixed JSON without looking at the request: the most that any application can do under this server."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            while (await receive()).get("more_body"):
                pass
            await send({"type": "http.response.start", "status": 200, "headers": _JSON_HEAD})
            await send({"type": "http.response.body", "body": _ECHO})

    return app


def alone(folder: Path) -> Any:
    """Serve ``ms.asgi(server)`` as the whole application."""
    return ms.asgi(_server(folder))


def mounted(folder: Path) -> Any:
    """Serve ``ms.asgi(server)`` as a mount of a FastAPI application."""
    server = _server(folder)
    app = _host_of(server)
    app.mount("/ml", ms.asgi(server))
    return app


def in_front(folder: Path) -> Any:
    """Serve ``ms.asgi(server)`` in front of a FastAPI application."""
    server = _server(folder)
    return ms.asgi(server, prefix="/ml", otherwise=_host_of(server))


def frozen(folder: Path) -> Any:
    """Serve as ``in_front`` does, in a host that has the garbage collector leave alone what is there after startup."""
    server = _server(folder)
    return ms.asgi(server, prefix="/ml", otherwise=_host_of(server, when_started=gc.freeze))


class Inputs(BaseModel):
    """One row, as a FastAPI user would describe it."""

    x: list[float]


class Body(BaseModel):
    """A request, as a FastAPI user would describe it."""

    inputs: Inputs


def inline(_: Path) -> Any:
    """Call the model in a FastAPI route: what would be written without modelserve."""
    app, model = FastAPI(), small_model()

    @app.post(f"/predict/{MODEL}")
    async def predict(body: Body) -> dict[str, Any]:
        return {"prediction": int(model.predict(np.array([body.inputs.x]))[0]), "model_version": "1"}

    return app


def kept(folder: Path) -> Any:
    """Serve the telltale model with the version before it kept loaded: a change is a swap."""
    return ms.asgi(_telltale_server(folder, keep_previous=True))


def loaded(folder: Path) -> Any:
    """Serve the telltale model with nothing kept: every change loads, verifies and warms up a version."""
    return ms.asgi(_telltale_server(folder, keep_previous=False))


APPS: Final[dict[str, Callable[[Path], Any]]] = {
    app.__name__.replace("_", "-"): app for app in (echo, alone, mounted, in_front, frozen, inline, kept, loaded)
}


def _server(folder: Path) -> ms.AsyncModelServer:
    return ms.AsyncModelServer(open_registry(folder), {MODEL: ms.ModelOptions()}, cache_dir=folder / "cache")


def _telltale_server(folder: Path, *, keep_previous: bool) -> ms.AsyncModelServer:
    options = ms.ModelOptions(keep_previous=keep_previous)
    return ms.AsyncModelServer(open_registry(folder), {TELLTALE: options}, cache_dir=folder / "cache", poll_s=0.1)


def _host_of(server: ms.AsyncModelServer, when_started: Callable[[], None] | None = None) -> FastAPI:
    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with server:
            if when_started is not None:
                when_started()
            yield

    return FastAPI(lifespan=lifespan)


def main() -> None:
    """Serve one application until told to stop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=APPS)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="where the benchmark keeps its registry")
    options = parser.parse_args()
    app = APPS[options.name](options.folder)
    uvicorn.run(
        app, port=options.port, loop="uvloop", http="httptools", access_log=False, log_level="warning", workers=1
    )


if __name__ == "__main__":
    main()
