"""``modelserve …``: the registry, and a prediction on this machine, from the command line.

Every command is a thin call of :class:`modelserve.Registry` or :class:`modelserve.ModelServer`. An error of the library
is one line on standard error and exit code 1, wrong usage is exit code 2.
"""

from __future__ import annotations

import logging
import sys

from modelserve import plugins
from modelserve.errors import MissingDependency


def run() -> None:
    """Run the command that the process was started with, and exit."""
    logging.getLogger("modelserve").addHandler(logging.NullHandler())  # what failed is told once, by the command
    try:
        app = plugins.require("modelserve.cli.commands").app
    except MissingDependency as error:
        sys.exit(f"error: {error}")
    app(prog_name="modelserve")
