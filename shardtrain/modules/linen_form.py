"""Linen modules as a `ModelForm`: bound as their author's code expects."""

import contextlib
from collections.abc import Callable, Generator
from typing import Any
from unittest import mock

import flax.linen as nn
import jax

from shardtrain.errors import ModelError
from shardtrain.modules.form import ModelForm
from shardtrain.modules.intercept import Calls, linen_calls, repeated
from shardtrain.pytree import abstract, abstract_key, leaves_by_path, path_string


def linen_form(module: nn.Module, example: Callable[..., Any], batch: Any) -> ModelForm:
    """The functional form of a Linen module.

    Args:
      module: The unbound module.
      example: `example(bound module, batch)` calls the module as training will.
      batch: Abstract batch.
    """
    streams: set[str] = set()
    sown: set[str] = set()
    called: dict[tuple[str, ...], type] = {}

    def init_all(key: jax.Array, batch: Any) -> Any:
        rngs = {"params": key, **_streams(jax.random.fold_in(key, 1), streams)}
        return nn.init(example, module)(rngs, batch)

    with _recorded(streams, sown, called):
        boxed = jax.eval_shape(init_all, abstract_key(), batch)
    if "params" not in boxed:
        raise ModelError(
            f"{type(module).__name__} created no parameters when loss_fn called it; does loss_fn "
            "call the model it is given?"
        )
    annotations = _annotations(boxed["params"])
    carried = {k: v for k, v in nn.meta.unbox(boxed).items() if k not in sown}
    collections = tuple(k for k in carried if k != "params")
    # A leaf module (one Dense of a list of Denses) is no block: nothing in it to recompute.
    parents = {path[:-1] for path in called}
    blocks = frozenset(repeated((p, k) for p, k in called.items() if p in parents))

    def init(key: jax.Array) -> tuple[Any, Any]:
        zeros = jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), batch)
        values = nn.meta.unbox(init_all(key, zeros))
        return values["params"], {k: values[k] for k in collections}

    def apply(
        fn: Callable[..., Any],
        params: Any,
        variables: Any,
        key: jax.Array,
        train: bool,
        args: tuple[Any, ...],
        calls: Calls,
    ) -> tuple[Any, Any]:
        del train
        mutable = [*collections, *sorted(sown)]
        run = nn.apply(fn, module, mutable=mutable)
        values = {"params": params, **variables}
        # "params" is the stream that an unnamed `make_rng()` and unknown names fall back to.
        rngs = {"params": jax.random.fold_in(key, 0), **_streams(key, streams)}
        with linen_calls(calls, blocks) if calls.active else contextlib.nullcontext():
            out, changed = run(values, *args, rngs=rngs)
        return out, {k: nn.meta.unbox(changed.get(k, variables[k])) for k in collections}

    return ModelForm(
        kind="linen",
        name=type(module).__name__,
        init=init,
        apply=apply,
        rebuild=lambda params, variables: (module, {"params": params, **variables}),
        abstract_params=abstract(carried["params"]),
        abstract_variables=abstract({k: carried[k] for k in collections}),
        annotations=annotations,
        blocks=tuple("/".join(path) for path in sorted(blocks)),
        model=module,
    )


def _streams(key: jax.Array, names: set[str]) -> dict[str, jax.Array]:
    """One key per rng stream; the name decides it, so adding a stream changes no other."""
    return {
        name: jax.random.fold_in(key, sum(name.encode()) + 131 * len(name))
        for name in sorted(names | {"dropout"})
        if name != "params"
    }


@contextlib.contextmanager
def _recorded(
    streams: set[str], sown: set[str], called: dict[tuple[str, ...], type]
) -> Generator[None]:
    """Note the rng streams modules draw from, the collections they sow into, and who is called.

    Sown collections hold one call's values (and would grow if carried over steps); Flax gives no
    other way to tell them from carried ones such as batch_stats.
    """
    make_rng, sow = nn.Module.make_rng, nn.Module.sow

    def noted_rng(self: nn.Module, name: str = "params") -> jax.Array:
        streams.add(name)
        return make_rng(self, name)

    def noted_sow(self: nn.Module, col: str, name: str, value: Any, **kwargs: Any) -> bool:
        sown.add(col)
        return sow(self, col, name, value, **kwargs)

    def noted_call(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name == "__call__":
            called[context.module.path] = type(context.module)
        return next_fun(*args, **kwargs)

    with (
        nn.intercept_methods(noted_call),
        mock.patch.object(nn.Module, "make_rng", noted_rng),
        mock.patch.object(nn.Module, "sow", noted_sow),
    ):
        yield


def _annotations(boxed_params: Any) -> dict[str, tuple[Any, ...]]:
    specs = nn.get_partition_spec(boxed_params)
    ranks = {p: leaf.ndim for p, leaf in leaves_by_path(nn.meta.unbox(boxed_params)).items()}
    found = {}
    flat = jax.tree_util.tree_leaves_with_path(
        specs, is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec)
    )
    for path, spec in flat:
        name = path_string(path)
        if any(entry is not None for entry in spec):
            found[name] = tuple(spec) + (None,) * (ranks[name] - len(spec))
    return found
