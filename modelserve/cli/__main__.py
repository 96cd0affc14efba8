"""``python -m modelserve.cli`` is the command ``modelserve``."""

from modelserve.cli import run

run()
