"""Random numbers drawn for the whole batch, in a loss that runs one replica's rows at a time.

Dropout draws a mask of the batch's shape. A replica that drew for its own rows alone would draw
other numbers than one device does (and the same ones as every other replica). Here each such draw
is made for the whole batch, as on one device, and a replica uses its part. Nothing is
communicated: JAX's counter-based generator gives every device the numbers it needs.

Which draws these are, and along which dim, is seen by tracing the loss at both batch sizes and
pairing the draws, in their order. Other equations need not correspond: JAX writes some functions
otherwise for a single row.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from shardtrain.partitioning.infer.primitive_names import DRAWS
from shardtrain.partitioning.infer.source import source_line
from shardtrain.replay import bind, bodies, contains, read, reopen, start
from shardtrain.train import LossFn

Split = Callable[[Callable[..., jax.Array], Sequence[Any], int], jax.Array]
"""`(draw, ins, dim) -> ` this replica's part of `draw(*ins)` along `dim`."""


def draw_for_batch(loss: LossFn, num_replicas: int, staged: bool = False) -> LossFn:
    """The loss of one replica's rows with the random numbers those rows get on one device.

    Args:
      loss: `(params, variables, batch, key) -> (sums, new variables)`; proven a sum over examples
        with `batch_independence(..., ignore_random=True)` and `hidden_draw` finding none.
      num_replicas: Parts of the batch, R; the result must run under `jax.vmap` over the batch.
      staged: The result is cut into a pipeline: some of it is mapped over stages first.
    """

    def drawing(params: Any, variables: Any, batch: Any, key: jax.Array) -> Any:
        args = params, variables, batch, key
        own, shapes = jax.make_jaxpr(loss, return_shape=True)(*args)
        if not any(contains(eqn, _draws) for eqn in own.jaxpr.eqns):
            return loss(*args)
        whole = _whole_batch(loss, num_replicas, *args)
        # Anything mapped over replicas will do: its values are not used.
        row = jax.lax.stop_gradient(jnp.ravel(jax.tree.leaves(batch)[0])[0])
        split = _splitter(num_replicas, row, staged)
        outs = _evaluate((own, whole), jax.tree.leaves(args), split)
        return jax.tree.unflatten(jax.tree.structure(shapes), outs)

    return drawing


def hidden_draw(loss: LossFn, num_replicas: int, *args: Any) -> str:
    """Why `draw_for_batch` cannot reach a draw shaped by the batch, with the line, or "".

    Args:
      loss: The loss.
      num_replicas: Parts of the batch.
      args: Abstract params, variables, one replica's batch, and key.
    """
    own = jax.make_jaxpr(loss)(*args)
    whole = _whole_batch(loss, num_replicas, *args)
    return next(_hidden((own.jaxpr, whole.jaxpr), ""), "")


def _whole_batch(loss: LossFn, num_replicas: int, *args: Any) -> jex.ClosedJaxpr:
    params, variables, batch, key = jax.tree.map(_abstract, args)
    larger = lambda x: jax.ShapeDtypeStruct((num_replicas * x.shape[0], *x.shape[1:]), x.dtype)
    return jax.make_jaxpr(loss)(params, variables, jax.tree.map(larger, batch), key)


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(x), x.dtype)


def _draws(eqn: jex.JaxprEqn) -> bool:
    return eqn.primitive.name in DRAWS


def _grown_dim(own: jex.JaxprEqn, whole: jex.JaxprEqn) -> int | None:
    """The dim along which a draw is shaped by the batch; None: it is not, or its key is."""
    shapes = lambda atoms: [a.aval.shape for a in atoms]
    if shapes(own.invars) != shapes(whole.invars):
        return None  # one key per example: those are split already
    (small,), (large,) = shapes(own.outvars), shapes(whole.outvars)
    return next((d for d, (m, n) in enumerate(zip(small, large, strict=True)) if m != n), None)


def _drawing(program: Any) -> list[jex.JaxprEqn]:
    return [eqn for eqn in program.eqns if contains(eqn, _draws)]


