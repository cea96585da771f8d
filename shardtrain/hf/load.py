"""Tensors of files into the shards of a plan."""

import gc
import logging
import os
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardtrain.errors import CheckpointError
from shardtrain.hf.families import family_mapping
from shardtrain.hf.leaves import in_layout, model_leaves, values_of
from shardtrain.hf.mapping import Rule, bind, casts, parse
from shardtrain.hf.pieces import Pieces
from shardtrain.hf.source import Source, open_source
from shardtrain.plan import Plan
from shardtrain.pytree import leaves_by_path, map_with_path
from shardtrain.train import TrainState

_LOG = logging.getLogger("shardtrain.hf")


def load_hf(
    path: str | os.PathLike[str],
    plan: Plan,
    mapping: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    cast: bool = False,
) -> TrainState:
    """The first state of a plan, with the parameters of a Hugging Face checkpoint.

    Every process reads only the slices that its devices hold, one array at a time; no host ever
    has the whole model. What the checkpoint does not have (low-rank corrections, the model's other
    variables) starts as in `plan.init`.

    Args:
      path: A directory with `model.safetensors` or an index of several files, or one file.
      plan: Of a model from `models.from_hf_config`, also adapted by `st.lora` or `st.freeze`; or
        of any model, with a mapping.
      mapping: Name of a tensor -> `"path"` of a parameter, `("path", "transpose")`,
        `(("path", "path"), ...)` for a tensor that several parameters share along its last dim, or
        None: left out. `*` stands for a part of the name, and the same part of the path; a path
        without one is a stack of layers. None: the table of the family in `config.json`.
      seed: Of what the checkpoint does not have, and of the run's random keys.
      cast: Also convert where numbers are rounded, e.g. float32 files into bfloat16 parameters.
        Conversions that keep every number (bfloat16 into float32) are done and logged.

    Raises:
      CheckpointError: The checkpoint is damaged, or does not fit the model: all missing and
        unexpected tensors and shapes in one message.

    Example:
      >>> import jax.numpy as jnp, numpy as np, optax, shardtrain as st
      >>> from safetensors.numpy import save_file
      >>> save_file({"fc.weight": np.ones((2, 8), "f")}, "model.safetensors")
      >>> model = st.Functional(init=lambda key: {"kernel": jnp.zeros((8, 2))})
      >>> loss = lambda v, batch: jnp.mean((batch["x"] @ v["kernel"]) ** 2)
      >>> plan = st.plan(model, loss, optax.sgd(0.1), {"x": jnp.ones((8, 8))}, "fsdp=-1")
      >>> state = st.load_hf("model.safetensors", plan, {"fc.weight": ("kernel", "transpose")})
      >>> float(state.params["kernel"].sum())
      16.0
    """
    return load_source(open_source(path), plan, mapping, seed, cast)


def load_source(
    source: Source, plan: Plan, mapping: Mapping[str, Any] | None, seed: int, cast: bool
) -> TrainState:
    """`load_hf` from files that are open."""
    plan._need_devices("load_hf")
    where, wanted = model_leaves(plan), wanted_values(plan)
    bound = bind(rules_for(source, plan, mapping), source.tensors, wanted)
    _say_casts(source, casts(bound, wanted), cast)
    first = in_layout(plan, {where[path]: each[0] for path, each in bound.items()})
    again = in_layout(plan, {where[path]: each[1] for path, each in bound.items() if each[1:]})
    fresh = _fresh(plan, seed, first)

    def make(path: str, like: Any) -> Any:
        if path not in first:
            return fresh[path]
        return _place(path, first[path], again.get(path), like, source)

    state = plan.abstract_state
    made = map_with_path(make, {"params": state.params, "variables": state.variables})
    return plan.first_state(made["params"], made["variables"], seed)


def rules_for(source: Source, plan: Plan, mapping: Mapping[str, Any] | None) -> tuple[Rule, ...]:
    """The rules of a mapping, or of the family of the checkpoint."""
    if mapping is None:
        mapping = family_mapping(source.model_type, source.tensors, wanted_values(plan))
    return parse(mapping)


def wanted_values(plan: Plan) -> dict[str, Any]:
    """Parameter path of the plan's model -> shape and dtype in which it is kept."""
    leaves = values_of(plan.abstract_checkpoint)
    return {path: leaves[at] for path, at in model_leaves(plan).items()}


def _say_casts(source: Source, found: Mapping[tuple[Any, Any], list[str]], cast: bool) -> None:
    for (have, want), paths in found.items():
        exact = jnp.promote_types(have, want) == want
        what = f"{len(paths)} parameters {have} -> {want}"
        if not exact and not cast:
            raise CheckpointError(
                f"{source.directory}: {what} ({', '.join(paths[:3])}, ...) would round them. "
                "load_hf(..., cast=True) does it; or keep the parameters in the dtype of the file"
            )
        if jax.process_index() == 0:
            how = "exact" if exact else "rounded"
            _LOG.warning("%s: %s (%s)", source.directory.name, what, how)


def _place(path: str, pieces: Pieces, again: Pieces | None, like: Any, source: Source) -> jax.Array:
    """An array in its shards; each slice is read once and given to all devices that hold it."""
    holders: dict[tuple[Any, ...], list[jax.Device]] = {}
    for device, index in like.sharding.addressable_devices_indices_map(like.shape).items():
        key = tuple((dim.start, dim.stop) for dim in index)
        holders.setdefault(key, []).append(device)
    arrays = []
    for key, devices in holders.items():
        index = tuple(slice(*dim) for dim in key)
        host = pieces.read(index, like.dtype)
        if again is not None and not np.array_equal(host, again.read(index, like.dtype)):
            raise CheckpointError(
                f"two tensors lead to {path} and hold different numbers: they are not tied. Use a "
                "model with a parameter for each, or map one of them to None"
            )
        # The step donates its state, so no two devices may share memory (nor with this buffer).
        arrays += [jax.device_put(host, device, may_alias=False) for device in devices]
        # Transfers are asynchronous: without waiting, the host would hold all that is under way,
        # and JAX lets go of what has arrived only when Python collects garbage (seen on 0.10.2).
        jax.block_until_ready(arrays)
        del host
        gc.collect(0)
        source.release()
    return jax.make_array_from_single_device_arrays(like.shape, like.sharding, arrays)


def _fresh(plan: Plan, seed: int, loaded: Collection[str]) -> dict[str, jax.Array]:
    """Path -> leaf of what is not loaded; nothing else is computed or allocated."""
    planned = {p: x for p, x in values_of(plan.abstract_state).items() if p not in loaded}
    init = plan.form.init
    if not planned:
        return {}
    if init is None:  # the model was given with values
        values = values_of(plan.init(seed))
        return {path: values[path] for path in planned}

    def make(key: jax.Array) -> dict[str, jax.Array]:
        params, variables = init(key)
        values = leaves_by_path({"params": params, "variables": variables})
        return {path: values[path] for path in planned}

    shardings = {path: x.sharding for path, x in planned.items()}
    return jax.jit(make, out_shardings=shardings)(jax.random.key(seed))
