"""How the documentation is built."""

from __future__ import annotations

from importlib.metadata import version as version_of

project = "modelserve"
author = "The modelserve authors"
copyright = author
release = version = version_of("modelserve")

extensions = ["myst_parser"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
nitpicky = True
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"modelserve {release}"
