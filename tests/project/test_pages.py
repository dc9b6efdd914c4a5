"""The code of README and docs runs, and the API page misses no public name."""

import importlib.util
import pathlib
import re

import jax
import pytest
from test_docstrings import NAMES

ROOT = pathlib.Path(__file__).parents[2]
INDEX = ROOT / "docs/methods/index.md"
PAGES = {  # what each prints
    "README.md": r"92\.73618",
    "docs/index.md": r"92\.73618",
    "docs/quickstart.md": r"clip/norm 92\.73618",
    "docs/meshes.md": r"device 64\.0\n.*parallel 64\.0\nFSDP 64\.0\n"
    r"shard_map 64\.0\n10\.0\n10\.0",
    "docs/units.md": r"\(6, 16, 32\) +\(1,\)(.|\n)*0\.1000(.|\n)*1\. +0\.5 0\.1",
    "docs/moments.md": r"True\nTrue",
    "docs/tap.md": r"100 10\.0\n\[1\.0, 2\.0, 3\.0, 4\.0\]",
    "docs/muon.md": r"one norm: .* 1\d\d\.\d times smaller\n"
    r"excluding: .* 1\.0 times smaller\n(5\.65685\d+\n){4}"
    r"1\.0 1\.0",
    "docs/adaptive.md": r"2449 came down to 2\.69\n1",
    "docs/backward.md": r"2184\d\.\d*\n(3\.0|2\.999999\d)$",
    "docs/per_example.md": r"1 64\n1\.0\n\(10,\)",
    "docs/monitoring.md": r"track_ratios/kernel: ",
    "docs/checkpoints.md": r"60 100 100\nTrue\nTrue\n101 P.*'data'.*\n"
    r"\['metrics', .*'inner/0',",
    "docs/rewinding.md": r"150 158 120 179\n.* (0\.000\d+|\d\.\d+e-\d+)\n"
    r".* 0\.[5-9]\d+\n1\.0 0\.5 1\.0\n"
    r"{\"rewind\": 1, \"step\": 158(.|\n)*{\"done\": 1}",
    "docs/frameworks.md": r"\d+ -> 1\.00\n\['clip/clipped', 'clip/clipped_norm'\]\n"
    r"True\nNone\nP\w*\(None, 'model'\)\n\{'P\w*\(\)'\}",
    "docs/precision.md": r"5 steps dropped, scale 32768\.0\n0\.5 0 0\.2500000\n"
    r"32768\.0 1 0\.0000076\n\[-0\.6 +-0\.8(.|\n)*8 changes, 7 of 40",
    "docs/coming_from.md": r"1\.00, 0\.50",
    "docs/sharp_edges.md": r"1\.0 \[-0\.09999.*\n0\.001 \[-0\.09999.*\n0\.25",
    "docs/write_your_own.md": r"0\.99999994 0\.2721\d*\n1\.5\n3\.74\d* 1\.90\d*\n2\.84",
    "docs/troubleshooting.md": r"step: \[\]\nspikes at steps \[150\]\n"
    r"clip rate: 0\.01\n"
    r"(.|\n)*track_norms/body",
    "docs/diagnosing.md": r"warning: spikes at step 300(.|\n)*level-shift at step 600"
    r"(.|\n)*found level-shift \(600,\)(.|\n)*periodic periodic-spikes \(55, 109, 163\)"
    r"(.|\n)*burst update-before-loss \(328,\)(.|\n)*decay growing-norms"
    r"(.|\n)*leaf starved-leaves(.|\n)*rate loss-diverged \(278,\)"
    r"(.|\n)*\('spikes', 'level-shift'\)",
    "docs/batch_size.md": r"0\.5\n0\.79\d*\nnoise scale: \d examples\n(10\.0|9\.99\d*)",
    "docs/methods/qk_clip.md": r"4307\.\d+ 1\.0\n\d+\.\d+ 0\.\d*\n"
    r"\[( *(99\.9+|100\.)\d*){4} *\]\nlayers/0 \[0\.1372",
    "docs/choosing.md": r"0\.335 would have clipped 10\.0%",
}
ALONE = {INDEX, ROOT / "docs/methods/qk_clip.md"}  # their code is more than one line
METHODS = sorted(set((ROOT / "docs/methods").glob("*.md")) - ALONE)


def can_run(block):
    """Whether the package that a block says it needs is installed."""
    needed = re.match(r"# Needs (\w+)\n", block)
    return needed is None or importlib.util.find_spec(needed[1]) is not None


@pytest.mark.one_in(20, rest="slow")
@pytest.mark.parametrize("page", PAGES)
@pytest.mark.filterwarnings("ignore:.*jax.tree_util:DeprecationWarning")
def test_the_code_of_a_page_runs(page, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some pages write files
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    namespace = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in filter(can_run, blocks):
            exec(compile(block, page, "exec"), namespace)
    assert re.search(PAGES[page], capsys.readouterr().out)


@pytest.mark.one_in(10, rest="slow")
@pytest.mark.parametrize("page", METHODS, ids=lambda page: page.stem)
def test_the_line_of_a_method_takes_a_step(page):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert blocks
    params = {"kernel": jax.numpy.ones((3, 2)), "bias": jax.numpy.zeros(2)}
    grads = jax.tree.map(lambda x: x + 1.0, params)
    namespace = {}
    for block in blocks:
        assert page.stem in block
        exec(compile(block, str(page), "exec"), namespace)
        tx = namespace.pop("tx")
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            updates, _ = tx.update(grads, tx.init(params), params)
        assert all(bool((x < 0).all()) for x in jax.tree.leaves(updates))


def test_every_page_with_code_is_run():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *ALONE]
    with_code = {p for p in pages if "```python" in p.read_text()}
    assert {str(p.relative_to(ROOT)) for p in with_code} == set(PAGES)


def test_the_api_page_has_every_public_name():
    listed = re.findall(r"^   (\w[\w.]*)$", (ROOT / "docs/api.md").read_text(), re.M)
    listed = {name.rsplit(".", 1)[-1] for name in listed}
    assert {name.rsplit(".", 1)[-1] for name in NAMES} == listed


def test_the_two_commands_stand_on_the_first_screen():
    first_screen = (ROOT / "README.md").read_text().splitlines()[:48]
    commands = [
        line for line in first_screen if line.startswith("python3 -m venv .venv && ")
    ]
    assert len(commands) == 2
    assert commands[0].endswith(".venv/bin/python examples/exploding_gradients.py")
    assert commands[1].endswith('".[test]" && .venv/bin/python -m pytest')
