"""Which parameters of a model are trained whole, and which get a low-rank correction."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend.core as jex

from shardtrain.compat import scan_counts
from shardtrain.errors import ModelError, suggest
from shardtrain.modules.form import ModelForm
from shardtrain.modules.intercept import Calls
from shardtrain.pytree import leaves_by_path, matches
from shardtrain.replay import bodies


@dataclass(frozen=True)
class Adapted:
    """A model of which a part is trained; from `st.lora` or `st.freeze`.

    Args:
      model: The user's model.
      frozen: Globs of parameters that are not trained.
      trained: Globs of parameters that are trained whole, even if frozen by another glob.
      targets: Globs of parameters that get a low-rank correction.
      rank: Rank of the corrections, r.
      alpha: Their scale is alpha / r.
      dtype: Dtype in which frozen parameters are kept; None: their own.
    """

    model: Any
    frozen: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    rank: int = 0
    alpha: float = 0.0
    dtype: Any = None


@dataclass(frozen=True)
class Correction:
    """How one parameter is seen as (a stack of) matrices.

    Args:
      batch: Leading dims that count layers.
      inputs: Dims of A besides the rank.
      outputs: Dims of B besides the rank.
    """

    batch: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def trained_paths(leaves: Mapping[str, Any], adapted: Adapted) -> frozenset[str]:
    """Paths of the parameters that are trained whole.

    Args:
      leaves: Path -> parameter.
      adapted: What was asked.

    Raises:
      ModelError: A glob matches nothing.
    """
    for glob in (*adapted.frozen, *adapted.trained):
        _matched(glob, leaves)
    hit = lambda path, globs: any(matches(path, g) for g in globs)
    trained = (p for p in leaves if hit(p, adapted.trained) or not hit(p, adapted.frozen))
    return frozenset(trained)


def find_corrections(
    leaves: Mapping[str, Any], adapted: Adapted, trained: frozenset[str], stacked: frozenset[str]
) -> dict[str, Correction]:
    """Path -> its low-rank correction.

    Args:
      leaves: Path -> parameter.
      adapted: What was asked.
      trained: Paths trained whole.
      stacked: Paths of stacks of layers.

    Raises:
      ModelError: A glob matches nothing, or a target is no matrix of sufficient rank.
    """
    paths = [p for glob in adapted.targets for p in _matched(glob, leaves)]
    return {
        path: _correction(path, leaves[path].shape, adapted, path in stacked)
        for path in dict.fromkeys(paths)
        if path not in trained
    }


def _correction(path: str, shape: tuple[int, ...], adapted: Adapted, stacked: bool) -> Correction:
    layers = 1 if stacked else 0
    batch, dims = shape[:layers], shape[layers:]
    if len(dims) < 2:
        raise ModelError(
            f"{path} has shape {list(shape)}: a low-rank correction needs a matrix"
            f"{' per layer' if layers else ''}. Narrow targets={list(adapted.targets)}"
        )
    cuts = range(1, len(dims))
    cut = min(cuts, key=lambda i: math.prod(dims[:i]) + math.prod(dims[i:]))
    inputs, outputs = dims[:cut], dims[cut:]
    least = min(math.prod(inputs), math.prod(outputs))
    if adapted.rank > least:
        raise ModelError(
            f"{path} {list(shape)} is a {math.prod(inputs)} x {math.prod(outputs)} matrix: a "
            f"correction of rank {adapted.rank} is larger than the matrix. Use rank <= {least}, or "
            "leave it out of targets"
        )
    return Correction(batch, inputs, outputs)


def scanned_paths(form: ModelForm, example: Callable[..., Any], batch: Any) -> frozenset[str]:
    """Parameters that a scan takes one slice of at a time: stacks of layers."""

    def run(params: Any, variables: Any, key: jax.Array, batch: Any) -> Any:
        return form.apply(example, params, variables, key, True, (batch,), Calls())[0]

    key = jax.eval_shape(lambda: jax.random.key(0))
    given = form.abstract_params, form.abstract_variables, key, batch
    jaxpr = jax.make_jaxpr(run)(*given).jaxpr
    paths = leaves_by_path(form.abstract_params)
    return frozenset(_sliced(jaxpr, dict(zip(jaxpr.invars, paths, strict=False))))


def _sliced(jaxpr: Any, names: dict[Any, str]) -> Iterator[str]:
    for eqn in jaxpr.eqns:
        inputs = [v for v in eqn.invars if not isinstance(v, jex.Literal)]
        named = {eqn.invars.index(v): names[v] for v in inputs if v in names}
        if not named:
            continue
        if eqn.primitive.name == "convert_element_type":
            names[eqn.outvars[0]] = named[0]
            continue
        if eqn.primitive.name == "scan":
            first = sum(scan_counts(eqn.params))
            yield from (name for i, name in named.items() if i >= first)
            named = {i: name for i, name in named.items() if i < first}
        for inside in bodies(eqn)[:1]:
            invars = inside.jaxpr.invars
            yield from _sliced(inside.jaxpr, {invars[i]: name for i, name in named.items()})


def _matched(glob: str, leaves: Mapping[str, Any]) -> list[str]:
    found = [p for p in leaves if matches(p, glob)]
    if not found:
        raise ModelError(f"{glob!r} matches no parameter; {suggest(glob, leaves)}")
    return found
