"""Every public transformation in every context: a cell for each pair.

The usual run takes a cell or two of each row and column, the slow one some more, and
`python docs/make_contract.py` runs them all and writes the table.
"""

import contextlib
import itertools
import os
import sys
from pathlib import Path

import jax
import optax
import pytest
from all_methods import EVERY
from contract_frameworks import FRAMEWORKS
from contract_jax import JAX
from contract_optax import OPTAX

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))
import make_contract

WHOLE = bool(os.environ.get("OPTAX_CLIPX_WHOLE"))
CONTEXTS = {**FRAMEWORKS, **OPTAX, **JAX}
# Where optax or a framework fails alone: what it says.
FAILS_ALONE: dict[str, tuple[type[Exception], str]] = {}


def cells():
    """Each pair; one of 292 is a usual test, eight are slow, the rest is for WHOLE."""
    for i, row in enumerate(EVERY):
        for j, column in enumerate(CONTEXTS):
            place = (7 * i + j) % 292
            if place % 36 and not WHOLE:
                continue  # two thousand, which take seconds to collect
            slow = place or column == "before each optimizer"
            marks = [pytest.mark.slow] if slow else []
            yield pytest.param(row, column, marks=marks, id=f"{row}|{column}")


@pytest.fixture(autouse=True)
def forget_programs(count=itertools.count(1)):  # noqa: B008  (counts over all tests)
    """Two thousand cells would fill the memory with compiled programs."""
    if next(count) % 100 == 0:
        jax.clear_caches()


@contextlib.contextmanager
def usual_promotion():
    """Optax and frameworks promote dtypes; what we do is tested strictly elsewhere."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize(("row", "column"), list(cells()))
def test_cell(row, column, record_property):
    with usual_promotion():
        if column in FAILS_ALONE:
            error, words = FAILS_ALONE[column]
            with pytest.raises(error, match=words):
                CONTEXTS[column](lambda **options: optax.identity())
            record_property("cell", f"fails without us: {words}")
            return
        CONTEXTS[column](EVERY[row].make)
    record_property("cell", "holds")


def test_the_tables_have_every_cell_and_can_be_read_back():
    known = make_contract.of_table()
    missing = {name for cells in known.values() for name in set(EVERY) - set(cells)}
    rows = " ".join(sorted(missing))
    assert not missing, f"run docs/make_contract.py --rows {rows}"
    text = make_contract.TABLE.read_text()
    for columns in make_contract.PARTS.values():
        assert make_contract.table(list(columns), known) in text
    assert "**empty**" not in text
    assert set(known) == set(CONTEXTS)
    assert all(set(cells) == set(EVERY) for cells in known.values())
