"""Run any schedule as one SPMD program: gradients of a pipelined loss.

Design. One `lax.scan` per phase of the schedule goes over ticks. A tick has up to three slots (F, B
and W); in each, *every* stage executes the same operations and the table masks the idle ones, so no
device ever branches away from a collective. The backward pass is scheduled by hand (`jax.vjp` of a
stage, from its stashed input), not by differentiating the loop: that is why 1F1B holds a fixed
number of activations whatever the number of microbatches. Embedding, head and loss run in the tick
too, their rows spread over all devices. Idle stages compute garbage: every result is masked
by `where`, never by a product.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from shardtrain.errors import BatchError, ScheduleError
from shardtrain.modules.losses import LossOutput
from shardtrain.pipeline.buffers import Placement
from shardtrain.pipeline.classify import Extracted
from shardtrain.pipeline.flight import Flight, Outer, Tick, rows_of
from shardtrain.pipeline.schedules import Schedule
from shardtrain.pipeline.stage_map import Stages
from shardtrain.pipeline.stages import StageLayout, StageMajor
from shardtrain.pipeline.tick import run, start
from shardtrain.train.gradients import GradFn, Gradients, split_batch


def make_pipeline_grad(
    model: Extracted,
    schedule: Schedule,
    mesh: Any,
    params_layout: StageLayout,
    batch_axes: tuple[str, ...] = ("data", "fsdp"),
    constrain: Callable[[StageMajor], StageMajor] = lambda grads: grads,
    gather: Callable[[list], list] = lambda params: params,
) -> GradFn:
    """The gradient function of a pipelined model.

    Args:
        model: from `extract`.
        schedule: its stages must equal the mesh axis `pipeline`.
        mesh: mesh with the axes `pipeline` and `batch_axes`.
        params_layout: layout of the parameters, from `stage_layout`.
        batch_axes: mesh axes that shard the batch dim.
        constrain: keeps the gradient accumulator in its sharding.
        gather: brings the blocks' chunks `[P, layers, ...]`, listed like `model.params`, from
            their stored shards to the layout of the computation.

    Returns:
        `(params, variables, batch, key) -> Gradients`: sums over all microbatches, for parameters,
        variables and gradients in `StageMajor` form and the global batch `[B, ...]`; microbatch
        `i` takes rows `i, i + M, ...` and the key `fold_in(key, i)`.

    Raises:
        ScheduleError: the schedule's stages are not the mesh's or the layout's.
    """
    if schedule.num_stages != mesh.shape["pipeline"]:
        raise ScheduleError(
            f"schedule {schedule.name!r} has {schedule.num_stages} stages, but the mesh axis "
            f"pipeline has size {mesh.shape['pipeline']}"
        )
    sizes = (params_layout.num_stages, params_layout.virtual_stages)
    if sizes != (schedule.num_stages, schedule.virtual_stages):
        raise ScheduleError(
            f"schedule {schedule.name!r} is for {schedule.num_stages} x {schedule.virtual_stages} "
            f"(stages x virtual stages), the parameters are laid out for {sizes[0]} x {sizes[1]}"
        )
    stages = Stages(model, params_layout, gather)

    def grad_fn(params: StageMajor, variables: StageMajor, batch: Any, key: jax.Array) -> Gradients:
        rows = _rows(batch, schedule.num_microbatches)
        place = Placement(mesh, batch_axes, rows)
        parts = place.numbered(jax.tree.leaves(split_batch(batch, schedule.num_microbatches)))
        outer = Outer(
            [params.outer[p] for p in model.outer_params],
            [variables.outer[p] for p in model.outer_variables],
            parts,
            key,
        )
        outer, after = _versions(model, outer, schedule.num_microbatches)
        tick = Tick(stages, schedule, place, outer, constrain)
        blocks = [params.blocks[leaf.name] for leaf in model.params]
        states = [variables.blocks[leaf.name] for leaf in model.states]
        flight = start(tick, blocks, states)
        for phase in schedule.table.phases:
            xs = rows_of(schedule.table, phase)
            body = lambda flight, row, slots=phase.slots: (
                run(tick, flight, row, blocks, slots),
                None,
            )
            flight, _ = jax.lax.scan(body, flight, xs)
        return _result(model, flight, variables, after)

    return grad_fn


def _rows(batch: Any, num_microbatches: int) -> int:
    sizes = {x.shape[0] for x in jax.tree.leaves(batch) if jnp.ndim(x)}
    if len(sizes) != 1 or max(sizes) % num_microbatches:
        raise BatchError(
            f"a batch with {sorted(sizes)} rows cannot be split into {num_microbatches} "
            "microbatches: all arrays need the same number of rows, divisible by num_microbatches"
        )
    return max(sizes) // num_microbatches


def _versions(model: Extracted, outer: Outer, count: int) -> tuple[Outer, dict[str, Any]]:
    """Values of every early-changing variable before each microbatch, and after the last."""
    if not model.pre_state:
        return outer, {}
    where = [model.outer_variables.index(path) for path in model.pre_state]

    def step(now: list[Any], m: jax.Array) -> tuple[list[Any], list[Any]]:
        values = outer.at(m, dict(zip(where, now, strict=True)))
        return model.pre_state_fn(*values), now

    first = [outer.variables[n] for n in where]
    last, before = jax.lax.scan(step, first, jnp.arange(count))
    versions = dict(zip(where, before, strict=True))
    return dataclasses.replace(outer, versions=versions), dict(
        zip(model.pre_state, last, strict=True)
    )


def _result(
    model: Extracted, flight: Flight, variables: StageMajor, after: dict[str, Any]
) -> Gradients:
    grads = StageMajor(
        dict(zip(model.outer_params, flight.outer_grads, strict=True)),
        {leaf.name: g for leaf, g in zip(model.params, flight.grads, strict=True)},
    )
    after = after | dict(zip(model.post_state, flight.post_state, strict=True))
    new = StageMajor(
        variables.outer | after,
        {leaf.name: x for leaf, x in zip(model.states, flight.states, strict=True)},
    )
    output: LossOutput = jax.tree.unflatten(model.output_tree, flight.sums)
    return Gradients(grads, output, new)
