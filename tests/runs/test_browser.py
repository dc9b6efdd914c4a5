"""The interactive page and TensorBoard's server, in a real browser without a window."""

import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest

import optax_clipx as clipx
from optax_clipx import __main__ as command_line

pytestmark = [
    pytest.mark.slow,
    # Playwright's event loop leaves a socket for the collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("there is no Chromium to open the page with")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()


def record(folder):
    rng = np.random.default_rng(0)
    for name, count in (("short", 300), ("long", 50_000)):
        norms = rng.lognormal(size=count)
        columns = {"clip/norm": norms, "clip/threshold": np.full(count, 2.0)}
        columns |= {f"track_norms/{i}": rng.lognormal(size=count) for i in range(3)}
        history = clipx.History()
        history.append(range(count), columns)
        history.save(folder / f"{name}.jsonl")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_drawn_without_errors_or_requests(browser, tmp_path, scheme):
    record(tmp_path)
    page_file = tmp_path / "page.html"
    runs = [str(tmp_path / f"{name}.jsonl") for name in ("short", "long")]
    assert command_line.main(["plot", *runs, "--html", str(page_file)]) == 0
    page = browser.new_page(
        color_scheme=scheme, viewport={"width": 1100, "height": 800}
    )
    said, errors, asked = [], [], []
    page.on("console", lambda message: said.append((message.type, message.text)))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(page_file.as_uri())
    page.wait_for_function(
        "document.querySelectorAll('.plotly-graph-div .main-svg').length >= 5"
    )
    page.wait_for_timeout(500)
    assert page.locator(".plotly-graph-div").count() == 5
    curves = "document.querySelectorAll('.scatterlayer .trace path.js-line').length"
    assert page.evaluate(curves) >= 8
    assert page.locator(".hm image").count() == 2  # the layers of each run
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (dark == "rgb(13, 17, 23)") == (scheme == "dark")
    # A chart answers: the hover label shows a value.
    chart = page.locator(".plotly-graph-div").first.bounding_box()
    page.mouse.move(chart["x"] + chart["width"] / 2, chart["y"] + chart["height"] / 2)
    page.wait_for_selector(".hoverlayer .hovertext", timeout=5000)
    assert not errors
    assert not [text for kind, text in said if kind in ("error", "warning")]
    assert asked == [page_file.as_uri()]


def overlaps(a, b):
    apart = a["x"] >= b["x"] + b["width"] or b["x"] >= a["x"] + a["width"]
    return not (
        apart or a["y"] >= b["y"] + b["height"] or b["y"] >= a["y"] + a["height"]
    )


def test_the_page_fits_a_phone(browser, tmp_path):
    """No sideways scrolling, and no legend over lines, ticks or axis titles."""
    record(tmp_path)
    page_file = tmp_path / "page.html"
    runs = [str(tmp_path / f"{name}.jsonl") for name in ("short", "long")]
    assert command_line.main(["plot", *runs, "--html", str(page_file)]) == 0
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.goto(page_file.as_uri())
    page.wait_for_function(
        "document.querySelectorAll('.plotly-graph-div .main-svg').length >= 5"
    )
    page.wait_for_timeout(500)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    charts = page.locator(".plotly-graph-div").all()
    for chart in charts:
        for legend in chart.locator(".legend").all():
            for other in (".cartesianlayer .plot", ".xtick", ".xtitle", ".modebar"):
                for part in chart.locator(other).all():
                    assert not overlaps(legend.bounding_box(), part.bounding_box())


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_tensorboard_shows_the_metrics(browser, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboardX import SummaryWriter

    record(tmp_path)
    columns = clipx.History.load(tmp_path / "short.jsonl").columns
    with SummaryWriter(str(tmp_path / "logs" / "short")) as writer:
        for name in columns.keys() - {"step"}:
            for step, value in zip(columns["step"], columns[name], strict=True):
                writer.add_scalar(name, value, step)
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", "--logdir", tmp_path / "logs",
         "--port", str(port), "--host", "127.0.0.1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        address = f"http://127.0.0.1:{port}/"
        for _ in range(120):
            try:
                urllib.request.urlopen(address).close()
                break
            except OSError:
                time.sleep(0.5)
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.goto(address + "#timeseries")
        page.wait_for_selector("card-view", timeout=60_000)
        page.wait_for_selector("card-view .line-chart svg, card-view line-chart")
        text = page.text_content("body")
        for name in columns.keys() - {"step"}:
            assert name.rsplit("/", 1)[0] in text
        assert "clip/norm" in text
    finally:
        server.terminate()
        server.wait()
