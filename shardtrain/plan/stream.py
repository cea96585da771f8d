"""Sequence parallelism of a plan: its layout, told to `partitioning.activations`."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from shardtrain.partitioning.activations import Stream, find_lookups, find_stream, stream_edits
from shardtrain.partitioning.dims_inside import Entries, Known
from shardtrain.partitioning.edit import rewrite
from shardtrain.partitioning.rules import as_axes
from shardtrain.plan.layout import Layout
from shardtrain.strategy import Strategy
from shardtrain.train import LossFn


def constrain_stream(
    loss: LossFn, layout: Layout, strategy: Strategy, local_axes: tuple[str, ...]
) -> LossFn:
    """The same loss with the layout of its residual stream, where the partitioner needs it.

    With `sequence_parallel` the stream is sharded over `tensor` along the sequence. With fsdp and
    tensor together, look-ups in parameters are pinned.

    Args:
      loss: `(params, variables, batch, key) -> (sums, new variables)`.
      layout: Shardings of its arguments.
      strategy: What is asked.
      local_axes: Batch axes already split off by the caller.
    """
    if layout.sizes["tensor"] == 1:
        return loss
    if strategy.sequence_parallel:
        find: Callable[..., Stream] = find_stream
    elif layout.sizes["fsdp"] > 1 and strategy.zero >= 2:
        find = find_lookups
    else:
        return loss

    def constrain(x: jax.Array, entries: Entries) -> jax.Array:
        spec = [tuple(a for a in dim if a not in local_axes) or None for dim in entries]
        return jax.lax.with_sharding_constraint(x, NamedSharding(layout.mesh, PartitionSpec(*spec)))

    known = _known(layout, local_axes)
    return rewrite(loss, lambda program: stream_edits(find(program, known), constrain))


def stream_findings(loss: LossFn, layout: Layout) -> tuple[str, ...]:
    """What of a loss sequence parallelism does not reach.

    Args:
      loss: The loss without constraints.
      layout: Shardings of its arguments.
    """
    tensor = layout.sizes["tensor"]
    if tensor == 1:
        return ("sequence_parallel has nothing to do: tensor=1",)
    state = layout.state
    plain = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    arguments = plain((state.params, state.variables, layout.batch, state.rng))
    stream = find_stream(jax.make_jaxpr(loss)(*arguments), _known(layout, ()))
    return _missing(stream, tensor)


def _missing(stream: Stream, tensor: int) -> tuple[str, ...]:
    if stream.indivisible:
        return (
            f"sequence_parallel: tensor={tensor} does not divide the sequence of "
            f"{', '.join(stream.indivisible[:3])}; it stays whole there",
        )
    if not stream.found:
        return (
            "sequence_parallel has nothing to do: no sum over tensor of an array "
            "[batch, sequence, width] was found",
        )
    return ()


def _known(layout: Layout, local_axes: tuple[str, ...]) -> Known:
    """The layout of the loss's arguments; the caller's rows are already split over `local_axes`."""
    entries = lambda spec: tuple(tuple(a for a in as_axes(e) if a not in local_axes) for e in spec)
    specs: Any = jax.tree.leaves(
        layout.compute_specs, is_leaf=lambda x: isinstance(x, PartitionSpec)
    )
    return Known(
        sizes=layout.sizes,
        params=[entries(s) for s in specs],
        batch=[entries(x.sharding.spec) for x in jax.tree.leaves(layout.batch)],
        num_variables=len(jax.tree.leaves(layout.state.variables)),
    )
