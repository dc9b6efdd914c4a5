"""The trials of the newer rules: known cells are kept, and tables are of all seeds."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import private_threshold
import rules

TRIAL = rules.Trial(
    "title",
    (rules.Situation("easy"), rules.Situation("hard")),
    {"method": lambda situation: None},
)


def runs(*losses):
    rest = {"accuracy": 0.5, "first": 0.25, "last": 1.0, "series": {}}
    return [{"loss": loss, **rest} for loss in losses]


def test_known_cells_are_not_trained_again(tmp_path, monkeypatch):
    monkeypatch.setattr(rules, "train", lambda situation, make: runs(1.0, 2.0, 3.0))
    known = tmp_path / "known.jsonl"
    cell = {"key": "trial | easy | method", "runs": runs(7.0, 7.0, 7.0)}
    known.write_text(json.dumps(cell) + "\n")
    cells = rules.fill(known, {"trial": TRIAL})
    assert cells["trial | easy | method"] == cell
    assert len(known.read_text().splitlines()) == 2
    text = rules.table("trial", TRIAL, cells)
    assert "| easy | method | 7 ± 0 | 50.0% ± 0.0% | 25% | 100% |" in text
    assert "| hard | method | 2 ± 1 | 50.0% ± 0.0% | 25% | 100% |" in text


EVERY = rules.TRIALS | private_threshold.TRIALS


@pytest.mark.parametrize("name", EVERY)
def test_every_trial_has_a_table_and_pictures(name):
    docs = Path(__file__).parents[2] / "docs"
    trial, text = EVERY[name], (docs / f"results/rules_{name}.md").read_text()
    for situation in trial.situations:
        for method in trial.methods:
            assert f"| {situation.title} | {method} |" in text
    for theme in ("light", "dark"):
        assert (docs / f"images/rules_{name}_{theme}.png").exists()
