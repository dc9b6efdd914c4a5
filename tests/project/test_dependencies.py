"""What is imported, and what an absent optional package makes of each feature."""

import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
CORE = [Requirement(line) for line in PROJECT["project"]["dependencies"]]


def closure():
    """The distributions that the core depends on, and what these depend on."""
    found, todo = set(), list(CORE)
    while todo:
        needed = todo.pop()
        name = canonicalize_name(needed.name)
        if name in found or (needed.marker and not needed.marker.evaluate()):
            continue
        found.add(name)
        todo += map(Requirement, requires(name) or [])
    return found


def others():
    """The top-level modules of all distributions that the core does not depend on."""
    kept = {*closure(), "optax-clipx"}
    return [
        module
        for module, names in packages_distributions().items()
        if not {canonicalize_name(name) for name in names} & kept
    ]


def python(code, *arguments, cwd=None):
    ran = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


REFUSE = """
import importlib, json, os, pkgutil, sys, tempfile
from contextlib import redirect_stderr
from io import StringIO

REFUSED = set(json.loads(sys.argv[1]))

class Refuse:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in REFUSED:
            raise ModuleNotFoundError(f"{name} is refused", name=name)

sys.meta_path.insert(0, Refuse)
try:
    import matplotlib
    sys.exit("matplotlib is not refused")
except ModuleNotFoundError:
    pass

import optax_clipx as clipx
names = [m.name for m in pkgutil.walk_packages(clipx.__path__, "optax_clipx.")]
for name in names:
    importlib.import_module(name)

import jax.numpy as jnp
import numpy as np
from optax_clipx import plotting
from optax_clipx.__main__ import main

run = {"loss": [3.0, 2.0], "clip/norm": [1.0, 3.0], "track_norms/a": [1.0, 2.0]}
history = clipx.History()
history.append(range(2), {k: np.array(x) for k, x in run.items()})
history.save("run.jsonl")
open("events.out.tfevents.1", "wb").close()
assert clipx.suggest_threshold("run.jsonl").value > 0
assert main(["suggest", "run.jsonl"]) == 0
said = StringIO()
with redirect_stderr(said):
    found = clipx.find_threshold(lambda limit: limit, 1, 2)
assert said.getvalue().startswith("no progress bar: tqdm is missing. Run: pip install")
assert clipx.units.flax(("dense", "kernel"), jnp.ones((2, 3))) == (0,)
assert clipx.units.equinox(("linear", "weight"), jnp.ones((2, 3))) == (1,)
assert clipx.units.haiku(("linear", "w"), jnp.ones((2, 3))) == (0,)

class Manager:
    all_steps = delete = wait_until_finished = lambda self: [0]
    def restore(self, step, args): return None

rewind = clipx.Rewind(Manager(), clipx.History(resume=True), "rewinds.jsonl")
assert rewind.restore({}, args="given") == (None, 0)

def command(line):
    errors = StringIO()
    with redirect_stderr(errors):
        assert main(line.split()) == 2
    raise ImportError(errors.getvalue())

FEATURES = {
    "plotting.norms": lambda: plotting.norms(run),
    "plotting.clip_rate": lambda: plotting.clip_rate(run, limit=2.0),
    "plotting.histogram": lambda: plotting.histogram(run),
    "plotting.heatmap": lambda: plotting.heatmap(run),
    "plotting.compare": lambda: plotting.compare({"a": run}),
    "plotting.overview": lambda: plotting.overview(run),
    "plotting.sweep": lambda: plotting.sweep(found),
    "plotting.sweep_map": lambda: plotting.sweep_map(found),
    "History.plot": history.plot,
    "Sweep.plot": found.plot,
    "plot": lambda: command("plot run.jsonl"),
    "compare": lambda: command("compare run.jsonl"),
    "plot --html": lambda: command("plot run.jsonl --html page.html"),
    "watch": lambda: command("watch run.jsonl --once"),
    "History.load of events": lambda: clipx.History.load("events.out.tfevents.1"),
    "plot of events": lambda: command("plot events.out.tfevents.1"),
    "History.to_pandas": history.to_pandas,
    "Rewind.restore": lambda: rewind.restore({}),
    "units.of_model": lambda: clipx.units.of_model({"w": 1}),
}
said = {}
for name, use in FEATURES.items():
    try:
        use()
    except (ImportError, ValueError, TypeError) as error:
        said[name] = str(error)
print(json.dumps({"modules": names, "said": said, "files": sorted(os.listdir())}))
"""


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refused")
    return python(REFUSE, json.dumps(others()), cwd=folder)


def test_the_core_needs_its_three_dependencies_alone(refused):
    assert {r.name for r in CORE} == {"jax", "optax", "jaxtyping"}
    modules = set(refused["modules"])
    public = {"backward", "functional", "per_example", "plotting", "units", "history"}
    assert {f"optax_clipx.{name}" for name in {*public, "__main__"}} <= modules
    # Nothing was written on the way to an error.
    assert refused["files"] == ["events.out.tfevents.1", "run.jsonl"]


MENDS = {
    r"pip install matplotlib$": [
        "plotting.norms",
        "plotting.clip_rate",
        "plotting.histogram",
        "plotting.heatmap",
        "plotting.compare",
        "plotting.overview",
        "plotting.sweep",
        "plotting.sweep_map",
        "History.plot",
        "Sweep.plot",
        "plot",
        "compare",
    ],
    r"pip install plotly$": ["plot --html"],
    r"pip install rich$": ["watch"],
    r"pip install tensorboard$": [
        "History.load of events",
        "plot of events",
    ],
    r"pip install orbax-checkpoint$": ["Rewind.restore"],
    r"pip install pandas$": ["History.to_pandas"],
    r"Expected an NNX or Equinox model, got dict": ["units.of_model"],
}


@pytest.mark.one_in(10)
@pytest.mark.parametrize(
    ("feature", "words"), [(f, words) for words, fs in MENDS.items() for f in fs]
)
def test_what_is_missing_is_named_with_its_pip_line(refused, feature, words):
    assert re.search(words, refused["said"][feature])


def test_every_package_that_is_named_is_one_of_an_extra():
    source = Path(importlib.util.find_spec("optax_clipx").origin).parent
    code = [path.read_text() for path in source.rglob("*.py")]
    named = {x for text in code for x in re.findall(r"missing\(['\"]([\w-]+)", text)}
    extras = PROJECT["project"]["optional-dependencies"].values()
    known = {Requirement(line).name for lines in extras for line in lines}
    assert named == {
        *("matplotlib", "plotly", "rich", "tensorboard", "orbax-checkpoint"),
        *("pandas", "tqdm"),
    }
    assert named <= known
    assert not any("pip install" in x and "optax_clipx[" in x for x in code)


NEW = """
import json, sys
import optax
before = set(sys.modules)
import optax_clipx
print(json.dumps([sorted(before), sorted(set(sys.modules) - before)]))
"""


def test_the_import_brings_no_other_package_along():
    before, new = python(NEW)
    known = {name.partition(".")[0] for name in before} | sys.stdlib_module_names
    brought = {name.partition(".")[0] for name in new} - known
    assert brought - {"wadler_lindig"} == {"optax_clipx", "jaxtyping"}
