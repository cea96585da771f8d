"""What a plan insists on: live states, values of the right model, and the model's own layout."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx

from shardtrain.checkpoint.leaves import named_leaves
from shardtrain.errors import ModelError, ShardingDriftError, ShardtrainError
from shardtrain.pytree import leaves_by_path
from shardtrain.sync import needs_reshard, reshard
from shardtrain.sync.reshard import saved_form
from shardtrain.train import TrainState

if TYPE_CHECKING:
    from shardtrain.plan.core import Plan


class PlanStates:
    """The half of `Plan` that checks and converts states."""

    def to_checkpoint(self: "Plan", state: TrainState) -> TrainState:
        """The state as any mesh can restore it: layers that a pipeline stacked, one by one."""
        state = self._agreed(state)
        if self.pipelined is None:
            return state
        return self._convert("unstack", state, self.abstract_checkpoint)

    def from_checkpoint(self: "Plan", state: TrainState) -> TrainState:
        """The inverse of `to_checkpoint`; also of one with another number of replicas."""
        if needs_reshard(state.sync, self.layout.state.sync):
            shardings = self.layout.state_shardings.sync
            fit = lambda sync: reshard(sync, self.layout.state.sync)
            state = state.replace(sync=jax.jit(fit, out_shardings=shardings)(state.sync))
        if self.pipelined is None:
            return state
        return self._convert("stack", state, self.layout.state)

    @property
    def abstract_checkpoint(self: "Plan") -> TrainState:
        """Shapes and shardings of what `to_checkpoint` returns."""
        return self.layout.state if self.pipelined is None else self.pipelined.abstract_unstacked

    def abstract_saved(self: "Plan", shapes: Mapping[str, tuple[int, ...]]) -> TrainState:
        """`abstract_checkpoint` with the number of replicas of a checkpoint.

        Args:
          shapes: Name -> shape of the checkpoint's leaves.
        """
        state = self.abstract_checkpoint
        named = saved_form(named_leaves({"sync": state.sync}), shapes)
        return state.replace(
            sync=jax.tree.unflatten(jax.tree.structure(state.sync), named.values())
        )

    def _convert(self: "Plan", how: str, state: TrainState, like: TrainState) -> TrainState:
        if how not in self._jitted_calls:
            shardings = jax.tree.map(lambda x: x.sharding, like)
            self._jitted_calls[how] = jax.jit(getattr(self.pipelined, how), out_shardings=shardings)
        return self._jitted_calls[how](state)

    def _need_devices(self: "Plan", what: str) -> None:
        if isinstance(self.mesh, jax.sharding.AbstractMesh):
            raise ShardtrainError(
                f"plan.{what}: this plan is for hardware that is not here "
                f"({self.mesh.size} devices). Plan again without hardware= to run on this "
                "machine's devices, or simulate them: st.simulate(n)"
            )

    def _check_alive(self: "Plan", state: TrainState) -> None:
        if not isinstance(state, TrainState):
            raise ShardtrainError(
                f"expected the TrainState of plan.init, got {type(state).__name__}"
            )
        step = state.step
        if isinstance(step, jax.Array) and step.is_deleted():
            raise ShardtrainError(
                "this state was consumed by plan.step() (its memory is reused for the new state). "
                "Use the returned state: `state, metrics = plan.step(state, batch)`, or plan with "
                "st.plan(..., donate=False)"
            )

    def _check_shardings(self: "Plan", state: TrainState) -> None:
        """After the first compile: what XLA made is what was planned."""
        planned = leaves_by_path(self.layout.state)
        for path, leaf in leaves_by_path(state).items():
            wanted = planned[path].sharding
            if not leaf.sharding.is_equivalent_to(wanted, leaf.ndim):
                raise ShardingDriftError(
                    f"{path}: planned {wanted.spec}, compiled as {leaf.sharding}"
                )

    def _start_values(self: "Plan", seed: int, variables: Any) -> tuple[Any, Any] | None:
        """Values given with the model or to `init`; None: make new ones."""
        form = self.form
        if form.adopt is None or form.base is None:
            return form.initial if variables is None else self._given(variables)
        if variables is None and form.base.init is not None:
            return None
        given = None
        if variables is not None:
            given = self._parts_of(variables)
            self._check_values("params", given[0], form.base.abstract_params)
            if given[1] is not None:
                self._check_values("variables", given[1], form.base.abstract_variables)
        params, others = form.adopt(jax.random.key(seed), given)
        if self.pipelined is None:
            return params, others
        return self.pipelined.stack_params(params), self.pipelined.stack_variables(others)

    def _parts_of(self: "Plan", values: Any) -> tuple[Any, Any]:
        """Params and, if there are any, other variables of a model's values."""
        if isinstance(values, nnx.Module):
            _, params, others = nnx.split(values, nnx.Param, ...)
            params, others = nnx.to_pure_dict(params), nnx.to_pure_dict(others)
        elif isinstance(values, dict) and "params" in values and self.form.kind != "nnx":
            params, others = values["params"], {k: v for k, v in values.items() if k != "params"}
        else:
            params, others = values, None
        return params, others if jax.tree.leaves(others) else None

    def _given(self: "Plan", values: Any) -> tuple[Any, Any]:
        params, others = self._parts_of(values)
        wanted = self.abstract_checkpoint
        self._check_values("params", params, wanted.params)
        if self.pipelined is not None:
            params = self.pipelined.stack_params(params)
        if others is None:
            return params, self._initial_variables()
        self._check_values("variables", others, wanted.variables)
        if self.pipelined is not None:
            others = self.pipelined.stack_variables(others)
        return params, others

    def _initial_variables(self: "Plan") -> Any:
        if self.form.initial is not None:
            return self.form.initial[1]
        init = self.form.init
        assert init is not None
        return jax.jit(lambda key: init(key)[1])(jax.random.key(0))

    def _check_values(self: "Plan", what: str, given: Any, planned: Any) -> None:
        found, wanted = leaves_by_path(given), leaves_by_path(planned)
        lines = [f"  missing: {p}" for p in wanted if p not in found]
        lines += [f"  unknown: {p}" for p in found if p not in wanted]
        for path in found.keys() & wanted.keys():
            a, b = found[path], wanted[path]
            if tuple(a.shape) != tuple(b.shape) or a.dtype != b.dtype:
                lines.append(
                    f"  {path}: given {a.dtype}{list(a.shape)}, model {b.dtype}{list(b.shape)}"
                )
        if lines:
            raise ModelError(
                f"the given {what} are not {self.form.name}'s:\n" + "\n".join(sorted(lines))
            )
