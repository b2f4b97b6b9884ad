"""Sphinx: `make docs` builds docs/_build/html from these pages and the docstrings."""

import sys
from importlib.metadata import version as installed
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import architecture  # noqa: E402  in this folder

architecture.main(ROOT, ROOT / "docs" / "_static")

project, author = "imbsam", "the imbsam authors"
version = release = installed("imbsam")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx-mathjax-offline",
]
html_theme = "furo"
html_title = "imbsam"
html_static_path = ["_static"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4
autodoc_typehints = "description"
autodoc_member_order = "bysource"
napoleon_custom_sections = [("Shapes", "params_style"), ("Source", "notes_style")]
