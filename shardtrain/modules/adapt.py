"""Fine-tuning: freeze parameters, or train low-rank corrections of them.

Design: frozen parameters move from `params` to `variables["frozen"]`. So they have no gradient, no
optimizer state and no all-reduce, and nothing else in the library need know. When the model is
called they are put back where its author expects them, corrected: W + alpha / rank * A B, as two
thin products (`low_rank`).

Source of the corrections: LoRA, arXiv:2106.09685.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from shardtrain.errors import ModelError
from shardtrain.modules.corrections import (
    Adapted,
    Correction,
    find_corrections,
    scanned_paths,
    trained_paths,
)
from shardtrain.modules.form import ModelForm
from shardtrain.modules.intercept import Calls
from shardtrain.modules.low_rank import LowRank, evaluate_low_rank
from shardtrain.pytree import leaves_by_path, nested

FROZEN = "frozen"
"""The collection of variables that holds what is not trained."""


def freeze(model: Any, *globs: str, dtype: Any = None) -> Adapted:
    """The same model with some parameters left as they are: no gradient, no optimizer state.

    Args:
      model: Anything `st.plan` takes.
      globs: Parameter paths, e.g. `"encoder/**"`.
      dtype: Dtype in which they are kept, e.g. `jnp.bfloat16`; None: their own.

    Example:
      >>> from shardtrain.modules import Functional
      >>> model = Functional(init=lambda key: {"body": jnp.ones((4, 4)), "head": jnp.ones(4)})
      >>> freeze(model, "body").frozen
      ('body',)
    """
    if not globs:
        raise ModelError(
            'st.freeze needs globs of parameter paths, e.g. st.freeze(m, "encoder/**")'
        )
    return Adapted(model, frozen=globs, dtype=dtype)


def lora(
    model: Any,
    rank: int = 8,
    targets: str | Sequence[str] = "**/kernel",
    *,
    alpha: float | None = None,
    train: str | Sequence[str] = (),
    dtype: Any = None,
) -> Adapted:
    """The same model, of which only low-rank corrections of some parameters are trained.

    A parameter of more than two dims is seen as a matrix by cutting its dims where the two sides
    are smallest together: `[embed, heads, head_dim]` as `embed x (heads, head_dim)`. In a stack of
    scanned layers each layer has its own correction.

    Args:
      model: Anything `st.plan` takes.
      rank: Rank of the corrections.
      targets: Globs of the parameters that get one.
      alpha: Their scale is alpha / rank; None: rank, a scale of 1.
      train: Globs of parameters that are trained whole (norms, the head).
      dtype: Dtype in which frozen parameters are kept, e.g. `jnp.bfloat16`; None: their own.

    Raises:
      ModelError: The rank is not positive. (Globs are checked by `st.plan`, which knows the paths.)

    Source: LoRA, arXiv:2106.09685.

    Example:
      >>> from shardtrain.modules import Functional
      >>> model = Functional(init=lambda key: {"up": {"kernel": jnp.ones((4, 4))}})
      >>> lora(model, rank=2).targets
      ('**/kernel',)
    """
    if rank < 1:
        raise ModelError(f"st.lora needs a rank of at least 1, not {rank}")
    return Adapted(
        model,
        frozen=("**",),
        trained=_globs(train),
        targets=_globs(targets),
        rank=rank,
        alpha=float(rank if alpha is None else alpha),
        dtype=dtype,
    )


def adapted_form(
    inner: ModelForm, adapted: Adapted, example: Callable[..., Any], batch: Any
) -> ModelForm:
    """The functional form of an adapted model.

    Args:
      inner: The form of the model itself.
      adapted: What is trained.
      example: `example(model, batch)` calls the model as the loss does.
      batch: Abstract batch.

    Raises:
      ModelError: A glob matches nothing, or a target is no matrix.
    """
    leaves = leaves_by_path(inner.abstract_params)
    trained = trained_paths(leaves, adapted)
    stacked = scanned_paths(inner, example, batch) if adapted.targets else frozenset()
    parts = _Parts(inner, adapted, trained, find_corrections(leaves, adapted, trained, stacked))

    def init(key: jax.Array) -> tuple[Any, Any]:
        assert inner.init is not None
        return parts.split(*inner.init(key), key)

    def apply(
        fn: Callable[..., Any],
        params: Any,
        variables: Any,
        key: jax.Array,
        train: bool,
        args: tuple[Any, ...],
        calls: Calls,
    ) -> tuple[Any, Any]:
        run = lambda whole, own, key, args: inner.apply(fn, whole, own, key, train, args, calls)
        whole = parts.join(params, variables[FROZEN], calls.compute_dtype)
        out, new = evaluate_low_rank(run, whole, _without_frozen(variables), key, args)
        return out, {**new, FROZEN: variables[FROZEN]}

    def adopt(key: jax.Array, given: tuple[Any, Any] | None) -> tuple[Any, Any]:
        values = inner.initial if given is None else given
        assert values is not None
        params, others = values
        if others is None:
            others = _other_variables(inner, key)
        return parts.split(params, others, key)

    abstract_init = lambda key: parts.split(*_zeros(inner), key)
    params, variables = jax.eval_shape(abstract_init, jax.eval_shape(lambda: jax.random.key(0)))
    return dataclasses.replace(
        inner,
        init=None if inner.init is None else init,
        initial=None,
        apply=apply,
        rebuild=lambda p, v: inner.rebuild(_summed(parts.join(p, v[FROZEN])), _without_frozen(v)),
        abstract_params=params,
        abstract_variables=variables,
        annotations=parts.annotations(),
        base=inner,
        adopt=adopt,
    )


def _other_variables(form: ModelForm, key: jax.Array) -> Any:
    if form.initial is not None:
        return form.initial[1]
    init = form.init
    assert init is not None
    return jax.jit(lambda key: init(key)[1])(key)


@dataclass(frozen=True)
class _Parts:
    """Which leaf of the model is where.

    Args:
      inner: The model's form.
      adapted: What was asked.
      trained: Paths trained whole.
      corrections: Path -> its correction.
    """

    inner: ModelForm
    adapted: Adapted
    trained: frozenset[str]
    corrections: Mapping[str, Correction]

    def split(self, params: Any, variables: Any, key: jax.Array) -> tuple[Any, Any]:
        """The model's values as trained parameters and variables."""
        own, frozen = {}, {}
        for index, (path, leaf) in enumerate(leaves_by_path(params).items()):
            if path in self.trained:
                own[path] = leaf
                continue
            dtype = self.adapted.dtype
            frozen[path] = leaf if dtype is None else leaf.astype(dtype)
            if path in self.corrections:
                a, b = self._first(self.corrections[path], jax.random.fold_in(key, index))
                own[f"{path}/lora_a"], own[f"{path}/lora_b"] = a, b
        return nested(own), {**variables, FROZEN: nested(frozen)}

    def join(self, params: Any, frozen: Any, dtype: Any = None) -> Any:
        """The parameters as the model's author knows them; corrected ones as `LowRank`s."""
        own, kept = leaves_by_path(params), leaves_by_path(frozen)
        treedef = jax.tree.structure(self.inner.abstract_params)
        wanted = leaves_by_path(self.inner.abstract_params)
        return treedef.unflatten([self._leaf(p, x, own, kept, dtype) for p, x in wanted.items()])

    def annotations(self) -> dict[str, tuple[Any, ...]]:
        """The author's axis names, carried over to where the leaves are now."""
        found = {}
        for path, names in self.inner.annotations.items():
            if path in self.trained:
                found[path] = names
                continue
            found[f"{FROZEN}/{path}"] = names
            if path in self.corrections:
                c = self.corrections[path]
                layers, dims = names[: len(c.batch)], names[len(c.batch) :]
                inputs, outputs = dims[: len(c.inputs)], dims[len(c.inputs) :]
                found[f"{path}/lora_a"] = (*layers, *inputs, None)
                found[f"{path}/lora_b"] = (*layers, None, *outputs)
        return found

    def _first(self, c: Correction, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A uniform, B zero: the model starts as it was."""
        rank, bound = self.adapted.rank, 1 / math.sqrt(math.prod(c.inputs))
        a = jax.random.uniform(key, (*c.batch, *c.inputs, rank), minval=-bound, maxval=bound)
        return a, jnp.zeros((*c.batch, rank, *c.outputs))

    def _leaf(
        self,
        path: str,
        wanted: Any,
        own: Mapping[str, Any],
        kept: Mapping[str, Any],
        dtype: Any,
    ) -> Any:
        if path in self.trained:
            return own[path]
        weight = kept[path].astype(dtype or wanted.dtype)
        if path not in self.corrections:
            return weight
        a, b = own[f"{path}/lora_a"], own[f"{path}/lora_b"]
        c, scale = self.corrections[path], self.adapted.alpha / self.adapted.rank
        inputs = tuple(range(len(c.inputs)))
        outputs = tuple(len(inputs) + i for i in range(len(c.outputs)))
        return LowRank(weight, a, b, inputs, outputs, scale, stacked=bool(c.batch))


def _globs(globs: str | Sequence[str]) -> tuple[str, ...]:
    return (globs,) if isinstance(globs, str) else tuple(globs)


def _summed(params: Any) -> Any:
    is_low_rank = lambda x: isinstance(x, LowRank)
    dense = lambda x: x.dense() if is_low_rank(x) else x
    return jax.tree.map(dense, params, is_leaf=is_low_rank)


def _without_frozen(variables: Any) -> Any:
    return {k: v for k, v in variables.items() if k != FROZEN}


def _zeros(form: ModelForm) -> tuple[Any, Any]:
    blank = lambda x: (
        jnp.broadcast_to(jax.random.key(0), x.shape)
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        else jnp.zeros(x.shape, x.dtype)
    )
    return jax.tree.map(blank, (form.abstract_params, form.abstract_variables))
