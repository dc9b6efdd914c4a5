"""What is said where an optional package is missing."""


def missing(package: str) -> str:
    """The package, and the line that installs it.

    It names the package itself: an extra of this package can only be installed from
    the place that this package came from, which the message cannot know.
    """
    return f"{package} is missing. Run: pip install {package}"
