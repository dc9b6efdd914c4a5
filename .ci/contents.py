"""Checks what is in a wheel and an sdist: `python .ci/contents.py dist/*`."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

SDIST = {
    *("optax_clipx", "tests", "examples", "benchmarks", "docs", ".ci", ".github"),
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "LICENSE"),
    *("CITATION.cff", "pyproject.toml", ".gitignore", "PKG-INFO"),
}


def main(*dists: str) -> None:
    """Stops with the first difference."""
    for dist in dists:
        (wheel if dist.endswith(".whl") else sdist)(dist)
        print(f"{Path(dist).name}: as it should be")


def wheel(dist: str) -> None:
    """The package, its metadata, the licence, and nothing else."""
    names = set(zipfile.ZipFile(dist).namelist())
    info = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    same(names - info, {name for name in tracked() if name.startswith("optax_clipx/")})
    assert "optax_clipx/py.typed" in names
    kept = {name.split("/", 1)[1] for name in info}
    same(kept, {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"})


def sdist(dist: str) -> None:
    """What is tracked, but for the settings of tools."""
    with tarfile.open(dist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    same({name.split("/")[0] for name in names}, SDIST)
    same(names - {"PKG-INFO"}, {n for n in tracked() if n.split("/")[0] in SDIST})


def tracked() -> list[str]:
    """The files that git knows."""
    listed = subprocess.run(["git", "ls-files"], capture_output=True, check=True)
    return listed.stdout.decode().splitlines()


def same(found: set[str], wanted: set[str]) -> None:
    """Names what is missing or too much."""
    if found != wanted:
        sys.exit(
            f"missing: {sorted(wanted - found)}; too much: {sorted(found - wanted)}"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
