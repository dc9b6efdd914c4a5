"""The switches of a whole program."""

CHOICES = {"blind_axes": ("error", "replicated")}  # the first is the default


class Config:
    """Switches for a whole program, for code whose lines cannot be edited.

    ==============  ==================  ================================================
    name            value               meaning
    ==============  ==================  ================================================
    ``blind_axes``  ``"error"``         the default: where types cannot tell over which
                                        mesh axes the updates are sharded (``pmap``,
                                        ``shard_map`` with ``check_vma=False``), a
                                        clipper without ``axis_name=`` or ``specs=``
                                        raises a ValueError
    ``blind_axes``  ``"replicated"``    there every device holds the same updates, as
                                        after ``jax.lax.pmean``: the same as
                                        ``axis_name=()`` at each clipper and function
    ==============  ==================  ================================================

    ``config.update(name, value)`` sets a switch, and an attribute of the same name
    reads it. The library reads it when a program is traced: set it before the first
    call of a jitted function. ``axis_name=`` and ``specs=`` come before it. Examples
    that are spread over devices are no updates: :func:`per_example.clipped_grad` asks
    for its ``axis_name=`` whatever the switch says.

    Returns:
        ``update`` returns nothing.

    Raises:
        ValueError: from ``update``, for a name or value that does not exist.

    Example:
        >>> import optax_clipx as clipx
        >>> clipx.config.update("blind_axes", "replicated")
        >>> print(clipx.config.blind_axes)
        replicated
        >>> clipx.config.update("blind_axes", "error")

    References:
        ``jax.config.update`` has the same form.
    """

    __slots__ = ("_values",)

    def __init__(self) -> None:
        self._values = {name: choices[0] for name, choices in CHOICES.items()}

    @property
    def blind_axes(self) -> str:
        """What updates are taken for where types cannot tell how they lie."""
        return self._values["blind_axes"]

    def update(self, name: object, value: object) -> None:
        """Sets a switch."""
        if name not in CHOICES:
            raise ValueError(
                f"Expected the name of a switch, one of {tuple(CHOICES)}, got {name!r}."
            )
        if value not in CHOICES[name]:
            raise ValueError(
                f"Expected {name} to be one of {CHOICES[name]}, got {value!r}."
            )
        self._values[name] = value


config = Config()
