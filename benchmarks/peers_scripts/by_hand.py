"""The same program in plain JAX: sharded from birth, gathered at use, gradients scattered back."""

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from shardtrain.models import Decoder


def start(config, batch, num_devices, layout):
    mesh = jax.make_mesh((num_devices,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("devices"))
    optimizer = optax.adamw(1e-3)
    graph = nnx.graphdef(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))

    def stored(x):
        divisible = [size if size % num_devices == 0 else 0 for size in x.shape]
        if layout == "data" or not any(divisible):
            return whole
        dim = int(np.argmax(divisible))
        return NamedSharding(mesh, P(*[None] * dim, "devices"))

    @jax.custom_vjp
    def gather(x):
        return jax.lax.with_sharding_constraint(x, whole)

    def scatter(_, gradient):
        return (jax.lax.with_sharding_constraint(gradient, stored(gradient)),)

    gather.defvjp(lambda x: (gather(x), None), scatter)

    def init():
        params = nnx.to_pure_dict(nnx.state(Decoder(config, rngs=nnx.Rngs(0)), nnx.Param))
        return params, optimizer.init(params)

    def loss_fn(params, batch):
        model = nnx.merge(graph, nnx.State(jax.tree.map(gather, params)))
        logits = model(batch["tokens"]).astype("float32")
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return nats.mean()

    def train_step(state, batch):
        params, opt_state = state
        loss, gradients = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    shardings = jax.tree.map(stored, jax.eval_shape(init))
    jitted = jax.jit(
        train_step,
        in_shardings=(shardings, rows),
        out_shardings=(shardings, whole),
        donate_argnums=0,
    )
    state = jax.jit(init, out_shardings=shardings)()

    def step(state, batch):
        return jitted(state, jax.device_put(batch, rows))

    return state, step
