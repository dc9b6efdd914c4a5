"""The package's types, as two type checkers see them from a program that uses it."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import typed_client

ROOT = Path(__file__).parents[2]
CLIENT = ROOT / "tests" / "typed_client.py"
CHECKERS = {
    # What mypy says of the package itself is asked by the project's own settings.
    "mypy": ["--config-file=", "--strict", "--follow-imports=silent"],
    "pyright": ["--pythonpath", sys.executable],
}
MYPY = ["--ignore-missing-imports"]  # Optax has no py.typed

# Each line is wrong in its own way.
WRONG = """
import optax_clipx as clipx
clipx.clip_by_global_norm()
clipx.zclip(2.5, warmup=3)
clipx.clip_by("tree", 1.0)
clipx.clip_by(clipx.measures.tree_norm(), 1.0, "rescale")
clipx.clip(1.0, metrics="yes")
clipx.History(3)
clipx.History().append()
number: int = clipx.suggest_threshold([1.0]).value
names: list[str] = clipx.metrics(())
clipx.backward.clip_value([1.0])
clipx.per_example.clipped_grad(print, 1.0, microbatch_size="all")
clipx.functional.global_norm([]).no_such_method()
clipx.no_such_name
""".strip()


def check(checker, file):
    if importlib.util.find_spec(checker) is None:
        pytest.skip(f'{checker} is missing. Run: pip install "optax_clipx[dev]"')
    options = CHECKERS[checker] + (MYPY if checker == "mypy" else [])
    return subprocess.run(
        [sys.executable, "-m", checker, *options, str(file)],
        cwd=ROOT,  # where an editable package is found by both
        env={**os.environ, "PYTHONPATH": str(ROOT), "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*jax.tree_util:DeprecationWarning")
def test_the_client_runs(tmp_path, capsys):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        typed_client.main(tmp_path)
    assert "kernel  (3, 2)  (0,)" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("checker", CHECKERS)
def test_the_client_is_typed(checker):
    ran = check(checker, CLIENT)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.slow
@pytest.mark.parametrize("checker", CHECKERS)
def test_mistakes_are_found(checker, tmp_path):
    file = tmp_path / "wrong.py"
    file.write_text(WRONG)
    ran = check(checker, file)
    found = {
        int(n) for n in re.findall(r"wrong\.py:(\d+):(?:\d+ -)? error", ran.stdout)
    }
    assert found == set(range(2, len(WRONG.splitlines()) + 1)), ran.stdout
