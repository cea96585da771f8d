"""Every optimizer gives a pipelined model the unpipelined update, or is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from shardtrain.errors import StageSplitError
from shardtrain.pipeline import optimizer as optimizer_module
from shardtrain.pipeline.alike import treats_layers_alike
from shardtrain.pipeline.optimizer import map_layers, pipelined_optimizer
from shardtrain.pipeline.optimizer_state import (
    is_mapped,
    mapped_specs,
    stack_state,
    unstack_state,
)
from shardtrain.pipeline.stages import (
    LayerLeaf,
    from_stage_major,
    stage_layout,
    stage_major_specs,
    to_stage_major,
)
from shardtrain.pytree import path_string

LAYERS = 4


def make_params():
    rng = np.random.default_rng(1)
    array = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    layer = lambda: {"kernel": array(6, 8), "bias": array(8)}
    return {"embed": array(16, 8), "layers": {str(n): layer() for n in range(LAYERS)}}


PARAMS = make_params()
LEAVES = tuple(
    LayerLeaf.of(tuple(f"layers/{n}/{name}" for n in range(LAYERS)), stacked=False)
    for name in ("kernel", "bias")
)
LAYOUT = stage_layout(PARAMS, LEAVES, LAYERS, num_stages=2, virtual_stages=1)
MATRICES = lambda params: jax.tree.map(lambda x: x.ndim > 1, params)

STACKED = {
    "sgd": optax.sgd(0.1, momentum=0.9),
    "adamw": optax.adamw(1e-2),
    "lion": optax.lion(1e-2),
    "clip, adam": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
}
PER_LAYER = {
    "adamw, matrices decay": optax.adamw(1e-2, weight_decay=0.1, mask=MATRICES),
    "lamb": optax.lamb(1e-2),
    "lars": optax.lars(1e-2),
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=4),
    "muon": optax.contrib.muon(1e-2),
    "clip by block": optax.chain(optax.clip_by_block_rms(0.5), optax.sgd(0.1)),
    "clip, lamb": optax.chain(optax.clip_by_global_norm(1.0), optax.lamb(1e-2)),
}


@pytest.mark.parametrize("name", [*STACKED, *PER_LAYER])
def test_the_update_is_the_unpipelined_one(name):
    optimizer = {**STACKED, **PER_LAYER}[name]
    pipelined = pipelined_optimizer(optimizer, PARAMS, LAYOUT)
    assert (pipelined is optimizer) == (name in STACKED)
    grads = jax.tree.map(jnp.cos, PARAMS)
    first = lambda tx: jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0])
    expected = first(optimizer)(grads, PARAMS)
    updates = first(pipelined)(to_stage_major(grads, LAYOUT), to_stage_major(PARAMS, LAYOUT))
    found = from_stage_major(updates, LAYOUT)
    compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6)
    jax.tree.map(compare, found, expected)


def test_optimizers_that_compare_layers_are_refused():
    by_name = {"embed": "a", "layers": {str(n): "b" for n in range(LAYERS)}}
    labelled = optax.multi_transform({"a": optax.sgd(0.1), "b": optax.sgd(0.2)}, by_name)
    with pytest.raises(StageSplitError, match=r"cannot update a pipelined model.*stacked: "):
        pipelined_optimizer(labelled, PARAMS, LAYOUT)
    late_clip = optax.chain(
        optax.clip_by_block_rms(0.5), optax.clip_by_global_norm(0.5), optax.sgd(0.1)
    )
    with pytest.raises(StageSplitError, match=r"per layer: updates differ by"):
        pipelined_optimizer(late_clip, PARAMS, LAYOUT)


def test_state_of_mapped_optimizers_is_sharded_by_stage():
    state = map_layers(optax.adam(1e-2)).init(to_stage_major(PARAMS, LAYOUT))
    assert {x.shape[0] for x in jax.tree.leaves(state)} == {2}


@pytest.mark.parametrize(
    "name", ["adamw", "lamb", "adafactor", "muon", "clip, lamb", "adamw, matrices decay"]
)
def test_states_are_the_unpipelined_ones_in_checkpoints(name):
    optimizer = {**STACKED, **PER_LAYER}[name]
    pipelined = map_layers(optimizer) if name in PER_LAYER else optimizer

    def states(grads, params):
        expected = optimizer.update(grads, optimizer.init(params), params)[1]
        major = to_stage_major(params, LAYOUT)
        first = pipelined.init(major)
        found = pipelined.update(to_stage_major(grads, LAYOUT), first, major)[1]
        whole = unstack_state(found, LAYOUT)
        return expected, whole, stack_state(whole, first, LAYOUT), found

    expected, whole, again, found = jax.jit(states)(jax.tree.map(jnp.cos, PARAMS), PARAMS)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6)
    jax.tree.map(close, whole, expected)
    assert is_mapped(found) == (name in PER_LAYER)
    plain = lambda tree: jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)
    assert plain(again) == plain(found)
    jax.tree.map(close, unstack_state(again, LAYOUT), expected)


def test_mapped_states_are_sharded_like_their_parameters():
    specs = stage_major_specs(jax.tree.map(lambda x: PartitionSpec(), PARAMS), LAYOUT)
    specs.blocks["layers/*/kernel"] = PartitionSpec("pipeline", None, None, None, "tensor")
    shapes = jax.eval_shape(map_layers(optax.adam(1e-2)).init, to_stage_major(PARAMS, LAYOUT))
    found = mapped_specs(shapes, specs)
    assert found[0].count == PartitionSpec("pipeline")
    assert found[0].mu.outer["embed"] == PartitionSpec("pipeline", None, None)
    kernel = PartitionSpec("pipeline", None, "tensor")
    assert found[0].mu.blocks["layers/*/kernel"] == [kernel, kernel]


DEEP = 8


def deep_params():
    rng = np.random.default_rng(2)
    array = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    layer = lambda: {"kernel": array(6, 8), "bias": array(8)}
    return {"embed": array(16, 8), "layers": [layer() for _ in range(DEEP)]}


def deep_layout(params):
    leaves = tuple(
        LayerLeaf.of(tuple(f"layers/{n}/{name}" for n in range(DEEP)), stacked=False)
        for name in ("kernel", "bias")
    )
    return stage_layout(params, leaves, DEEP, num_stages=1, virtual_stages=1)


def without(number):
    """Decay for all but one layer."""
    decays = lambda path, _: f"layers/{number}/" not in path_string(path) + "/"
    return lambda params: jax.tree_util.tree_map_with_path(decays, params)


@pytest.mark.parametrize("name", [*STACKED, *PER_LAYER])
def test_few_layers_stand_for_many_where_all_are_treated_alike(name, monkeypatch):
    made = STACKED.get(name) or PER_LAYER[name]
    params = deep_params()
    layout = deep_layout(params)
    assert treats_layers_alike(made, params, layout)
    tried = []
    run = optimizer_module._run
    counted = lambda o, tree: tried.append(len(jax.tree.leaves(tree))) or run(o, tree)
    monkeypatch.setattr(optimizer_module, "_run", counted)
    found = pipelined_optimizer(made, params, layout)
    assert max(tried) == 1 + 2 * 2
    updates = run(found, to_stage_major(params, layout))
    wanted = run(made, params)
    for a, b in zip(
        jax.tree.leaves(from_stage_major(updates, layout)), jax.tree.leaves(wanted), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("number", [0, 5, DEEP - 1])
def test_a_layer_that_is_treated_otherwise_is_found(number):
    params = deep_params()
    layout = deep_layout(params)
    decayed = optax.adamw(1e-2, weight_decay=0.1, mask=without(number))
    assert not treats_layers_alike(decayed, params, layout)
    assert treats_layers_alike(
        optax.adamw(1e-2, weight_decay=0.1, mask=without("none")), params, layout
    )
    with pytest.raises(StageSplitError, match="updates differ"):
        pipelined_optimizer(decayed, params, layout)
