"""How long methods are blind after one spike in the first hundred steps."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import robustness


@pytest.mark.slow
@pytest.mark.parametrize("name", ["skip_spikes", "auto_clip"])
def test_blind_for_ten_steps_at_most(name):
    assert int(robustness.blindness(robustness.METHODS[name])) <= 10


def test_a_window_that_a_spike_has_entered_is_blind_while_it_is_there():
    """The published rule: mean and six deviations of the last 128, from the 64th on."""
    method = robustness.METHODS["skip, window of 128"]
    norms = np.ones(300)
    norms[50] = 200.0
    blind = method.blind(norms)
    assert blind[60]
    assert blind[51:].sum() == 129  # asked every tenth step


def test_what_never_clips_is_blind_for_good():
    method = robustness.METHODS["optax.apply_if_finite"]
    assert robustness.blindness(method) == "**>= 300**"
