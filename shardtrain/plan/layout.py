"""Every array of a training run with its sharding: what a plan is made of."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from shardtrain.modules import ModelForm
from shardtrain.modules.adapt import FROZEN
from shardtrain.partitioning import (
    Inferred,
    LeafPlan,
    batch_specs,
    check_replication,
    optimizer_specs,
    partition_tree,
)
from shardtrain.partitioning.batch import leaf_names
from shardtrain.partitioning.rules import BATCH_AXES, check_rules, check_used
from shardtrain.plan.gather import gather_at_use
from shardtrain.plan.inference import InferredLayout
from shardtrain.pytree import leaves_by_path, map_with_path
from shardtrain.strategy import Strategy
from shardtrain.train import TrainState


@dataclass(frozen=True)
class Layout:
    """Shardings of everything, resolved against one mesh.

    Args:
      mesh: Device mesh, or an abstract one for hardware that is not here.
      sizes: Axis name -> size.
      params: Parameter path -> its plan.
      variables: Variable path -> its plan.
      state: `TrainState` of abstract arrays that carry their `NamedSharding`.
      batch: Batch of abstract arrays that carry their `NamedSharding`.
      update_specs: Params-shaped tree: shards in which each device updates what it owns.
      grad_specs: Params-shaped tree: layout of accumulated gradients.
      compute_specs: Params-shaped tree: layout the forward pass sees.
      full_specs: Params-shaped tree: `compute_specs` plus fsdp.
    """

    mesh: Any
    sizes: Mapping[str, int]
    params: Mapping[str, LeafPlan]
    variables: Mapping[str, LeafPlan]
    state: TrainState
    batch: Any
    update_specs: Any
    grad_specs: Any
    compute_specs: Any
    full_specs: Any

    @property
    def batch_axes(self) -> tuple[str, ...]:
        """Mesh axes of size > 1 that split the batch's rows."""
        return tuple(a for a in BATCH_AXES if self.sizes[a] > 1)

    @property
    def state_shardings(self) -> TrainState:
        """The shardings of `state` alone."""
        return jax.tree.map(lambda x: x.sharding, self.state)

    @property
    def batch_shardings(self) -> Any:
        """The shardings of `batch` alone."""
        return jax.tree.map(lambda x: x.sharding, self.batch)

    def gather(self) -> Callable[[Any], Any]:
        """A function that takes parameters stored over fsdp to where they are used."""
        return gather_at_use(self.mesh, self.compute_specs, self.full_specs)

    def gather_frozen(self) -> Callable[[Any], Any]:
        """The same for the frozen parameters of an adapted model."""
        specs = lambda sharded: map_with_path(
            lambda path, _: self.variables[f"{FROZEN}/{path}"].spec(sharded),
            self.state.variables[FROZEN],
        )
        return gather_at_use(self.mesh, specs(False), specs(True))

    def constrain(self, specs: Any, leading: Any = None) -> Callable[[Any], Any]:
        """A function that keeps a params-shaped tree in the given specs.

        Args:
          specs: Params-shaped tree of PartitionSpecs.
          leading: Mesh axes of an extra leading dim, or None if there is none.
        """

        def apply(tree: Any) -> Any:
            def one(x: Any, spec: PartitionSpec) -> Any:
                spec = PartitionSpec(leading, *spec) if leading else spec
                return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

            return jax.tree.map(one, tree, specs)

        return apply


def make_layout(
    form: ModelForm,
    optimizer: optax.GradientTransformation,
    batch: Any,
    strategy: Strategy,
    mesh: Any,
    inferred: InferredLayout | None = None,
) -> Layout:
    """Resolve every spec, and refuse what would go wrong silently.

    Raises:
      PartitionError: Unknown axis, unused rule, indivisible dim, double axis, replication.
      BatchError: The batch does not divide.
    """
    sizes = dict(mesh.shape)
    check_rules(strategy.rules)
    found = inferred.params if inferred is not None else {}
    params = partition_tree(form.abstract_params, strategy, sizes, form.annotations, found)
    variables = _variable_plans(form, strategy, sizes, found)
    names = {n for plan in params.values() for e in plan.logical if e for n in _parts(e)}
    names |= inferred.names if inferred is not None else set()
    paths = [*params, *variables, *leaf_names(batch)]
    check_used(strategy.rules, paths, names, flexible=form.kind == "linen")
    frozen = {path: p for path, p in variables.items() if path.startswith(f"{FROZEN}/")}
    check_replication({**params, **frozen} if form.base else params, strategy, sizes)

    specs = lambda sharded: map_with_path(
        lambda path, _: params[path].spec(sharded), form.abstract_params
    )
    abstract_opt = jax.eval_shape(optimizer.init, form.abstract_params)
    shard = lambda tree, spec_tree: jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, s)),
        tree,
        spec_tree,
    )
    whole = NamedSharding(mesh, PartitionSpec())
    scalar: Any = lambda dtype: jax.ShapeDtypeStruct((), dtype, sharding=whole)
    sequence_dims = inferred.inputs if inferred is not None else None
    state = TrainState(
        step=scalar(jnp.int32),
        params=shard(form.abstract_params, specs(strategy.zero == 3)),
        opt_state=shard(abstract_opt, optimizer_specs(abstract_opt, params, strategy.zero >= 1)),
        variables=shard(
            form.abstract_variables,
            map_with_path(lambda p, _: variables[p].full, form.abstract_variables),
        ),
        rng=scalar(jax.eval_shape(lambda: jax.random.key(0)).dtype),
        skipped=scalar(jnp.int32),
    )
    return Layout(
        mesh=mesh,
        sizes=sizes,
        params=params,
        variables=variables,
        state=state,
        batch=shard(batch, batch_specs(batch, strategy, sizes, sequence_dims)),
        update_specs=specs(strategy.zero >= 1),
        grad_specs=specs(strategy.zero >= 2),
        compute_specs=specs(False),
        full_specs=specs(True),
    )


def _variable_plans(
    form: ModelForm,
    strategy: Strategy,
    sizes: Mapping[str, int],
    inferred: Mapping[str, Inferred],
) -> dict[str, LeafPlan]:
    """Matrices among the variables are sharded like parameters; vectors and keys are small."""
    large = {p for p, x in leaves_by_path(form.abstract_variables).items() if x.ndim > 1}
    annotations = form.annotations if form.base else {}
    plans = partition_tree(form.abstract_variables, strategy, sizes, annotations, inferred)
    return {
        path: plan
        if plan.rule in ("rule", "annotation", "inferred") or (path in large and strategy.zero == 3)
        else dataclasses.replace(
            plan, full=plan.compute, rule="replicated", why="small: each device holds it"
        )
        for path, plan in plans.items()
    }


def _parts(entry: Any) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry)
