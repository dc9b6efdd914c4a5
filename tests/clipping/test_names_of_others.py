"""Names of PyTorch that this package does not have."""

import pytest

import optax_clipx as clipx


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("clip_grad_norm_", "functional.clip_by_global_norm(grads, 1.0)"),
        ("clip_grad_value_", "functional.clip_by_value(grads, -1.0, 1.0)"),
    ],
)
def test_what_to_write_instead(name, instead):
    with pytest.raises(AttributeError) as caught:
        getattr(clipx, name)
    assert instead in str(caught.value)


def test_any_other_name_is_not_there():
    with pytest.raises(AttributeError, match=r"no attribute 'zcilp'$") as caught:
        clipx.zcilp  # noqa: B018
    assert caught.value.obj is clipx  # so that Python asks: did you mean 'zclip'?
    assert not hasattr(clipx, "clip_grad_norm_")
