"""Names of runs and columns, shown as what they are: files may hold anything."""

import html


def printable(text: str) -> str:
    r"""Escapes of control characters, such as those that drive a terminal: ``\x1b``."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def printable_lines(text: str) -> str:
    """The same for a text whose lines are its own."""
    return "\n".join(map(printable, text.splitlines()))


def for_page(name: str) -> str:
    """For the text of a page, and of Plotly's charts, which know some tags."""
    return html.escape(printable(name), quote=False)


def for_picture(name: str) -> str:
    """For matplotlib, which takes what is between dollars for mathematics."""
    return printable(name).replace("$", r"\$")
