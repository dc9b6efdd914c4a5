"""How a diagnosis is shown: as text, as JSON, as a page, and by the exit status."""

import json
import re

import numpy as np
import pytest
from planted import healthy

import optax_clipx as clipx
from optax_clipx import __main__ as command_line

ODD = "<script>alert(1)</script>\x1b[2J"


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = healthy(np.random.default_rng(0))
    history = clipx.History()
    history.append(run.pop("step"), run)
    history.save("fine.jsonl")
    run["clip/norm"][700] = 50.0
    run["clip/threshold"][700] = 100.0  # not clipped
    history = clipx.History()
    history.append(range(1000), run)
    history.save("spiky.jsonl")
    (tmp_path / "broken.jsonl").write_text("{broken}\n")


def test_the_exit_status_tells_what_was_found(files, capsys):
    assert command_line.main(["diagnose", "fine.jsonl"]) == 0
    assert capsys.readouterr().out.startswith(
        "fine.jsonl: healthy: no errors or warnings in 1,000 steps\n"
    )
    assert command_line.main(["diagnose", "fine.jsonl", "spiky.jsonl"]) == 1
    said = capsys.readouterr().out
    assert "spiky.jsonl: 1 warning in 1,000 steps\n" in said
    assert "warning: spikes at step 700: one batch has much larger gradients" in said
    assert command_line.main(["diagnose", "fine.jsonl", "broken.jsonl"]) == 2
    assert capsys.readouterr().err.startswith("error: broken.jsonl:1: ")


def test_json_has_everything(files, capsys):
    assert command_line.main(["diagnose", "spiky.jsonl", "--json"]) == 1
    (found,) = json.loads(capsys.readouterr().out).values()
    (finding,) = found["findings"]
    assert (found["healthy"], found["steps"]) == (False, 1000)
    assert (finding["code"], finding["steps"]) == ("spikes", [700])
    assert finding["evidence"]["count"] == 1
    assert "clipx.zclip()" in finding["advice"]
    assert set(finding) == {
        *("code", "severity", "steps", "evidence", "advice", "sentence"),
        *("likely_cause", "remedy"),
    }
    assert finding["likely_cause"].startswith("one batch has much larger")
    assert finding["remedy"].startswith("Clip outliers, and look at the data")
    assert found["not_judged"]["dead-leaf"] == "norms of leaves"


def test_json_has_no_nan():
    loss = [3.0] * 50 + [1.0] * 50 + [9.0] * 50 + [float("nan")] * 50
    diagnosis = clipx.diagnose({"loss": loss})
    text = json.dumps(diagnosis._asdict(), allow_nan=False)
    assert '"end": "NaN"' in text


def test_options_reach_the_diagnosis(files, capsys):
    arguments = ["diagnose", "fine.jsonl", "--threshold", "1e-3", "--target", "1"]
    assert command_line.main(arguments) == 0
    assert command_line.main(arguments[:4]) == 1
    assert "always-clipped" in capsys.readouterr().out
    assert command_line.main(["diagnose", "fine.jsonl", "--loss", "cost"]) == 2
    assert "fine.jsonl: there is no column 'cost'" in capsys.readouterr().err


def test_the_page_has_each_finding_with_a_picture(files, capsys):
    line = ["diagnose", "fine.jsonl", "spiky.jsonl", "--html", "page.html"]
    assert command_line.main(line) == 1
    with open("page.html") as file:
        page = file.read()
    assert page.startswith("<!DOCTYPE html>")
    assert page.count("<svg") == 1
    assert "spikes at step 700" in page
    assert "no errors or warnings" in page
    assert command_line.main(line) == 2
    assert "--force" in capsys.readouterr().err


def test_a_notebook_shows_the_same():
    norms = np.ones(100)
    norms[60] = 30.0
    shown = clipx.diagnose({"norm": norms})._repr_html_()
    assert "spikes at step 60" in shown
    assert "<svg" in shown


def test_names_are_escaped():
    run = {f"track_norms/{ODD}{i}": np.full(100, 1.0 + 99 * (i == 1)) for i in range(5)}
    diagnosis = clipx.diagnose(run | {"norm": np.full(100, 100.0)})
    assert ODD in diagnosis.findings[0].evidence["leaf"]
    assert "<script" not in diagnosis._repr_html_()
    for text in (str(diagnosis), diagnosis._repr_html_()):
        assert "\x1b" not in text


def test_a_picture_of_huge_or_equal_numbers_is_drawn():
    for norm in (1e308, 1.0):
        norms = np.full(100, norm)
        norms[60] = np.nan
        shown = clipx.diagnose({"norm": norms})._repr_html_()
        assert "<path" in shown
        assert "nan" not in shown.split("<svg")[1].split("</svg>")[0]


def test_a_picture_shows_the_line_and_marks_the_step():
    norms = np.ones(101)
    norms[60] = 30.0
    shown = clipx.diagnose({"norm": norms})._repr_html_()
    (path,) = set(re.findall(r'<path d="([^"]*)"/>', shown))
    points = np.array(re.findall(r"[ML](\S+) ([\d.]+)", path), float)
    expected = [[3.4 * i, 0.0 if i == 60 else 90.0] for i in range(101)]
    np.testing.assert_allclose(points, expected, atol=0.051)
    assert re.findall(r'<line x1="([\d.]+)"', shown) == ["204.0"]


def test_the_pictures_of_a_page_have_numbers_and_evidence_has_words():
    norms = np.r_[np.full(100, 2.0), np.full(20, np.nan)]
    norms[50] = 80.0
    shown = clipx.diagnose({"norm": norms})._repr_html_()
    shown = shown.replace(' style="white-space: normal"', "")
    for text in (">80</text>", ">2</text>", ">step 0</text>", ">step 119</text>"):
        assert text in shown
    assert "<td>first in column</td><td>norm</td>" in shown
    assert "<td>loss not finite at this step</td><td>no</td>" in shown
    assert "leaves</td>" not in shown


def test_a_norm_that_was_computed_from_leaves_is_called_so():
    leaves = {f"track_norms/{name}": np.ones(200) for name in "ab"}
    leaves["track_norms/a"][100] = 90.0
    shown = clipx.diagnose(leaves)._repr_html_()
    assert "computed from the norms of its leaves" in shown
    assert "track/norm" not in shown
