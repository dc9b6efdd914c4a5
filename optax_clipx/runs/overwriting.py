"""One rule for all files: nothing is overwritten without being told to."""

from pathlib import Path

FORCE = "force=True"  # the command line has --force instead


def may_write(path: Path, force: bool, or_else: str = "") -> None:
    """Raises an error if there is something that nobody said to overwrite.

    Args:
        path: of the file to write.
        force: overwrite it.
        or_else: what else could be passed.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder. Name a file in it.")
    if path.exists() and not force:
        other = f"{or_else} " if or_else else ""
        raise FileExistsError(
            f"{path} is there already. Pass {other}{FORCE} to overwrite it, or name"
            " another file."
        )
