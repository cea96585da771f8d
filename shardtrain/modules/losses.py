"""What a loss returns, so that every split of a batch averages to the same number."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax

from shardtrain.errors import LossContractError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mean:
    """A sum and the weight it will be divided by, once, over the whole global batch.

    A mean of means over unequal parts is wrong; sums and weights add exactly over microbatches,
    devices and masks.

    Args:
      total: Weighted sum over the examples at hand, a scalar.
      weight: Sum of their weights (number of tokens, of unmasked rows, ...), a scalar.

    Example:
      >>> float(Mean(total=jnp.float32(6.0), weight=jnp.float32(3.0)).value)
      2.0
    """

    total: Any
    weight: Any

    @property
    def value(self) -> jax.Array:
        """`total / weight`; 0 where the weight is 0."""
        weight = jnp.asarray(self.weight, jnp.float32)
        return jnp.where(weight > 0, self.total / jnp.where(weight > 0, weight, 1.0), 0.0)

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.weight + other.weight)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Aux:
    """What a `Functional` loss returns beside its loss.

    Args:
      variables: New values of the non-trainable collections (same structure as given).
      metrics: Name -> `Mean` or scalar.
    """

    variables: Any = None
    metrics: Mapping[str, Any] = field(default_factory=dict)


def cross_entropy(logits: jax.Array, targets: jax.Array, mask: jax.Array | None = None) -> Mean:
    """Softmax cross-entropy against integer targets, as a `Mean` over unmasked positions.

    Args:
      logits: `[..., classes]`, any float dtype; computed in float32.
      targets: `[...]` integers.
      mask: `[...]` weights (0 ignores a position), or `[batch]` against `[batch, ...]` targets;
        None counts every position once.

    Returns:
      `Mean(sum of nats, sum of mask)`.

    Raises:
      LossContractError: The shapes do not fit.

    Example:
      >>> loss = cross_entropy(jnp.zeros((2, 4)), jnp.array([0, 3]), jnp.array([1.0, 0.0]))
      >>> round(float(loss.value), 4), float(loss.weight)
      (1.3863, 1.0)
    """
    if logits.shape[:-1] != targets.shape:
        raise LossContractError(
            f"cross_entropy: logits {logits.shape} and targets {targets.shape}: targets must have "
            "the shape of logits without the last dim"
        )
    if mask is None:
        return Mean(jnp.sum(_nats(logits, targets)), jnp.float32(targets.size))
    if mask.shape != targets.shape[: mask.ndim]:
        raise LossContractError(
            f"cross_entropy: mask {mask.shape} does not match targets {targets.shape}"
        )
    weights = mask.astype(jnp.float32).reshape(mask.shape + (1,) * (targets.ndim - mask.ndim))
    weights = jnp.broadcast_to(weights, targets.shape)
    # Masked positions may hold anything (an infinity, a target of -100), and 0 * inf is nan.
    seen = weights != 0
    nats = _nats(jnp.where(seen[..., None], logits, 0), jnp.where(seen, targets, 0))
    return Mean(jnp.sum(nats * weights), jnp.sum(weights))


def _nats(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossOutput:
    """A user's loss in one form: sums and weights only."""

    loss: Mean
    metrics: dict[str, Mean]


def standardize(
    returned: Any, num_parts: int, equal_parts: bool, scalar_weight: float = 1.0
) -> tuple[LossOutput, Any]:
    """Bring what a loss function returned into one form.

    Args:
      returned: `Mean` or scalar, or `(either, metrics dict)`, or `(either, Aux)`.
      num_parts: Into how many microbatches the plan splits each batch.
      equal_parts: The user states that all of them weigh the same.
      scalar_weight: Weight of a bare scalar: the number of rows it is a mean over, in evaluation.

    Returns:
      The sums, and the new variables of an `Aux` (None otherwise).

    Raises:
      LossContractError: Not a scalar, or a bare scalar that would be averaged wrongly.
    """
    loss, extra = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, {})
    variables = None
    if isinstance(extra, Aux):
        extra, variables = extra.metrics, extra.variables
    if not isinstance(extra, Mapping):
        raise LossContractError(
            f"loss_fn returned {type(extra).__name__} beside the loss; return (loss, metrics) "
            "with metrics a dict of name -> st.Mean or scalar"
        )
    refuse_scalars = num_parts > 1 and not equal_parts
    mean = lambda what, value: _as_mean(what, value, num_parts, refuse_scalars, scalar_weight)
    metrics = {name: mean(f"metric {name!r}", value) for name, value in extra.items()}
    return LossOutput(mean("loss_fn", loss), metrics), variables


def _as_mean(
    what: str, value: Any, num_parts: int, refuse_scalars: bool, scalar_weight: float
) -> Mean:
    if isinstance(value, Mean):
        total, weight = value.total, value.weight
    else:
        total, weight = value, scalar_weight
        if not hasattr(total, "shape") and not isinstance(total, int | float):
            raise LossContractError(
                f"{what} returned {type(value).__name__}; return st.Mean(total, weight), a scalar, "
                "or (either, metrics)"
            )
    for name, part in (("total", total), ("weight", weight)):
        if jnp.shape(part) != ():
            raise LossContractError(
                f"{what} returned {name if isinstance(value, Mean) else 'an array'} of shape "
                f"{jnp.shape(part)}, not a scalar. Return st.Mean(total, weight), e.g. "
                "st.Mean(jnp.sum(nll * mask), jnp.sum(mask))"
            )
    if what == "loss_fn" and not jnp.issubdtype(jnp.result_type(total), jnp.floating):
        raise LossContractError(f"{what} returned dtype {jnp.result_type(total)}, not a float")
    if refuse_scalars and not isinstance(value, Mean):
        raise LossContractError(
            f"{what} returned one scalar, but this plan splits each batch into {num_parts} "
            "microbatches. A mean of means is wrong when microbatches hold different numbers of "
            "tokens. Return st.Mean(total, weight), e.g. st.Mean(jnp.sum(nll * mask), "
            "jnp.sum(mask)), or pass Strategy(equal_microbatches=True) if every microbatch has "
            "the same weight"
        )
    weight = jax.lax.stop_gradient(jnp.asarray(weight, jnp.float32))
    total = jnp.asarray(total, jnp.float32)
    if not isinstance(value, Mean) and scalar_weight != 1.0:
        total = total * scalar_weight
    return Mean(total, weight)