def _hidden(pair: tuple[Any, Any], hidden_by: str, outer: str = "<unknown>") -> Iterator[str]:
    mine, theirs = map(_drawing, pair)
    names = lambda eqns: [e.primitive.name for e in eqns]
    if names(mine) != names(theirs):
        line = next((source_line(e, outer) for e in (*mine, *theirs)), outer)
        yield f"other random numbers are drawn for few rows than for many ({line})"
        return
    for own, whole in zip(mine, theirs, strict=True):
        line = source_line(own, outer)
        if hidden_by and _draws(own) and _grown_dim(own, whole) is not None:
            yield f"random numbers for the whole batch are drawn inside {hidden_by} ({line})"
        closed = bodies(own)
        hides = hidden_by or ("" if closed else own.primitive.name)
        subs = lambda eqn, closed=closed: (
            [b.jaxpr for b in bodies(eqn)] if closed else jex.jaxprs_in_params(eqn.params)
        )
        for inner in zip(subs(own), subs(whole), strict=True):
            yield from _hidden(inner, hides, line)


def _evaluate(pair: tuple[Any, Any], args: Sequence[Any], split: Split) -> list[Any]:
    own, whole = pair
    env = start(own, args)
    partners = iter(_drawing(whole.jaxpr))
    for a in own.jaxpr.eqns:
        ins = [read(env, atom) for atom in a.invars]
        outs = _draw((a, next(partners)), ins, split) if contains(a, _draws) else bind(a, ins)
        env.update(zip(a.outvars, outs, strict=True))
    return [read(env, atom) for atom in own.jaxpr.outvars]


def _draw(
    pair: tuple[jex.JaxprEqn, jex.JaxprEqn], ins: Sequence[Any], split: Split
) -> Sequence[Any]:
    """An equation that draws, or has a draw inside."""
    own, whole = pair
    if _draws(own):
        dim = _grown_dim(own, whole)
        return bind(own, ins) if dim is None else [split(lambda *x: bind(whole, x)[0], ins, dim)]
    if not bodies(own):
        return bind(own, ins)
    pairs = zip(bodies(own), bodies(whole), strict=True)
    return reopen(own, ins, [lambda *x, p=p: _evaluate(p, x, split) for p in pairs])


def _splitter(num_replicas: int, row: jax.Array, staged: bool) -> Split:
    """Takes a replica's part of a draw, by the batching rule of `jax.vmap` over replicas."""

    def split(draw: Callable[..., jax.Array], ins: Sequence[Any], dim: int) -> jax.Array:
        def parts(*ins: Any) -> jax.Array:
            whole = draw(*ins)
            shape = whole.shape
            inner = shape[dim] // num_replicas
            apart = whole.reshape(*shape[:dim], num_replicas, inner, *shape[dim + 1 :])
            return jnp.moveaxis(apart, dim, 0)

        @jax.custom_batching.custom_vmap
        def mine(_: jax.Array, *ins: Any) -> jax.Array:
            return parts(*ins)[0]  # not mapped: only shapes are looked at

        @mine.def_vmap
        def _(size: int, mapped: Sequence[bool], row: jax.Array, *ins: Any) -> tuple[Any, bool]:
            if staged:
                return _mapped_twice(parts, size, mapped[1:])(row, *ins), True
            assert size == num_replicas
            return parts(*_first(ins, mapped[1:])), True

        return mine(row, *ins)

    return split


def _first(ins: Sequence[Any], mapped: Sequence[bool]) -> list[Any]:
    """Keys are the same for all replicas, also where a loop carries them mapped."""
    return [x[0] if m else x for x, m in zip(ins, mapped, strict=True)]


def _mapped_twice(
    parts: Callable[..., jax.Array], size: int, mapped: Sequence[bool]
) -> Callable[..., jax.Array]:
    """A draw that was mapped once: over stages if it is mapped again, else over replicas.

    Replicas are mapped last of all. What is in a stage is mapped over stages before; embedding,
    head and loss are not.
    """

    @jax.custom_batching.custom_vmap
    def over_replicas(_: jax.Array, *ins: Any) -> jax.Array:
        found = parts(*_first(ins, mapped))
        # Of another size it will be mapped again: only shapes are looked at.
        return found if found.shape[0] == size else jnp.zeros((size, *found.shape[1:]), found.dtype)

    @over_replicas.def_vmap
    def _(_size: int, again: Sequence[bool], _row: jax.Array, *ins: Any) -> tuple[Any, bool]:
        given = _first(ins, again[1:])
        if not any(mapped):  # a key that is written in the model: the same in all stages
            return jnp.stack([parts(*given)] * size, axis=1), True
        axes = [0 if m else None for m in mapped]
        stages = jax.vmap(parts, in_axes=axes, axis_size=size)(*given)
        return jnp.moveaxis(stages, 1, 0), True

    return over_replicas
