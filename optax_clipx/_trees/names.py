"""Names that users of other libraries look for in this one."""

import sys

_NORM = (
    "optax.chain(optax_clipx.clip_by_global_norm(1.0), optimizer), which clips in"
    " every step, or optax_clipx.functional.clip_by_global_norm(grads, 1.0), which"
    " clips one tree of gradients"
)
_VALUE = (
    "optax.chain(optax_clipx.clip(1.0), optimizer), which clips in every step, or"
    " optax_clipx.functional.clip_by_value(grads, -1.0, 1.0), which clips one tree of"
    " gradients"
)
_ELSEWHERE = {
    "clip_grad_norm_": _NORM,
    "clip_grad_norm": _NORM,
    "clip_grad_value_": _VALUE,
    "clip_grad_value": _VALUE,
}


def missing(name: str, module: str) -> AttributeError:
    """The error of a name that a module does not have, and what to write instead."""
    said = f"module {module!r} has no attribute {name!r}"
    if name in _ELSEWHERE:
        said += f". Write {_ELSEWHERE[name]}."
    return AttributeError(said, name=name, obj=sys.modules.get(module))
