"""One functional form for every kind of model."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax

from shardtrain.errors import ModelError
from shardtrain.pytree import leaves_by_path


@dataclass(frozen=True)
class ModelForm:
    """A model as pure functions over `params` (trained) and `variables` (everything else).

    Both are nested dicts of arrays, the same layout for Linen and NNX.

    Args:
      kind: "linen", "nnx" or "functional".
      name: The model's class name.
      init: `key -> (params, variables)`; pure. None when the values are given (`initial`).
      apply: `(fn, params, variables, key, train, args) -> (fn(model, *args), new variables)`.
      rebuild: `(params, variables) -> ` the model as its author knows it.
      abstract_params: Shapes and dtypes of `params`.
      abstract_variables: Shapes and dtypes of `variables`.
      annotations: Parameter path -> the author's logical axis names, one entry per dim.
      blocks: Paths of the repeated blocks (layers), for remat and pipelines.
      initial: `(params, variables)` of a model that already has values.
      model: The user's object.
      base: The form of the model that this one adapts (`st.lora`, `st.freeze`).
      adopt: `(key, values of base) -> (params, variables)`; values None: those `base` was given.
    """

    kind: str
    name: str
    init: Callable[[jax.Array], tuple[Any, Any]] | None
    apply: Callable[..., tuple[Any, Any]]
    rebuild: Callable[[Any, Any], Any]
    abstract_params: Any
    abstract_variables: Any
    annotations: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    blocks: tuple[str, ...] = ()
    initial: tuple[Any, Any] | None = None
    model: Any = None
    base: "ModelForm | None" = None
    adopt: Callable[[jax.Array, Any], tuple[Any, Any]] | None = None

    def __post_init__(self) -> None:
        if not jax.tree.leaves(self.abstract_params):
            raise ModelError(f"{self.name} has no parameters to train")
        for path, leaf in leaves_by_path(self.abstract_params).items():
            if not jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating):
                raise ModelError(
                    f"parameter {path} has dtype {leaf.dtype}: only floating-point parameters can "
                    "be trained. Keep integer arrays outside the parameters (another collection "
                    "or nnx.Variable type)"
                )


@dataclass(frozen=True)
class Functional:
    """A model written as plain functions.

    Args:
      init: `key -> variables`, a pytree of arrays. If it is a dict with a "params" entry, that
        entry is trained and the others are carried; otherwise all of it is trained.
      name: Shown in tables.

    Example:
      >>> model = Functional(init=lambda key: {"w": jax.random.normal(key, (3,))})
    """

    init: Callable[[jax.Array], Any]
    name: str = "Functional"


def structure_change(before: Any, after: Any) -> str | None:
    """What differs between the variables a model got and those it left, or None."""
    old, new = leaves_by_path(before), leaves_by_path(after)
    parts = [f"new: {p}" for p in new if p not in old] + [f"gone: {p}" for p in old if p not in new]
    for path in old.keys() & new.keys():
        a, b = old[path], new[path]
        if a.shape != b.shape or a.dtype != b.dtype:
            parts.append(f"{path}: {a.dtype}{list(a.shape)} became {b.dtype}{list(b.shape)}")
    return "; ".join(sorted(parts)) or None
