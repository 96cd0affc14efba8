"""How the documentation is built."""

from __future__ import annotations

from importlib.metadata import version as version_of

project = "modelserve"
author = "The modelserve authors"
copyright = author
release = version = version_of("modelserve")

extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
nitpicky = True
# Types of other projects are named, not linked: a build fetches nothing.
nitpick_ignore_regex = [("py:.*", r"(?!modelserve\b).*")]
autodoc_member_order = "bysource"
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"modelserve {release}"
