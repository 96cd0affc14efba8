"""One host process of a fleet: ``python -m tests.hosts.fleet_host PORT SETTINGS``, the settings as JSON."""

from __future__ import annotations

import json
import sys

import uvicorn

import modelserve as ms


def main() -> None:
    port, settings = sys.argv[1:]
    app = ms.asgi(ms.AsyncModelServer.from_config(None, **json.loads(settings)))
    uvicorn.run(app, port=int(port), access_log=False, log_level="warning")


if __name__ == "__main__":
    main()
