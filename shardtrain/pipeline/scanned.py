"""A loss whose repeated blocks run as one `lax.scan` over stacked layers, in the ordinary step.

The blocks are found as for a pipeline (`extract`), so the model is unmodified. Two things follow:
the program, and the time to compile it, is the same for any number of layers; and parameters that
are sharded over `fsdp` are gathered inside the loop, one layer at a time, forward and backward, so
a device never holds the whole model (Rajbhandari et al. 2020, ZeRO stage 3).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend.core as jex

from shardtrain.errors import StageSplitError
from shardtrain.pipeline.blocks import from_marks, from_scan
from shardtrain.pipeline.classify import Extracted, classify
from shardtrain.pipeline.extract import trace_loss
from shardtrain.pipeline.markers import BlockGroup
from shardtrain.pytree import abstract
from shardtrain.replay import bodies
from shardtrain.train.gradients import LossFn

# A loop keeps in memory, layer by layer, what the backward pass needs; with layers written out the
# compiler computes elementwise results again where they are used. So does this loop. Layout
# operations are what happens to a gathered parameter before it is multiplied: keeping any of those
# would keep the whole array. Comparisons are kept: one byte per number, of dropout's random bits.
_ELEMENTWISE = """
    add add_any sub mul div rem neg sign abs max min clamp floor ceil round square sqrt rsqrt cbrt
    integer_pow one_minus_square pow exp exp2 log log1p expm1 tanh logistic sin cos tan erf erfc
    erf_inv atan2 select_n stop_gradient real imag conj nextafter reduce_precision and or xor not
    shift_left shift_right_logical shift_right_arithmetic bitcast_convert_type convert_element_type
"""
_RANDOM = "random_bits random_wrap random_unwrap random_fold_in random_split threefry2x32 iota"
_LAYOUT = """
    sharding_constraint reshape transpose squeeze expand_dims broadcast_in_dim slice split pad rev
    dynamic_slice copy copy_p concatenate name
