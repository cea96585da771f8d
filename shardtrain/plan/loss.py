"""The user's loss as a pure function of arrays: model bound, dtypes cast, parameters gathered."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from shardtrain.errors import LossContractError
from shardtrain.modules import ModelForm, standardize
from shardtrain.modules.adapt import FROZEN
from shardtrain.modules.compute_dtype import cast_floating
from shardtrain.modules.functional_form import rngs_from
from shardtrain.modules.intercept import Calls, remat_policy
from shardtrain.partitioning.rules import CONVENTIONAL, as_axes, is_glob
from shardtrain.strategy import AXES, Strategy
from shardtrain.train import LossFn


@dataclass(frozen=True)
class UserLoss:
    """How the user's loss function wants to be called.

    Args:
      fn: `fn(model, batch)` or `fn(model, batch, rngs)`, optionally with a keyword `train`.
      wants_rngs: It takes a third argument.
      wants_train: It takes a keyword `train`.
    """

    fn: Callable[..., Any]
    wants_rngs: bool
    wants_train: bool

    def __call__(self, model: Any, batch: Any, key: jax.Array, train: bool) -> Any:
        """Call the user's function with what it asks for."""
        args = (model, batch, rngs_from(key)) if self.wants_rngs else (model, batch)
        return self.fn(*args, train=train) if self.wants_train else self.fn(*args)


def user_loss(fn: Callable[..., Any]) -> UserLoss:
    """Read a loss function's signature.

    Raises:
      LossContractError: It is not callable as `(model, batch)` or `(model, batch, rngs)`.
    """
    if not callable(fn):
        raise LossContractError(f"loss_fn is a {type(fn).__name__}, not a function")
    parameters = list(inspect.signature(fn).parameters.values())
    wants_train = any(p.name == "train" for p in parameters)
    positional = [
        p
        for p in parameters
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name != "train"
    ]
    needed = [p for p in positional if p.default is p.empty]
    wants_rngs = len(needed) == 3 or any(p.name == "rngs" for p in positional[2:3])
    if len(positional) < 2 or len(needed) > 3:
        shown = ", ".join(str(p) for p in parameters)
        raise LossContractError(
            f"loss_fn({shown}) takes {len(needed)} arguments; write loss_fn(model, batch) or "
            "loss_fn(model, batch, rngs), optionally with a keyword train"
        )
    return UserLoss(fn, wants_rngs, wants_train)


def make_loss(
    form: ModelForm,
    fn: UserLoss,
    strategy: Strategy,
    mesh: Any,
    gather: Callable[[Any], Any] | None = None,
    gather_frozen: Callable[[Any], Any] | None = None,
    train: bool = True,
    num_parts: int = 1,
    local_axes: tuple[str, ...] = (),
) -> LossFn:
    """`(params, variables, batch, key) -> (sums, new variables)` under a strategy.

    Args:
      form: The model.
      fn: The user's loss.
      strategy: Precision and remat.
      mesh: Mesh (may be abstract) for constraints the model itself writes; None: one device.
      gather: Brings stored parameters into the layout the computation uses; None: as they are.
      gather_frozen: The same for the frozen parameters of an adapted model.
      train: False for evaluation.
      num_parts: Microbatches per batch, for the loss contract.
      local_axes: Mesh axes already split off by the caller; the model's own constraints on its
        batch dim must not name them again.
    """
    compute_dtype = jnp.bfloat16 if strategy.precision == "bf16" else None
    block_remat = strategy.remat if form.blocks else "none"
    calls = Calls(
        compute_dtype=compute_dtype,
        remat=block_remat if train else "none",
        # Blocks of a pipeline must all get the dtype that they give.
        narrow_embeddings=strategy.pipeline == 1,
    )
    rules = axis_rules(strategy.rules, local_axes)

    def at_use(frozen: Any) -> Any:
        if compute_dtype is not None:
            frozen = cast_floating(frozen, compute_dtype)
        return frozen if gather_frozen is None else gather_frozen(frozen)

    def loss(params: Any, variables: Any, batch: Any, key: jax.Array) -> Any:
        if compute_dtype is not None:
            params = cast_floating(params, compute_dtype)
        if gather is not None:
            params = gather(params)
        kept = variables
        if form.base is not None:
            variables = {**kept, FROZEN: at_use(kept[FROZEN])}
        run = lambda model, batch: fn(model, batch, key, train)
        with _mesh_context(mesh), nn.logical_axis_rules(rules):
            returned, new = form.apply(run, params, variables, key, train, (batch,), calls)
        if form.base is not None:
            new = {**new, FROZEN: kept[FROZEN]}
        # A scalar is a mean over this batch's rows: evaluation adds batches of several sizes.
        weight = 1.0 if train else float(_rows(batch))
        output, aux = standardize(returned, num_parts, strategy.equal_microbatches, weight)
        return output, (new if aux is None else aux)

    if strategy.remat != "none" and not form.blocks and train:
        return jax.checkpoint(loss, policy=remat_policy(strategy.remat))
    return loss


def axis_rules(
    rules: Mapping[str, Any], without: tuple[str, ...] = ()
) -> tuple[tuple[str, Any], ...]:
    """Logical axis rules for constraints that a Linen model writes itself."""
    named = {k: as_axes(v) for k, v in rules.items() if not is_glob(k)}
    merged = {**CONVENTIONAL, **{a: (a,) for a in AXES}, **named}
    left = {k: tuple(a for a in v if a not in without) for k, v in merged.items()}
    return tuple((k, v or None) for k, v in left.items())


def _rows(batch: Any) -> int:
    return next((x.shape[0] for x in jax.tree.leaves(batch) if jnp.ndim(x)), 1)


def _mesh_context(mesh: Any) -> Any:
    if mesh is None:
        return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))
    return jax.sharding.use_abstract_mesh(getattr(mesh, "abstract_mesh", mesh))
