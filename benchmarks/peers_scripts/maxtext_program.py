"""MaxText's own step, set up as its `train` command does (seen on its sources of August 2026)."""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("DECOUPLE_GCLOUD", "TRUE")

import jax
import maxtext
import numpy as np
from flax import linen, nnx
from maxtext.trainers.pre_train import train
from maxtext.utils import sharding, train_utils

OFF = ("enable_goodput_recording", "enable_checkpoint_cloud_logger", "monitor_goodput")


def program(batch, **settings):
    """The first state, `step(state, batch) -> (state, loss)`, and the parameters."""
    settings |= dict.fromkeys(OFF, False) | {"skip_jax_distributed_system": True, "steps": 1000}
    settings["base_output_directory"] = tempfile.mkdtemp()
    base = Path(maxtext.__file__).parent / "configs/base.yml"
    argv = ["", str(base), *(f"{name}={value}" for name, value in settings.items())]
    config, recorder = train.initialize(argv)
    made = train_utils.setup_train_loop(config, recorder)
    _, _, shardings, _, mesh, *_, state = made
    _, weights, _ = nnx.split(state.model, nnx.Param, ...)
    graph, state = nnx.split(state)
    of_params, shardings = sharding.maybe_update_params_sharding_with_opt(config, shardings)
    compiled, _ = train_utils.jit_train_and_eval_step(
        config, graph, mesh, state, shardings, train.train_step, train.eval_step, None, of_params
    )

    def step(state, batch):
        with jax.set_mesh(mesh), linen.partitioning.axis_rules(config.logical_axis_rules):
            placed = jax.device_put(extended(batch), sharding.get_input_data_sharding(config, mesh))
            state, metrics = compiled(state, placed)
        return state, metrics["scalar"]["learning/loss"]

    return state, step, weights


def extended(batch):
    """With the positions and the segment, one per row, that MaxText reads beside tokens."""
    rows, length = batch["tokens"].shape
    found = {}
    for ours, theirs in (("tokens", "inputs"), ("targets", "targets")):
        found[theirs] = batch[ours]
        found[f"{theirs}_position"] = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
        found[f"{theirs}_segmentation"] = np.ones((rows, length), np.int32)
    return found
