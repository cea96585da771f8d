"""Numbers, constants and parameters that differ between two traces of one function."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardtrain.partitioning.infer.batch_value import (
    SAME,
    ZERO,
    Kind,
    Value,
    examples,
    mixed,
    scaled_dims,
)

# Parameters that hold shapes: where they differ between the traces, so do the shapes of outputs,
# and those are checked.
_SHAPE_PARAMS = frozenset(
    ("shape", "new_sizes", "limit_indices", "slice_sizes", "sizes", "reps", "dimensions")
)


def number(one: np.ndarray, two: np.ndarray, sizes: tuple[int, int]) -> Value:
    """What a number is that has these values in the two traces."""
    if one.dtype == two.dtype and np.array_equal(one, two, equal_nan=one.dtype.kind in "fc"):
        return ZERO if not one.any() else SAME
    b1, b2 = sizes
    if one.shape != () or two.shape != () or one.dtype.kind not in "iuf":
        return mixed("an array whose values depend on the batch size")
    what = f"{one} at batch size {b1}, {two} at {b2}"
    if float(one) * b2 == float(two) * b1:
        return Value(Kind.SUM, reason=what)  # a count of examples (or of tokens)
    return mixed(f"a number that depends on the batch size: {what}")


def constant(pair: tuple[Any, Any], sizes: tuple[int, int]) -> Value:
    """What a constant array is, given its values in the two traces."""
    one, two = pair
    if one is two:
        return SAME
    one, two = (_to_numpy(c) for c in pair)
    if one.shape == two.shape:
        return number(one, two, sizes)
    scaled = scaled_dims((one, two))
    if len(scaled) == 1:
        first = [np.take(c, [0], scaled[0]) for c in (one, two)]
        uniform = all((c == f).all() for c, f in zip((one, two), first, strict=True))
        if uniform and np.array_equal(first[0], first[1]):
            return examples(scaled[0])
    return mixed("a constant array shaped by the batch, different for each example")


def changed_params(one: dict[str, Any], two: dict[str, Any]) -> str:
    """Words for a parameter that differs between the traces other than in shapes, or ""."""
    for name, value in one.items():
        if name not in _SHAPE_PARAMS and not _equal(value, two.get(name)):
            return f"a parameter `{name}`"
    return ""


def _equal(a: Any, b: Any) -> bool:
    if a is b or (callable(a) and callable(b)):
        return True
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b):
        return True
    return bool(a == b) or (hasattr(a, "eqns") and str(a) == str(b))


def _to_numpy(array: Any) -> np.ndarray:
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    return np.asarray(array)
