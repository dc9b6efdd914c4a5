"""Takes the pictures of TensorBoard and of the interactive page, in Chromium.

pip install tensorboard plotly playwright
python examples/nnx_lm_dashboard.py --output runs/nnx_lm
python docs/make_screenshots.py runs/nnx_lm
"""

import argparse
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

IMAGES = Path(__file__).resolve().parent / "images"
PORT = 6123


def of_tensorboard(browser: Browser, logs: Path) -> None:
    """The metrics in TensorBoard's own server."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logs)]
    server = subprocess.Popen([*command, "--port", str(PORT), "--host", "127.0.0.1"])
    try:
        address = f"http://127.0.0.1:{PORT}/"
        for _ in range(120):
            try:
                urllib.request.urlopen(address).close()
                break
            except OSError:
                time.sleep(0.5)
        for dark in (False, True):
            page = browser.new_page(viewport={"width": 1360, "height": 860})
            page.goto(address + ("?darkMode=true" if dark else "") + "#timeseries")
            page.wait_for_selector("card-view")
            wanted = "clip/(norm|threshold)|track_norms/rnn/cell/dense_h|loss"
            page.locator("metrics-tag-filter input").fill(wanted)
            page.locator(".settings-button").click()
            page.wait_for_timeout(4000)
            page.screenshot(path=IMAGES / f"tensorboard{'_dark' if dark else ''}.png")
    finally:
        server.terminate()
        server.wait()


def of_page(browser: Browser, html: Path) -> None:
    """The interactive page, light and dark."""
    for scheme in ("light", "dark"):
        size = {"width": 1100, "height": 900}
        page = browser.new_page(color_scheme=scheme, viewport=size)
        page.goto(html.resolve().as_uri())
        page.wait_for_selector(".plotly-graph-div .main-svg")
        page.wait_for_timeout(1500)
        page.screenshot(path=IMAGES / f"page_{scheme}.png")


def main() -> None:
    """Opens both and saves what is seen."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, help="what nnx_lm_dashboard.py wrote")
    arguments = parser.parse_args()
    program = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as started:
        flags = ["--no-sandbox", "--disable-gpu"]
        browser = started.chromium.launch(executable_path=program, args=flags)
        of_tensorboard(browser, arguments.runs / "logs")
        of_page(browser, arguments.runs / "runs.html")
        browser.close()


if __name__ == "__main__":
    main()
