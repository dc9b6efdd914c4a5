"""Sphinx configuration: Markdown pages, one page a symbol, links to jax and optax."""

from importlib.metadata import version as installed

project = "optax_clipx"
author = "The optax_clipx authors"
copyright = author
version = release = installed("optax_clipx")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
]
myst_enable_extensions = ["colon_fence", "dollarmath"]
autosummary_generate = True
autodoc_typehints = "none"  # the arguments' sections say it in words
autodoc_member_order = "bysource"
napoleon_use_ivar = True
exclude_patterns = ["_build", "results"]
html_theme = "furo"
html_title = "optax_clipx"
nitpicky = False
