"""Plain functions as a `ModelForm`."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from shardtrain.errors import ModelError
from shardtrain.modules.form import Functional, ModelForm
from shardtrain.modules.intercept import Calls
from shardtrain.pytree import abstract, abstract_key


def functional_form(model: Functional) -> ModelForm:
    """The functional form of `Functional(init)`."""

    def init(key: jax.Array) -> tuple[Any, Any]:
        return _split(model.init(key))

    try:
        params, variables = jax.eval_shape(init, abstract_key())
    except TypeError as error:
        raise ModelError(f"{model.name}.init(key) failed: {error}") from error
    return ModelForm(
        kind="functional",
        name=model.name,
        init=init,
        apply=_apply,
        rebuild=_join,
        abstract_params=abstract(params),
        abstract_variables=abstract(variables),
        model=model,
    )


def _split(values: Any) -> tuple[Any, Any]:
    if isinstance(values, dict) and "params" in values:
        return values["params"], {k: v for k, v in values.items() if k != "params"}
    return values, {}


def _join(params: Any, variables: Any) -> Any:
    return {"params": params, **variables} if variables else params


def _apply(
    fn: Callable[..., Any],
    params: Any,
    variables: Any,
    key: jax.Array,
    train: bool,
    args: tuple[Any, ...],
    calls: Calls,
) -> tuple[Any, Any]:
    del key, train, calls  # plain functions have no module calls to act on
    return fn(_join(params, variables), *args), variables


def rngs_from(key: jax.Array) -> nnx.Rngs:
    """What a loss with a third argument gets: `rngs.dropout()` and the like give fresh keys."""
    return nnx.Rngs(key)
