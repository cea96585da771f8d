"""Collectives of programs compiled here, whose communication is known beforehand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from shardtrain.errors import CollectiveMismatch
from shardtrain.planner.assertions import assert_collectives
from shardtrain.planner.collectives import Collective, collectives_of, parse_collectives
from shardtrain.planner.traffic import (
    collectives_table,
    total_bytes,
    total_wire_bytes,
    wire_bytes,
)

NAMES = ("data", "fsdp", "tensor")
PAIRS = [
    ("data",),
    ("fsdp",),
    ("tensor",),
    ("data", "fsdp"),
    ("data", "tensor"),
    ("fsdp", "tensor"),
]
ORDERS = {"in order": list(range(8)), "permuted": [3, 1, 0, 2, 7, 6, 5, 4]}


def make_mesh(shape=(2, 2, 2), names=NAMES, order=None):
    devices = np.array(jax.devices())[order or list(range(8))]
    return Mesh(devices.reshape(shape), names, axis_types=(AxisType.Auto,) * len(names))


def abstract(mesh, shape, *spec, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


def compiled_shard_map(mesh, fn):
    mapped = jax.shard_map(fn, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    return jax.jit(mapped).lower(jax.ShapeDtypeStruct((16, 8), jnp.float32)).compile()


def every_collective(axes):
    """One of each over `axes` on a (16, 8) float32 block: 512 bytes."""
    width = 2 ** len(axes)

    def fn(x):
        x = jax.lax.psum(x, axes)
        x = jax.lax.all_gather(x * 2, axes, tiled=True)
        x = jax.lax.psum_scatter(jnp.sin(x), axes, tiled=True)
        return jax.lax.all_to_all(jnp.cos(x), axes, 0, 0, tiled=True)

    return fn, {
        ("all-reduce", axes): (1, 512),
        ("all-gather", axes): (1, 512 * width),
        ("reduce-scatter", axes): (1, 512 * width),
        ("all-to-all", axes): (1, 512),
    }


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("axes", PAIRS, ids="-".join)
def test_every_collective_over_every_axis_and_pair(axes, order):
    mesh = make_mesh(order=ORDERS[order])
    fn, expected = every_collective(axes)
    assert_collectives(collectives_of(compiled_shard_map(mesh, fn), mesh), expected)


@pytest.mark.parametrize("axis", NAMES)
def test_permute_over_one_axis(axis):
    mesh = make_mesh(order=ORDERS["permuted"])
    compiled = compiled_shard_map(mesh, lambda x: jax.lax.ppermute(x, axis, [(0, 1), (1, 0)]))
    (found,) = collectives_of(compiled, mesh)
    assert (found.kind, found.axes, found.bytes, found.count) == (
        "collective-permute",
        (axis,),
        512,
        1,
    )
    assert found.source.endswith(
        f"test_hlo_live.py:{test_permute_over_one_axis.__code__.co_firstlineno + 3}"
    )


def test_the_mesh_may_list_the_devices_in_another_order_than_the_program():
    compiled_for = make_mesh(order=ORDERS["permuted"])
    compiled = compiled_shard_map(compiled_for, lambda x: jax.lax.psum(x, "tensor"))
    # Swap the names of two axes by transposing the device array: the same devices, renamed.
    renamed = Mesh(compiled_for.devices.transpose(2, 1, 0), ("x", "y", "z"))
    assert_collectives(collectives_of(compiled, renamed), {("all-reduce", "x"): (1, 512)})


def test_part_of_an_axis_is_reported_as_unknown_with_the_axis_it_lies_within():
    mesh = make_mesh((4, 2), ("data", "tensor"))
    groups = [[0, 1], [2, 3]]
    compiled = compiled_shard_map(mesh, lambda x: jax.lax.psum(x, "data", axis_index_groups=groups))
    (found,) = collectives_of(compiled, mesh)
    assert (found.axes, found.within, found.group_size) == (("?",), ("data",), 2)


def test_data_parallel_gradients_are_reduced_once():
    mesh = make_mesh((8,), ("data",))
    params = {"a": abstract(mesh, (32, 64)), "b": abstract(mesh, (64, 4))}

    def loss(params, x):
        return jnp.mean((jnp.tanh(x @ params["a"]) @ params["b"]) ** 2)

    compiled = jax.jit(jax.grad(loss)).lower(params, abstract(mesh, (16, 32), "data")).compile()
    found = collectives_of(compiled, mesh)
    size = 4 * (32 * 64 + 64 * 4)
    assert total_bytes(found, axis="data", kind="all-reduce") == size == total_bytes(found)
    # Ring: 2 (n-1)/n of the gradients.
    assert total_wire_bytes(found) == 2 * size * 7 / 8


@pytest.mark.parametrize("layers", [1, 3, 6])
def test_fsdp_scan_gathers_twice_and_reduces_once_per_layer(layers):
    mesh = make_mesh((8,), ("fsdp",))
    weights = abstract(mesh, (layers, 32, 32), None, "fsdp")

    def loss(weights, x):
        def body(x, w):
            return jnp.tanh(x @ w), None

        return jnp.mean(jax.lax.scan(jax.checkpoint(body), x, weights)[0] ** 2)

    step = jax.jit(jax.grad(loss), out_shardings=weights.sharding)
    found = collectives_of(step.lower(weights, abstract(mesh, (16, 32), "fsdp")).compile(), mesh)
    size = 4 * layers * 32 * 32
    gathers = [c for c in found if c.kind == "all-gather"]
    if layers > 1:
        assert total_bytes(gathers) == 2 * size
        assert {c.parameter for c in gathers} == {"weights"}
        assert all(c.in_loop and c.is_exact for c in gathers)
    # CPU programs have no reduce-scatter from the partitioner: all-reduce, then slice.
    reduced = total_bytes(found, kind="all-reduce") + total_bytes(found, kind="reduce-scatter")
    assert reduced == size


def test_megatron_mlp_reduces_one_activation_forward_and_one_backward():
    mesh = make_mesh((2, 4), ("data", "tensor"))
    up, down = abstract(mesh, (32, 128), None, "tensor"), abstract(mesh, (128, 32), "tensor")
    x = abstract(mesh, (16, 32), "data")

    def forward(up, down, x):
        return jax.nn.gelu(x @ up) @ down

    activation = 4 * 8 * 32  # batch 16 over data=2, width 32
    found = collectives_of(jax.jit(forward).lower(up, down, x).compile(), mesh)
    assert_collectives(found, {("all-reduce", "tensor"): (1, activation)})

    gradient = jax.jit(jax.grad(lambda *a: jnp.sum(forward(*a) ** 2), argnums=(0, 1, 2)))
    found = collectives_of(gradient.lower(up, down, x).compile(), mesh)
    assert total_bytes(found, axis="tensor") == 2 * activation
    assert (
        total_bytes(found, axis="data") == 2 * 4 * 32 * 128 / 4
    )  # both kernels' gradients, sharded


def test_loops_multiply_and_nested_loops_multiply_again():
    mesh = make_mesh()

    def inner(_, x):
        return jax.lax.psum(x, "tensor") * 0.5

    def outer(_, x):
        return jax.lax.psum(jax.lax.fori_loop(0, 5, inner, x), "data") * 0.5

    compiled = compiled_shard_map(mesh, lambda x: jax.lax.fori_loop(0, 3, outer, x))
    expected = {("all-reduce", "tensor"): (15, 15 * 512), ("all-reduce", "data"): (3, 3 * 512)}
    assert_collectives(collectives_of(compiled, mesh), expected)


def test_data_dependent_loops_and_branches_are_marked_inexact():
    mesh = make_mesh()

    def fn(x):
        x = jax.lax.while_loop(lambda x: x[0, 0] < 7, lambda x: jax.lax.psum(x, "data"), x)
        return jax.lax.cond(x[0, 0] > 0, lambda x: jax.lax.psum(x, "fsdp"), jnp.sin, x)

    found = collectives_of(compiled_shard_map(mesh, fn), mesh)
    assert {c.axes: (c.count, c.is_exact) for c in found} == {
        ("data",): (1, False),
        ("fsdp",): (1, False),
    }


def test_axes_of_size_one_communicate_nothing():
    mesh = make_mesh((8, 1), ("data", "tensor"))
    assert collectives_of(compiled_shard_map(mesh, lambda x: jax.lax.psum(x, "tensor")), mesh) == []
    both = compiled_shard_map(mesh, lambda x: jax.lax.psum(x, ("data", "tensor")))
    assert_collectives(collectives_of(both, mesh), {("all-reduce", "data"): 1})


def test_identical_rows_merge_and_different_axes_do_not():
    mesh = make_mesh()

    def fn(x):
        for axis in ("data", "data", "tensor"):
            x = jnp.sin(jax.lax.psum(x, axis))
        return x

    found = collectives_of(compiled_shard_map(mesh, fn), mesh)
    assert {(c.axes, c.count) for c in found} >= {(("tensor",), 1)}
    assert sum(c.count for c in found if c.axes == ("data",)) == 2
    # The argument's own reduction names its parameter, so it is a row of its own.
    assert {c.parameter for c in found if c.axes == ("data",)} == {"x", ""}


def test_wire_bytes_of_every_kind():
    base = Collective("all-reduce", 800, ("data",), group_size=8)
    wires = {
        kind: wire_bytes(dataclasses.replace(base, kind=kind))
        for kind in (
            "all-reduce",
            "all-gather",
            "reduce-scatter",
            "all-to-all",
            "collective-permute",
        )
    }
    assert wires == {
        "all-reduce": 1400.0,
        "all-gather": 700.0,
        "reduce-scatter": 700.0,
        "all-to-all": 700.0,
        "collective-permute": 800.0,
    }
    with pytest.raises(ValueError, match="group_size is not known"):
        wire_bytes(dataclasses.replace(base, group_size=0))


def test_table_lists_every_row_and_the_total():
    table = collectives_table([Collective("all-reduce", 500, ("data",), 3, source="train.py:7")])
    assert table.row_count == 1
    assert [column.footer for column in table.columns][:5] == ["total", "", "", "3", "1.5 kB"]


class Plan:
    def collectives(self):
        return [Collective("all-reduce", 4, ("data",)), Collective("all-gather", 64, ("fsdp",), 2)]


def test_assert_collectives_passes_on_what_is_there():
    assert_collectives(Plan(), {"all-reduce": 1, ("all-gather", "fsdp"): (2, 128)})
    assert_collectives(Plan(), {("all-gather", ("fsdp",)): (None, 128)}, ignore_below=5)
    assert_collectives(Plan(), {"all-reduce": 1}, strict=False)
    assert_collectives(Plan(), {"all-reduce": 1, "all-gather": 2, "all-to-all": 0})


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"all-reduce": 1}, "all-gather fsdp.*none.*2 per step, 128 bytes"),
        ({"all-reduce": 2, "all-gather": 2}, "all-reduce .any axes.*2 per step.*1 per step"),
        ({"all-reduce": 1, ("all-gather", "fsdp"): (2, 64)}, "64 bytes.*128 bytes.*differs"),
        ({"all-reduce": 1, ("all-gather", "data"): 2}, "all-gather data.*2 per step.*0 per step"),
    ],
)
def test_assert_collectives_shows_what_differs(expected, message):
    with pytest.raises(CollectiveMismatch, match=message):
        assert_collectives(Plan(), expected)


def test_a_mesh_of_other_devices_is_refused():
    hlo = "HloModule m\nENTRY %e (x: f32[4]) -> f32[4] {\n  ROOT %x = f32[4]{0} parameter(0)\n}"
    with pytest.raises(ValueError, match="pass the mesh it was compiled for"):
        parse_collectives(hlo, ("a",), np.arange(2), assignment=[0, 1, 2])
    with pytest.raises(ValueError, match="axis names"):
        parse_collectives(hlo, ("a", "b"), np.arange(2))
    with pytest.raises(ValueError, match="not optimised HLO"):
        parse_collectives("module @jit_f {}", ("a",), np.arange(2))


def sgd_with_momentum(loss):
    def step(params, momentum, x):
        grads = jax.grad(loss)(params, x)
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, grads)
        return jax.tree.map(lambda p, m: p - 0.1 * m, params, momentum), momentum

    return step


@pytest.mark.parametrize("scan", [False, True])
def test_reduced_gradients_are_named_after_the_parameter_they_update(scan):
    mesh = make_mesh((8,), ("fsdp",))
    layers = (3,) if scan else ()
    spec = (None, "fsdp") if scan else ("fsdp",)
    params = {name: abstract(mesh, (*layers, 32, 32), *spec) for name in ("first", "second")}

    def loss(params, x):
        def layer(x, w):
            return jnp.tanh(jnp.tanh(x @ w["first"]) @ w["second"]), None

        x = jax.lax.scan(layer, x, params)[0] if scan else layer(x, params)[0]
        return jnp.mean(x**2)

    shardings = jax.tree.map(lambda p: p.sharding, params)
    jitted = jax.jit(
        sgd_with_momentum(loss), donate_argnums=(0, 1), out_shardings=(shardings, shardings)
    )
    # A batch larger than the weights, so that XLA has no reason to move activations instead.
    lowered = jitted.lower(params, params, abstract(mesh, (1024, 32), "fsdp"))
    found = collectives_of(lowered.compile(), mesh)
    reduced = {c.parameter for c in found if c.kind != "all-gather" and c.bytes > 8}
    assert {name for names in reduced for name in names.split(" + ")} == {
        "params['first']",
        "params['second']",
    }
    assert {c.parameter for c in found if c.kind == "all-gather"} >= {"params['second']"}


def test_activations_reduced_on_the_way_are_not_named_after_a_parameter():
    mesh = make_mesh((2, 4), ("data", "tensor"))
    params = {"up": abstract(mesh, (32, 128), None, "tensor")}
    params["down"] = abstract(mesh, (128, 32), "tensor")
    loss = lambda params, x: jnp.mean((jnp.tanh(x @ params["up"]) @ params["down"]) ** 2)
    jitted = jax.jit(sgd_with_momentum(loss), donate_argnums=(0, 1))
    found = collectives_of(
        jitted.lower(params, params, abstract(mesh, (16, 32), "data")).compile(), mesh
    )
    assert {c.parameter for c in found if c.axes == ("tensor",)} == {""}
    named = {name for c in found if c.axes == ("data",) for name in c.parameter.split(" + ")}
    assert named == {"params['up']", "params['down']"}


@pytest.mark.parametrize(("remat", "per_layer"), [(False, 4), (True, 5)])
def test_transformer_layers_reduce_four_times_and_five_with_full_remat(remat, per_layer):
    mesh, layers, width, heads = make_mesh((8,), ("tensor",)), 3, 64, 8
    weights = {n: abstract(mesh, (layers, width, heads, 8), None, None, "tensor") for n in "qkv"}
    weights["o"] = abstract(mesh, (layers, heads, 8, width), None, "tensor")
    weights["up"] = abstract(mesh, (layers, width, 256), None, None, "tensor")
    weights["down"] = abstract(mesh, (layers, 256, width), None, "tensor")

    def normed(x):
        return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)

    def layer(x, w):
        q, k, v = (jnp.einsum("bsd,dhk->bshk", normed(x), w[name]) for name in "qkv")
        scores = jax.nn.softmax(jnp.einsum("bqhk,bshk->bhqs", q, k))
        x = x + jnp.einsum("bhqs,bshk,hkd->bqd", scores, v, w["o"])
        return x + jax.nn.gelu(normed(x) @ w["up"]) @ w["down"], None

    def loss(weights, x):
        body = jax.checkpoint(layer) if remat else layer
        return jnp.mean(jax.lax.scan(body, x, weights)[0] ** 2)

    found = collectives_of(
        jax.jit(jax.grad(loss)).lower(weights, abstract(mesh, (4, 32, width))).compile(), mesh
    )
    assert_collectives(found, {("all-reduce", "tensor"): per_layer * layers})
    # The CPU compiler reduces the gradients of q, k and v unsummed: two activations more per layer.
    activation = 4 * 4 * 32 * width
    assert total_bytes(found) == (per_layer + 2) * layers * activation
