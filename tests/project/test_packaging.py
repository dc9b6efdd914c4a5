"""Metadata, workflows and scripts: what a release is made from."""

import re
import stat
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def parsed(name):
    found = yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text())
    return found, found[True]  # YAML takes the word "on" for a boolean


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_is_whole_and_may_do_little(path):
    workflow, triggers = parsed(path.name)
    assert triggers
    assert workflow["permissions"] in ({}, {"contents": "read"})
    for job in workflow["jobs"].values():
        assert job["runs-on"]
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            if "uses" in step:
                assert re.fullmatch(r"[\w-]+/[\w-]+@(release/)?v\d+", step["uses"])
            if step.get("uses", "").startswith("actions/checkout"):
                assert step["with"]["persist-credentials"] is False
            # What others write must not be pasted into a command.
            assert "${{" not in step.get("run", "")


def test_ci_runs_on_every_python_that_is_supported():
    workflow, _ = parsed("ci.yml")
    (job,) = workflow["jobs"].values()
    supported = {
        line.rsplit(" ", 1)[-1]
        for line in PROJECT["classifiers"]
        if re.search(r"Python :: 3\.\d+$", line)
    }
    assert set(job["strategy"]["matrix"]["python"]) == supported
    assert PROJECT["requires-python"] == f">={min(supported)}"
    assert job["steps"][-1] == {"run": ".ci/run"}


def test_a_release_is_built_apart_and_published_without_a_token():
    workflow, triggers = parsed("release.yml")
    assert triggers == {"push": {"tags": ["v*"]}}
    build, publish = workflow["jobs"]["build"], workflow["jobs"]["publish"]
    assert publish["needs"] == "build"
    assert publish["permissions"] == {"id-token": "write"}
    assert "id-token" not in build["permissions"]
    assert publish["environment"]
    assert publish["steps"][-1]["uses"].startswith("pypa/gh-action-pypi-publish@")
    assert not [step for step in publish["steps"] if "run" in step]
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    assert "secrets." not in text


def test_scripts_can_be_run_and_the_last_step_is_the_wheel():
    for name in ("run", "wheel", "versions"):
        script = ROOT / ".ci" / name
        assert script.stat().st_mode & stat.S_IXUSR
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == ".ci/wheel"


def test_no_address_is_invented():
    assert "urls" not in PROJECT
    assert [list(author) for author in PROJECT["authors"]] == [["name"]]
    text = (ROOT / "SECURITY.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    assert not re.search(r"[\w.]+@[\w.]+\.\w+|https?://", text)


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    page = (ROOT / "docs" / "citing.md").read_text()
    assert f"version = {{{PROJECT['version']}}}" in page
    assert f"optax_clipx {PROJECT['version']}" in page
