"""Every picture of the site is there for light and for dark pages, and is shown."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "docs" / "images"
PAGES = [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "methods").glob("*.md")]
LIGHT = sorted(x for x in IMAGES.rglob("*.png") if not x.stem.endswith("_dark"))


@pytest.mark.parametrize("path", LIGHT, ids=lambda path: path.stem)
def test_every_picture_has_a_dark_variant(path):
    assert path.with_stem(f"{path.stem.removesuffix('_light')}_dark").exists()


def shown(theme):
    """The pictures that pages show in this theme only."""
    pattern = rf"```{{image}} \S*?([\w]+)\.png\n:class: only-{theme}\n"
    found = {name for page in PAGES for name in re.findall(pattern, page.read_text())}
    return {name.removesuffix("_light").removesuffix("_dark") for name in found}


def test_pages_show_every_picture_in_both_themes():
    everything = {path.stem.removesuffix("_light") for path in LIGHT}
    assert shown("light") == shown("dark") == everything


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_page_shows_a_picture_in_one_theme_alone(page):
    text = page.read_text()
    assert not re.search(r"!\[[^\]]*\]\(\S*\.png\)", text)
    assert len(re.findall("only-light", text)) == len(re.findall("only-dark", text))
