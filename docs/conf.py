"""Sphinx configuration: Markdown pages, and an API page for each public name."""

import re
from importlib.metadata import version as installed

from docutils import nodes
from latex2mathml.converter import convert

project = "optax_clipx"
author = "The optax_clipx authors"
copyright = author
version = release = installed("optax_clipx")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "dollarmath"]
autosummary_generate = True
autodoc_typehints = "none"  # the arguments' sections say it in words
autodoc_member_order = "bysource"
napoleon_use_ivar = True
exclude_patterns = ["_build", "results"]
html_theme = "furo"
html_title = "optax_clipx"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
nitpicky = False
html_math_renderer = "mathml"


def spaced(formula):
    """A thin space between a function's name and what it is taken of."""
    name = r"(<mi>(?:log|exp|cos)</mi>)(?=<mi>|<msub>)"
    return re.sub(name, r'\1<mspace width="0.17em" />', formula)


def inline(self, node):
    """A formula within a line, as browsers draw it themselves, without a script."""
    self.body.append(spaced(convert(node.astext())))
    raise nodes.SkipNode


def display(self, node):
    """A formula on a line of its own, which scrolls where the page is narrow."""
    formula = spaced(convert(node.astext(), display="block"))
    self.body.append(f'<div class="formula">{formula}</div>')
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (inline, None), (display, None))


add_function_parentheses = False  # some are passed on, and not called
