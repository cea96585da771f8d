"""The same Flax decoder in Kauldron's trainer; see `peers.py`."""

import jax
import optax
from etils import enp
from flax import linen as nn
from flax.nnx import bridge
from kauldron import kd, kontext

from shardtrain.models import Decoder, DecoderConfig


class Model(nn.Module):
    config: DecoderConfig
    tokens: kontext.Key = "batch.tokens"

    @nn.compact
    def __call__(self, tokens):
        return {"logits": bridge.to_linen(Decoder, self.config)(tokens)}


def start(config, batch, num_devices, layout):
    params = kd.sharding.REPLICATED
    if layout == "fsdp":
        params = kd.sharding.FSDPSharding(min_size_to_shard_mb=0)
    trainer = kd.train.Trainer(
        train_ds=None,  # `peers.py` brings the batch
        model=Model(config),
        optimizer=optax.adamw(1e-3),
        sharding=kd.sharding.ShardingStrategy(params=params),
        train_losses={
            "nats": kd.losses.SoftmaxCrossEntropyWithIntLabels(
                logits="preds.logits", labels="batch.targets"
            )
        },
        num_train_steps=1000,
    )
    batch["targets"] = batch["targets"][..., None]
    spec = jax.tree.map(lambda x: enp.ArraySpec(shape=x.shape, dtype=x.dtype), batch)

    def step(state, batch):
        batch = kd.sharding.device_put(batch, trainer.sharding.batch)
        state, aux = trainer.trainstep.step(state, batch, return_losses=True)
        return state, aux.loss_states["nats"].compute()

    return trainer.trainstep.init(elem_spec=spec), step
