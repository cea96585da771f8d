"""States and plans that the checkpoint tests share."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    step: Any
    params: Any
    opt_state: Any
    rng: Any
    extras: Any


class Pair(NamedTuple):
    first: Any
    second: Any


class Plan:
    """The least a `Checkpointer` needs of a plan: shardings and a description."""

    def __init__(self, abstract_state, model="toy"):
        self.abstract_state = abstract_state
        self.model = model

    def describe(self):
        return {"model": self.model}


def make_mesh(data, tensor):
    devices = np.array(jax.devices()[: data * tensor]).reshape(data, tensor)
    return Mesh(devices, ("data", "tensor"))


def host_state(step=3, seed=0, width=16):
    """Every kind of leaf a training state may hold, on the host."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    params = {
        "layers.0": {"kernel": normal(8, width), "bias": normal(width)},
        "half": jnp.asarray(normal(8, 4), jnp.bfloat16),
        "odd/name": normal(3, 5),
    }
    return State(
        step=np.int32(step),
        params=params,
        opt_state=optax.adam(1e-3).init(params),
        rng=jax.random.key(seed),
        extras={
            "keys": jax.random.split(jax.random.key(seed + 1, impl="rbg"), 8),
            "empty": np.zeros((0, 4), np.float32),
            "nothing": None,
            "pair": Pair(np.float32(2.5), np.array([True, False])),
            "list": [np.array([2**31, 5], np.uint32), ()],
            "special": np.array([np.nan, -0.0, np.inf, 1e-42], np.float32),
        },
    )


def spec_for(leaf):
    """Shard the leading dim over `data` and the next over `tensor`, where they divide by 8."""
    axes = ["data", "tensor"]
    return PartitionSpec(*(a if d % 8 == 0 and d else None for a, d in zip(axes, leaf.shape)))  # noqa: B905


def sharding_tree(state, mesh):
    return jax.tree.map(lambda leaf: NamedSharding(mesh, spec_for(jnp.asarray(leaf))), state)


def put(state, mesh):
    """`state` on `mesh`, and the plan for it."""
    placed = jax.device_put(state, sharding_tree(state, mesh))
    return placed, Plan(abstract(placed))


def abstract(state):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )


def bits(leaf):
    """The very bits of a leaf, so that NaN and -0.0 compare too."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = np.asarray(leaf)
    return (str(array.dtype), array.shape, array.tobytes())


def assert_same_bits(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        assert bits(a) == bits(b), jax.tree_util.keystr(path)


def host_state_of(step):
    """A state that is a function of its step, so that any mix-up shows."""
    rng = np.random.default_rng(step)
    params = {
        "w": rng.normal(size=(8, 1024)).astype(np.float32),
        "b": rng.normal(size=64).astype(np.float32),
    }
    return State(np.int32(step), params, (), jax.random.key(step), None)


def state_of(step):
    """`host_state_of(step)` on eight devices, and its plan."""
    return put(host_state_of(step), make_mesh(4, 2))


def plan():
    """The plan of `state_of`."""
    return state_of(0)[1]
