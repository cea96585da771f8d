"""A stage's backward cut in two: input gradient now (slot B), weight gradient later (slot W).

One layer's gradient is cut (`cut_layer`), and each part is scanned over the layers of the stage:
`forward` in order, `inputs` in reverse order, `weights` in any. So the program does not grow with
the layers, and nothing is computed twice.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from shardtrain.pipeline.cut_layer import LayerCut, cut_layer, split_sizes
from shardtrain.pipeline.flight import floats_first, is_float, merge, merge_like, replaced
from shardtrain.pipeline.residual import Residual

LayerFn = Callable[[list, list, list, list], list]


@dataclasses.dataclass(frozen=True)
class SplitBackward:
    """The three parts for one stage, its params and layered inputs `[layers, ...]`.

    Args:
        cut: the parts of one layer.
        smooth: positions of the shared and of the layered inputs that have a gradient.
        num_layers: layers of a stage.
    """

    cut: LayerCut
    smooth: tuple[list[int], list[int]]
    num_layers: int

    def forward(
        self, params: list, shared: list, layered: list, carry: list
    ) -> tuple[list, tuple[list, list]]:
        """Every layer in order: the last carry, and what `inputs` needs beside the gradient."""
        once = self.cut.once(*shared)
        known = once[: self.cut.num_once]

        def layer(carry: list, xs: tuple[list, list]) -> tuple[list, list]:
            out = self.cut.forward(*xs[0], *shared, *xs[1], *carry, *known)
            return out[: len(carry)], out[len(carry) :]

        carry, kept = jax.lax.scan(layer, carry, (params, layered))
        return carry, (once, kept)

    def inputs(
        self,
        params: list,
        shared: list,
        layered: list,
        kept: tuple[list, list],
        grads: list,
        residuals: Residual,
        row: jax.Array,
    ) -> tuple[tuple[list, list, list], Residual]:
        """Every layer in reverse order.

        Args:
            params, shared, layered: as for `forward`.
            kept: from `forward`.
            grads: gradients of the floating part of the last carry.
            residuals: buffers `[rows, ...]`; written in place, as a copy of what all layers keep
                for slot W would be the largest array of the stage.
            row: the row to write.

        Returns:
            Gradients of the smooth shared, of the smooth layered and of the first carry's floating
            values; and the buffers.
        """
        once, stored = kept
        known, common = once[: self.cut.num_once], once[self.cut.num_once :]
        smooth = [[shared[n] for n in self.smooth[0]], [layered[n] for n in self.smooth[1]]]
        # A value that every layer reads has as many gradients: they are added in float32.
        wide = lambda x: jnp.promote_types(x.dtype, jnp.float32)
        sums = [jnp.zeros(x.shape, wide(x)) for x in smooth[0]]
        like = [grads, *smooth, self.cut.own]

        def layer(state: tuple[list, list, list], xs: Any) -> tuple[tuple, list]:
            (grads, sums, buffers), (n, params, layered, stored) = state, xs
            out = self.cut.inputs(*params, *shared, *layered, *known, *stored, *grads)
            d_carry, d_shared, d_layered, own = split_sizes(out, like)
            added = [a + d.astype(a.dtype) for a, d in zip(sums, d_shared, strict=True)]
            return (d_carry, added, write(buffers, own, (row, n))), d_layered

        (d_carry, sums, layers), d_layered = jax.lax.scan(
            layer,
            (grads, sums, residuals.layers),
            (jnp.arange(self.num_layers, dtype=row.dtype), params, layered, stored),
            reverse=True,
        )
        d_shared = [a.astype(x.dtype) for a, x in zip(sums, smooth[0], strict=True)]
        filled = Residual(write(residuals.once, common, (row,)), layers)
        return (d_shared, d_layered, d_carry), filled

    def weights(self, params: list, residual: Residual) -> list:
        """Gradients of the params, layer by layer."""

        def layer(_: None, xs: tuple[list, list]) -> tuple[None, list]:
            return None, self.cut.weights(*xs[0], *residual.once, *xs[1])

        return jax.lax.scan(layer, None, (params, residual.layers))[1]

    @property
    def residual(self) -> Residual:
        """Abstract values of the residual of one stage."""
        stacked = lambda x: jax.ShapeDtypeStruct((self.num_layers, *x.shape), x.dtype)
        return Residual(list(self.cut.common), [stacked(x) for x in self.cut.own])


def write(buffers: list, values: list, at: tuple[Any, ...]) -> list:
    """`buffer[at] = value` for each."""
    one = lambda b, x: jax.lax.dynamic_update_slice(
        b, x.reshape((1,) * len(at) + x.shape), (*at, *[0] * x.ndim)
    )
    return [one(b, x) for b, x in zip(buffers, values, strict=True)]


def split_backward(
    layer: LayerFn,
    params: list,
    shared: list,
    layered: list,
    carry: list,
    smooth: tuple[list[int], list[int]],
) -> SplitBackward:
    """Cut the backward of a stage of equal layers.

    Args:
        layer: (params, shared, layered, carry) -> carry, of one layer.
        params: abstract parameters `[layers, ...]`: differentiated in W.
        shared: abstract inputs that are the same for all layers.
        layered: abstract inputs `[layers, ...]`.
        carry: abstract carry; its floating values are differentiated in B.
        smooth: positions of the shared and of the layered inputs to differentiate, in B.
    """

    def gradient(
        params: list, shared: list, layered: list, carry: list, grads: list
    ) -> tuple[list, list, list]:
        soft = [shared[n] for n in smooth[0]], [layered[n] for n in smooth[1]]

        def run(params: list, floats: list, soft: tuple[list, list]) -> tuple[list, list]:
            given = replaced(shared, smooth[0], soft[0]), replaced(layered, smooth[1], soft[1])
            return floats_first(layer(params, *given, merge(carry, floats)))

        floats = floats_first(carry)[0]
        y, pull, others = jax.vjp(run, params, floats, soft, has_aux=True)
        d_params, d_floats, (d_shared, d_layered) = pull(grads)
        return merge_like(carry, y, others), [*d_floats, *d_shared, *d_layered], d_params

    one = lambda xs: [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in xs]
    grads = [x for x in carry if is_float(x)]
    num_layers = layered[0].shape[0]
    args = one(params), shared, one(layered), carry, grads
    return SplitBackward(cut_layer(gradient, args, num_layers), smooth, num_layers)
