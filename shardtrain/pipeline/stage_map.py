"""One stage's work as a function, and its map over all stages.

A stage's chunk is a `lax.scan` over its layers; `jax.vmap(..., spmd_axis_name="pipeline")` maps it
over the stages, whose dim is sharded over the mesh axis `pipeline`. Every device runs the same
operations on its own stage.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from shardtrain.pipeline.buffers import AXIS
from shardtrain.pipeline.classify import Extracted, Flat
from shardtrain.pipeline.stages import StageLayout


@dataclasses.dataclass(frozen=True)
class Stages:
    """The stages of an extracted model.

    Args:
        model: the extracted model.
        layout: sizes (stages, virtual stages, layers per chunk).
        gather: brings chunks `[P, layers, ...]` from the layout they are stored in (fsdp shards)
            to the one the computation uses; differentiated through.
    """

    model: Extracted
    layout: StageLayout
    gather: Callable[[list], list] = lambda params: params

    def first_carry(self, outer: Sequence[Any]) -> list[Any]:
        """`pre`, and empty rows for what the blocks will report to `post`."""
        reports = [jnp.zeros((self.layout.count, *c.shape), c.dtype) for c in self.model.collected]
        return [*self.model.pre(*outer), *reports]

    def sides(
        self, outer_of: Callable[[Any], list[Any]], microbatch: jax.Array, virtual: jax.Array
    ) -> list[Any]:
        """What every stage's blocks read beside the carry, `[P, ...]` each.

        Args:
            outer_of: microbatch index -> outer values.
            microbatch: `[P]`, the microbatch each stage works on.
            virtual: `[P]`, its virtual stage.
        """
        p, chunk = self.layout.num_stages, self.layout.per_chunk

        def one(stage: jax.Array, m: jax.Array, v: jax.Array) -> list[Any]:
            values = self.model.sides(*outer_of(m))
            layered = [
                jax.lax.dynamic_slice_in_dim(x, (v * p + stage) * chunk, chunk)
                for x in values[self.model.num_shared :]
            ]
            return [*values[: self.model.num_shared], *layered]

        return jax.vmap(one, spmd_axis_name=AXIS)(jnp.arange(p), microbatch, virtual)

    def run(
        self, params: list, states: list, sides: list, virtual: jax.Array, carry: list
    ) -> tuple[list, list]:
        """All stages' chunks: `(carry [P, ...], new states [P, layers, ...])`."""
        args = (self.prepare(params), states, sides, self.first_layer(virtual), carry)
        return jax.vmap(self.one, spmd_axis_name=AXIS)(*args)

    def prepare(self, params: list) -> list:
        """Stored chunks `[P, layers, ...]` as the block reads them: gathered, then cast."""
        dtypes = self.model.param_dtypes
        return [x.astype(dtype) for x, dtype in zip(self.gather(params), dtypes, strict=True)]

    def first_layer(self, virtual: jax.Array) -> jax.Array:
        """`[P]`: index of the first layer of every stage's chunk."""
        stage = jnp.arange(self.layout.num_stages)
        return (virtual * self.layout.num_stages + stage) * self.layout.per_chunk

    def one(
        self, params: list, states: list, sides: list, start: jax.Array, carry: list
    ) -> tuple[list, list]:
        """One stage's chunk, `start` its first layer: `(carry, new states [layers, ...])`."""
        shared, layered = self.inputs(states, sides, start)
        block = self.model.block
        if self.model.remat is not None:
            policy: Any = self.model.remat["policy"]
            block = jax.checkpoint(block, policy=policy, prevent_cse=False)
        layer = lambda carry, xs: self.layer(block, xs[0], shared, xs[1], carry)
        return jax.lax.scan(layer, carry, (params, layered))

    def inputs(self, states: list, sides: list, start: jax.Array) -> tuple[list, list]:
        """What one stage's layers read beside parameters and carry: shared, and `[layers, ...]`.

        The latter are the layer's index, its states, and its own part of `sides`.
        """
        index = start + jnp.arange(self.layout.per_chunk)
        return sides[: self.model.num_shared], [index, *states, *sides[self.model.num_shared :]]

    def layer(
        self, block: Flat, params: list, shared: list, layered: list, carry: list
    ) -> tuple[list, list]:
        """One layer, `block` or `block` rematerialised: `(carry, new states)`."""
        num_carry, num_states = len(self.model.carry), len(self.model.states)
        index, *own = layered
        kept, reports = carry[:num_carry], carry[num_carry:]
        out = block(*params, *own, *shared, *kept)
        found = out[num_carry + num_states :]
        rows = jnp.arange(self.layout.count) == index
        reports = [
            jnp.where(rows.reshape(-1, *(1,) * new.ndim), new, old)
            for new, old in zip(found, reports, strict=True)
        ]
        return [*out[:num_carry], *reports], out[num_carry : num_carry + num_states]
