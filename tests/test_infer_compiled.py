"""Inferred layouts, compiled on 8 devices: the numbers agree and little is communicated."""

from collections import Counter

import jax
import numpy as np
from infer_zoo import llama
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from test_infer_solve import MEGATRON

from shardtrain.partitioning.infer.costs import wildcard
from shardtrain.partitioning.infer.solve import solve
from shardtrain.partitioning.infer.source import path_string
from shardtrain.partitioning.infer.table import infer_axes
from shardtrain.planner.collectives import collectives_of

SIZES = {"data": 2, "tensor": 4}


def make_mesh():
    devices = np.array(jax.devices()).reshape(2, 4)
    return Mesh(devices, tuple(SIZES), axis_types=(AxisType.Auto,) * 2)


def compile_gradient(made, specs, mesh):
    """value_and_grad with parameters and gradients laid out by `specs`, the batch over data."""
    fn, params, inputs = made
    shard = lambda spec: NamedSharding(mesh, spec)
    layout = jax.tree_util.tree_map_with_path(lambda p, _: shard(specs[path_string(p)]), params)
    args = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, layout
    )
    batch = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shard(P("data"))) for x in inputs]
    step = jax.jit(jax.value_and_grad(fn), out_shardings=(shard(P()), layout))
    return step.lower(args, *batch).compile()


def tensor_traffic(compiled, mesh):
    rows = [c for c in collectives_of(compiled, mesh) if "tensor" in c.within]
    kinds = Counter()
    for c in rows:
        kinds[c.kind] += c.count * c.num_operands
    return sum(c.bytes * c.count for c in rows), kinds


def naive(table):
    """The usual guess: the largest dim that divides."""
    specs = {}
    for row in table.rows:
        fits = [(size, axis) for axis, size in enumerate(row.shape) if size % 4 == 0]
        axis = max(fits)[1] if fits else -1
        specs[row.path] = P(*[None] * axis, "tensor") if axis >= 0 else P()
    return specs


def by_hand(table, model):
    """What a person who knows the model writes: the column and row pairs of test_infer_solve."""
    return {row.path: MEGATRON[model].get(wildcard(row.path), P()) for row in table.rows}


def test_llama_sends_what_a_layout_by_hand_sends_and_less_than_a_naive_one():
    mesh, made = make_mesh(), llama(layers=1)
    table = infer_axes(made[0], made[1], *made[2])
    layouts = {"inferred": solve(table, SIZES).specs, "naive": naive(table)}
    layouts["hand"] = by_hand(table, "llama")
    traffic = {k: tensor_traffic(compile_gradient(made, v, mesh), mesh) for k, v in layouts.items()}
    assert traffic["inferred"] == traffic["hand"]
    assert traffic["inferred"][1].keys() == {"all-reduce"}
    assert traffic["inferred"][0] < 0.7 * traffic["naive"][0], traffic


def test_every_predicted_reduction_is_one_all_reduce():
    """Six sums of activations: embedding rows, attention and mlp out, and three going back.

    The compiler combines the gradients of parallel projections (q, k, v and gate, up) into one
    all-reduce each; the prediction adds them before it.
    """
    mesh, made = make_mesh(), llama(layers=1)
    solution = solve(infer_axes(made[0], made[1], *made[2]), SIZES)
    compiled = compile_gradient(made, solution.specs, mesh)
    activation = 8 * 16 * 32 * 4 // SIZES["data"]
    rows = [c for c in collectives_of(compiled, mesh) if "tensor" in c.within]
    assert sum(c.count for c in rows if c.bytes >= activation) == 6
    assert sum(c.bytes * c.count for c in rows if c.bytes < activation) < 0.1 * activation
    six = 6 * 2 * (3 / 4) * activation * SIZES["data"]  # the prediction is for the whole batch
    assert 1.0 <= solution.predicted_bytes / six < 1.02