"""
_COMPUTED_AGAIN = frozenset(f"{_ELEMENTWISE} {_RANDOM} {_LAYOUT}".split())


@dataclass(frozen=True)
class Storage:
    """How a plan stores a tree (parameters or variables) of the split model.

    Args:
        read: tree, paths outside the blocks, paths per block leaf -> their arrays; a block leaf is
            one array `[layers, ...]`.
        write: tree, `{path: new}` outside the blocks, `{paths of a block leaf: new}` -> the tree.
    """

    read: Callable[[Any, tuple[str, ...], list[tuple[str, ...]]], tuple[list[Any], list[Any]]]
    write: Callable[[Any, dict[str, Any], dict[tuple[str, ...], Any]], Any]


@dataclass(frozen=True)
class Gathers:
    """From stored parameters to those that are computed with.

    Args:
        outer: path, array -> gathered array.
        layer: paths of a block leaf, its slice of one layer -> gathered slice.
    """

    outer: Callable[[str, Any], Any]
    layer: Callable[[tuple[str, ...], Any], Any]


def scan_layers(
    loss: LossFn,
    own: tuple[Any, Any],
    group: BlockGroup | None,
    params: Storage,
    variables: Storage,
    gathers: Gathers | None = None,
    remat: dict[str, Any] | None = None,
    fallback: LossFn | None = None,
) -> LossFn:
    """The same loss, its blocks in one `lax.scan`.

    Args:
        loss: for parameters and variables in the model's own layout; calls of `group` are marked.
        own: abstract parameters and variables in that layout.
        group: the marked blocks; None: the blocks are the body of the model's own scan.
        params: where the parameters of the new loss are.
        variables: where its variables are.
        gathers: for stored parameters that are not in the layout of the computation.
        remat: arguments of `jax.checkpoint` around each layer, where `loss` does not say.
        fallback: the loss of stored arrays without a scan, where `loss` cannot be split; None: an
            error.

    Raises:
        StageSplitError: the traced loss has no such blocks, and there is no fallback.
    """

    def scanned(stored: Any, others: Any, batch: Any, key: jax.Array) -> Any:
        trace = trace_loss(loss, *own, abstract(batch))
        inputs = set(trace.params.values())
        found = (
            from_scan(trace.program, inputs, 1)
            if group is None
            else from_marks(trace.program, group, 1)
        )
        if isinstance(found, str):
            if fallback is not None:
                return fallback(stored, others, batch, key)
            raise StageSplitError(f"{found}. Use Strategy(scan_layers=False)")
        model = classify(trace, found)
        outer_params, blocks = params.read(
            stored, model.outer_params, [leaf.paths for leaf in model.params]
        )
        outer_variables, states = variables.read(
            others, model.outer_variables, [leaf.paths for leaf in model.states]
        )
        if gathers is not None:
            outer_params = [
                gathers.outer(path, x)
                for path, x in zip(model.outer_params, outer_params, strict=True)
            ]
        outer = [*outer_params, *outer_variables, *jax.tree.leaves(batch), key]
        results, states, collected = _run(model, outer, blocks, states, gathers, remat)
        out = model.post(*outer, *results, *collected)
        count = model.output_tree.num_leaves
        new = dict(zip(model.pre_state, model.pre_state_fn(*outer), strict=True))
        new |= dict(zip(model.post_state, out[count:], strict=True))
        changed = {leaf.paths: x for leaf, x in zip(model.states, states, strict=True)}
        output = jax.tree.unflatten(model.output_tree, out[:count])
        return output, variables.write(others, new, changed)

    return scanned


def _run(
    model: Extracted,
    outer: list[Any],
    blocks: list[Any],
    states: list[Any],
    gathers: Gathers | None,
    remat: dict[str, Any] | None,
) -> tuple[list[Any], list[Any], list[Any]]:
    """The blocks: last carry, new states `[layers, ...]`, collected values `[layers, ...]`."""
    sides = model.sides(*outer)
    shared, layered = sides[: model.num_shared], sides[model.num_shared :]
    num_carry, num_states = len(model.carry), len(model.states)

    def layer(
        params: list[Any], own: list[Any], shared: list[Any], carry: list[Any]
    ) -> tuple[list[Any], list[Any]]:
        params = [x.astype(d) for x, d in zip(params, model.param_dtypes, strict=True)]
        if gathers is not None:
            params = [
                gathers.layer(leaf.paths, x) for leaf, x in zip(model.params, params, strict=True)
            ]
        out = model.block(*params, *own, *shared, *carry)
        return out[:num_carry], out[num_carry:]

    asked = model.remat or remat
    if asked is None:
        first = [[x[0] for x in blocks], [x[0] for x in (*states, *layered)]]
        asked = _remat_inside(jax.make_jaxpr(layer)(*abstract((*first, shared, [*model.carry]))))
    policy = keep_products if asked is None else asked["policy"]
    run = jax.checkpoint(layer, policy=policy, prevent_cse=False)

    def step(carry: list[Any], xs: tuple[list[Any], list[Any]]) -> tuple[list[Any], list[Any]]:
        return run(*xs, shared, carry)

    carry, ys = jax.lax.scan(step, model.pre(*outer), (blocks, [*states, *layered]))
    return carry, ys[:num_states], ys[num_states:]


def keep_products(primitive: Any, *_: Any, **__: Any) -> bool:
    """A `jax.checkpoint` policy: all but what is cheap to compute again."""
    return primitive.name not in _COMPUTED_AGAIN


def _remat_inside(program: jex.ClosedJaxpr) -> dict[str, Any] | None:
    """What a layer recomputes by itself: the policy around it would otherwise undo that."""
    for eqn in program.jaxpr.eqns:
        if "prevent_cse" in eqn.params:
            return {"policy": eqn.params["policy"]}
        for body in bodies(eqn):
            found = _remat_inside(body)
            if found is not None:
                return found
    return None
