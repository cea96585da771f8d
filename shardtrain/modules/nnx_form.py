"""NNX modules and factories as a `ModelForm`."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from shardtrain.errors import ModelError
from shardtrain.modules.compute_dtype import narrow_embeddings
from shardtrain.modules.form import ModelForm, structure_change
from shardtrain.modules.intercept import Calls, nnx_calls, repeated
from shardtrain.pytree import abstract, leaves_by_path


def instance_form(module: nnx.Module) -> ModelForm:
    """The functional form of a module that already has values."""
    params, variables = _split(module)[1:]
    for path, leaf in leaves_by_path(params).items():
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise ModelError(
                f"parameter {path} of {type(module).__name__} has no value (an abstract module). "
                "Pass a factory instead, `lambda rngs: Model(..., rngs=rngs)`: shardtrain "
                "initialises it sharded, never whole on one device"
            )
    return _form(module, init=None, initial=(params, variables))


def factory_form(factory: Callable[[nnx.Rngs], nnx.Module]) -> ModelForm:
    """The functional form of `rngs -> nnx.Module`; nothing is materialised."""

    def build(key: jax.Array) -> nnx.Module:
        with nnx.use_eager_sharding(False):
            return factory(nnx.Rngs(key))

    def checked(key: jax.Array) -> Any:
        made = build(key)
        if not isinstance(made, nnx.Module):
            raise ModelError(
                f"the model is a callable that returned {type(made).__name__} when given "
                "nnx.Rngs; it must return an nnx.Module"
            )
        return made

    module = nnx.eval_shape(lambda: checked(jax.random.key(0)))
    return _form(module, init=lambda key: _split(build(key))[1:], initial=None, model=factory)


def _form(module: nnx.Module, init: Any, initial: Any, model: Any = None) -> ModelForm:
    graphdef, params_state, variables_state = nnx.split(module, nnx.Param, ...)
    inner = dict(nnx.iter_modules(module))
    # A leaf module (one Linear of a list of Linears) is no block: nothing in it to recompute.
    parents = {path[:i] for path in inner for i in range(len(path))}
    blocks = repeated((p, type(m)) for p, m in inner.items() if p in parents)

    def merge(params: Any, variables: Any) -> nnx.Module:
        return nnx.merge(
            graphdef, _filled(params_state, params), _filled(variables_state, variables)
        )

    def apply(
        fn: Callable[..., Any],
        params: Any,
        variables: Any,
        key: jax.Array,
        train: bool,
        args: tuple[Any, ...],
        calls: Calls,
    ) -> tuple[Any, Any]:
        del key  # NNX modules carry their own rng state among their variables

        def call(narrow: bool) -> tuple[Any, Any]:
            with nnx.use_eager_sharding(False):
                bound = merge(params, variables)
                if narrow:
                    narrow_embeddings(bound, calls.compute_dtype)
                if not train:
                    bound.eval()
                wrapped = nnx_calls(calls, bound, frozenset(blocks.values()))
                with wrapped if calls.active else contextlib.nullcontext():
                    out = fn(bound, *args)
                return out, _variables_after(bound)

        narrow = calls.narrow_embeddings and calls.compute_dtype is not None
        try:
            out, new = call(narrow)
        except TypeError:
            # A loop or branch of this model relies on the float32 that `nnx.Embed` gives.
            if not narrow:
                raise
            out, new = call(False)
        changed = structure_change(variables, new)
        if changed and narrow:  # a variable is float32
            out, new = call(False)
            changed = structure_change(variables, new)
        if changed:
            raise ModelError(
                f"{type(module).__name__} changed its variables during the call ({changed}). "
                "Create every variable in __init__, with the shape and dtype it keeps"
            )
        return out, new

    return ModelForm(
        kind="nnx",
        name=type(module).__name__,
        init=init,
        apply=apply,
        rebuild=merge,
        abstract_params=abstract(nnx.to_pure_dict(params_state)),
        abstract_variables=abstract(nnx.to_pure_dict(variables_state)),
        annotations=_annotations(params_state),
        initial=initial,
        blocks=tuple("/".join(map(str, path)) for path in sorted(blocks, key=str)),
        model=module if model is None else model,
    )


def _split(module: nnx.Module) -> tuple[Any, Any, Any]:
    graphdef, params, variables = nnx.split(module, nnx.Param, ...)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(variables)


def _variables_after(module: nnx.Module) -> Any:
    """All non-parameters, without what `sow` left: that belongs to one call."""
    _, _, _, rest = nnx.split(module, nnx.Param, nnx.Intermediate, ...)
    return nnx.to_pure_dict(rest)


def _filled(template: Any, values: Any) -> Any:
    """The template's variables (types and metadata) around new arrays."""
    by_path = leaves_by_path(values)
    flat = []
    for path, variable in nnx.to_flat_state(template):
        key = "/".join(str(part) for part in path)
        flat.append((path, variable.replace(by_path[key])))
    return nnx.from_flat_state(flat)


def _annotations(params_state: Any) -> dict[str, tuple[Any, ...]]:
    found = {}
    for path, variable in nnx.to_flat_state(params_state):
        metadata = variable.get_metadata()
        names = metadata.get("out_sharding") or metadata.get("sharding_names")
        if names is not None and any(n is not None for n in names):
            rank = variable.get_value().ndim
            found["/".join(str(p) for p in path)] = tuple(names) + (None,) * (rank - len(names))
    return found
