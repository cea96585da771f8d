"""Whether an optimizer treats all layers of a model alike, read from its traced update.

Trying an optimizer on every layer of a deep model compiles a program as long as the model. If each
layer's update is the same expression of its own gradient, state and parameter, and of values that
all layers share (a global norm, a step count), then trying it on a few layers is as good.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.extend.core as jex
import optax

from shardtrain.pipeline.jaxprs import is_literal
from shardtrain.pipeline.stages import StageLayout
from shardtrain.pytree import leaves_by_path


def treats_layers_alike(
    optimizer: optax.GradientTransformation, params: Any, layout: StageLayout
) -> bool:
    """Whether every layer's update is the same expression.

    Args:
        optimizer: any optax transformation, for the model's own parameter tree.
        params: abstract parameters in the model's own layout.
        layout: which of their paths are layers of one leaf.
    """
    owner = {path: leaf.name for leaf in layout.leaves for path in leaf.paths}
    plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    state = jax.eval_shape(optimizer.init, plain)
    program, shapes = jax.make_jaxpr(lambda g, s, p: optimizer.update(g, s, p), return_shape=True)(
        plain, state, plain
    )
    jaxpr = program.jaxpr
    names = [_name(path, owner) for path in leaves_by_path((plain, state, plain))]
    same = _Same(program, dict(zip(jaxpr.invars, names, strict=True)))
    results = [_name(path, owner) for path in leaves_by_path(shapes)]
    first: dict[Any, Any] = {}
    return all(
        same(first.setdefault(name, atom), atom)
        for name, atom in zip(results, jaxpr.outvars, strict=True)
        if name is not None
    )


def _name(path: str, owner: Mapping[str, str]) -> tuple[str, ...] | None:
    """What an array of a layer is called in every layer; None for all other arrays."""
    parts = path.split("/")
    for n in range(len(parts)):
        found = owner.get("/".join(parts[n:]))
        if found is not None:
            return (*parts[:n], found)
    return None


class _Same:
    """Whether two values of a program are one, or one expression of two layers' arrays."""

    def __init__(self, program: jex.ClosedJaxpr, names: dict[Any, Any]):
        self.names = names
        self.made = {
            v: (eqn, place) for eqn in program.jaxpr.eqns for place, v in enumerate(eqn.outvars)
        }
        self.known: dict[tuple[Any, Any], bool] = {}

    def __call__(self, a: Any, b: Any) -> bool:
        if a is b:
            return True
        if is_literal(a) or is_literal(b):
            return is_literal(a) and is_literal(b) and repr(a) == repr(b)
        if (a, b) not in self.known:
            self.known[a, b] = self._compare(a, b)
        return self.known[a, b]

    def _compare(self, a: Any, b: Any) -> bool:
        if a not in self.made or b not in self.made:
            name = self.names.get(a)
            return name is not None and name == self.names.get(b)
        (one, place), (two, other) = self.made[a], self.made[b]
        if place != other or one.primitive is not two.primitive:
            return False
        if repr(one.params) != repr(two.params) or len(one.invars) != len(two.invars):
            return False
        return all(self(x, y) for x, y in zip(one.invars, two.invars, strict=True))
