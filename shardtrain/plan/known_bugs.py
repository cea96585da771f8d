"""Compiler bugs with convolutions: found in the traced loss, avoided or refused by name.

Design: two give wrong numbers, in how XLA's partitioner splits the kernel gradient of a
convolution, which JAX writes as a convolution that contracts the batch (seen with jaxlib 0.10.2 and
0.11 on CPU, Shardy on or off; reproduced in plain JAX by the tests):

- grouped convolution, batch split over some mesh axes while another of size m does not split it:
  the gradient comes back multiplied by m (one all-reduce over all devices).
- any convolution mapped over replicas (one gradient per replica, reduced later): the batched
  kernel gradient is gathered, and wrong for some shapes.

In both cases the kernel gradient is written as contractions instead, which are partitioned rightly.
The third costs time: the batch of a grouped convolution (unless depthwise) is gathered, and every
device computes all of it. There the convolution itself is written as contractions.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend.core as jex

from shardtrain.errors import CompilerBugError
from shardtrain.partitioning.infer.source import source_line
from shardtrain.plan.convolutions import (
    is_convolution,
    is_grouped,
    rewrite_convolutions,
    why_not_mapped,
    with_mapped_gradients,
    with_mapped_kernels,
)
from shardtrain.plan.layout import Layout
from shardtrain.replay import bodies
from shardtrain.strategy import Strategy
from shardtrain.train import LossFn


@dataclass(frozen=True)
class Convolution:
    """A convolution of the loss.

    Args:
      eqn: Its equation.
      line: Source line.
      inside: The operation that hides it from rewriting, or "".
    """

    eqn: jex.JaxprEqn
    line: str
    inside: str


@dataclass(frozen=True)
class KnownBugs:
    """Which compiler bugs a loss would meet.

    Args:
      idle_axes: Mesh axes of size > 1 that do not split the batch.
      convolutions: All convolutions of the loss.
    """

    idle_axes: tuple[str, ...] = ()
    convolutions: tuple[Convolution, ...] = ()

    @property
    def grouped(self) -> tuple[Convolution, ...]:
        """The grouped convolutions."""
        return tuple(c for c in self.convolutions if is_grouped(c.eqn))

    def why_not_mapped(self, kernels: bool = False) -> str:
        """Why the loss cannot be mapped over replicas, with the line, or "".

        Args:
          kernels: Each replica may have its own kernels; else only gradients are mapped.
        """
        for c in self.convolutions:
            hidden = f"a convolution inside {c.inside} is not mapped over replicas"
            if reason := hidden if c.inside else why_not_mapped(c.eqn, kernels):
                return f"{reason} ({c.line})"
        return ""

    def avoid(self, loss: LossFn) -> LossFn:
        """The same loss, its grouped convolutions partitioned rightly."""
        return rewrite_convolutions(loss) if self.grouped else loss

    def avoid_mapped(self, loss: LossFn, kernels: bool = False) -> LossFn:
        """The same loss, to be mapped over replicas.

        Args:
          loss: `(params, variables, batch, key) -> (sums, new variables)`.
          kernels: Each replica may have its own kernels; else only gradients are mapped.
        """
        rule = with_mapped_kernels if kernels else with_mapped_gradients
        return rewrite_convolutions(loss, rule) if self.convolutions else loss


def check_known_bugs(loss: LossFn, layout: Layout, strategy: Strategy) -> KnownBugs:
    """Look for operations that the compiler is known to split wrongly on this mesh.

    Args:
      loss: `(params, variables, batch, key) -> (sums, new variables)`.
      layout: Shapes of its arguments, and the mesh.
      strategy: Axis sizes.

    Raises:
      CompilerBugError: An operation that is neither right on this mesh nor can be rewritten.
    """
    state, sizes = layout.state, layout.sizes
    idle = tuple(a for a, n in sizes.items() if n > 1 and a not in layout.batch_axes)
    plain = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    arguments = plain((state.params, state.variables, layout.batch, state.rng))
    found = tuple(_convolutions(jax.make_jaxpr(loss)(*arguments).jaxpr))
    if idle and layout.batch_axes:
        for convolution in found:
            _refuse(convolution, idle[0], sizes[idle[0]])
    return KnownBugs(idle, found)


def _convolutions(jaxpr: Any, outer: str = "<unknown>", inside: str = "") -> Iterator[Convolution]:
    for eqn in jaxpr.eqns:
        line = source_line(eqn, outer)
        name = eqn.primitive.name
        if is_convolution(eqn):
            yield Convolution(eqn, line, inside)
        # `while` has no reverse-mode derivative, so nothing inside it is transposed.
        opened = bool(bodies(eqn)) or is_convolution(eqn) or name == "while"
        for sub in jex.jaxprs_in_params(eqn.params):
            yield from _convolutions(sub, line, inside or ("" if opened else name))


def _refuse(found: Convolution, axis: str, size: int) -> None:
    if found.eqn.params["batch_group_count"] > 1:
        what = "a convolution with batch_group_count > 1 (a gradient taken inside the loss)"
    elif is_grouped(found.eqn) and found.inside:
        what = f"a grouped convolution inside {found.inside}"
    else:
        return
    raise CompilerBugError(
        f"{found.line}: {what}. XLA multiplies the kernel gradient of such a convolution by {size} "
        f"when mesh axis {axis!r} (size {size}) does not split the batch, and here it cannot be "
        f"rewritten. Use {axis}=1 and give its devices to data or fsdp"
    )
