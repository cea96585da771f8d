"""`Plan`: a strategy resolved against one model, loss, optimizer, batch and set of devices."""

import collections
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from shardtrain.errors import ModelError, ShardingDriftError, ShardtrainError
from shardtrain.modules import ModelForm
from shardtrain.modules.intercept import Calls
from shardtrain.partitioning.infer.table import AxisTable
from shardtrain.plan.gather import gather_at_use
from shardtrain.plan.grads import GradientPlan, make_gradients
from shardtrain.plan.layout import Layout
from shardtrain.plan.loss import UserLoss, make_loss
from shardtrain.plan.pipelined import Pipelined, pipeline_gradients
from shardtrain.plan.placement import check_batch, is_placed, own, place_key, place_tree
from shardtrain.plan.views import PlanViews
from shardtrain.planner.compiled import Compiled
from shardtrain.pytree import leaves_by_path
from shardtrain.strategy import Strategy
from shardtrain.train import TrainState, make_eval, make_step, over_rows


class Plan(PlanViews):
    """How one model will train: every array's sharding and why, and the step program.

    Made by `st.plan`. Making one allocates and compiles nothing. The methods that train:

    - `init` makes a `TrainState`, sharded from birth;
    - `step` and `eval_step` run one batch; `call` runs any function of the trained model;
    - `model` gives the model back as its author knows it.

    The methods that explain (`explain`, `memory`, `collectives`, `report`, ...) are in
    `shardtrain.plan.views`.
    """

    def __init__(
        self,
        form: ModelForm,
        loss: UserLoss,
        eval_loss: UserLoss,
        optimizer: optax.GradientTransformation,
        strategy: Strategy,
        layout: Layout,
        donate: bool,
        again: Callable[..., "Plan"],
        example: Any = None,
        hardware: str | None = None,
        findings: tuple[str, ...] = (),
        pipelined: Pipelined | None = None,
        axis_table: Callable[[], AxisTable] | None = None,
    ):
        self.form = form
        self.strategy = strategy
        self.layout = layout
        self.optimizer = optimizer
        self.loss = loss
        self.eval_loss = eval_loss
        self.donate = donate
        self.again = again
        self.example = example
        self.hardware = hardware
        self.pipelined = pipelined
        self.axis_table = axis_table
        self.trace_counts: collections.Counter[str] = collections.Counter()
        self.proof_loss = make_loss(form, loss, strategy, None, num_parts=strategy.num_microbatches)
        self.gradients = self._gradients()
        self.findings = findings + _gradient_findings(self.gradients, strategy)
        self._jitted_step = self._make_step()
        self._jitted_eval = self._make_eval()
        self._jitted_eval_rows = self._make_eval_rows()
        self._jitted_calls: dict[Any, Any] = {}
        self._checked = False
        self._rng: tuple[Any, Any] = (None, None)
        self._compiled: dict[str | None, Compiled] = {}

    @property
    def mesh(self) -> Any:
        """The device mesh (abstract where the hardware is not here)."""
        return self.layout.mesh

    @property
    def abstract_state(self) -> TrainState:
        """`TrainState` of `ShapeDtypeStruct`s with shardings."""
        return self.layout.state

    def init(self, seed: int = 0, variables: Any = None) -> TrainState:
        """Make the first state, each array created in its shards.

        Args:
          seed: Seed of the parameters (as `jax.random.key(seed)`) and of the run's random keys.
          variables: Start from these values instead: an NNX module, Linen variables
            (`{"params": ...}`), or a params pytree. Copied, never donated.

        Raises:
          ModelError: The given values do not have the model's paths, shapes and dtypes.
        """
        self._need_devices("init")
        given = self.form.initial if variables is None else self._given(variables)
        shardings = self.layout.state_shardings
        if given is None:
            init = self.form.init
            assert init is not None
            make = jax.jit(
                lambda key: init(key), out_shardings=(shardings.params, shardings.variables)
            )
            params, others = make(jax.random.key(seed))
        else:
            params = jax.tree.map(own, given[0], shardings.params)
            others = jax.tree.map(own, given[1], shardings.variables)
        make_opt = jax.jit(self.optimizer.init, out_shardings=shardings.opt_state)
        zero = lambda s: jax.device_put(jnp.zeros((), jnp.int32), s)
        return TrainState(
            step=zero(shardings.step),
            params=params,
            opt_state=make_opt(params),
            variables=others,
            rng=place_key(jax.random.fold_in(jax.random.key(seed), 1), shardings.rng),
            skipped=zero(shardings.skipped),
        )

    def step(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        """One optimizer step over one global batch.

        Args:
          state: From `init`, a former step or a checkpoint. Donated: use the returned one.
          batch: Pytree like the plan's example batch; NumPy or JAX arrays of global shape.

        Returns:
          The new state, and metrics (`loss`, `grad_norm`, `weight`, `skipped` and the user's) as
          device arrays: nothing waits for the device.

        Raises:
          BatchError: A leaf has another shape, dtype or structure than planned.
        """
        self._need_devices("step")
        self._check_alive(state)
        placed = self.place(batch)
        rng = state.rng
        new_state, metrics = self._jitted_step(state.replace(rng=None), self._raw(rng), placed)
        new_state = new_state.replace(rng=rng)
        if not self._checked:
            self._check_shardings(new_state)
            self._checked = True
        return new_state, metrics

    def eval_step(self, state: TrainState, batch: Any) -> dict[str, jax.Array]:
        """Loss and metrics of one batch without an update.

        NNX models run in `.eval()` mode; a loss with a keyword `train` gets `train=False`.

        Returns:
          Name -> scalar, `weight` included, so that unequal batches can be averaged exactly.
        """
        means = self.eval_means(state, batch)
        values = {name: mean.value for name, mean in means.items()}
        return {**values, "weight": means["loss"].weight}

    def eval_means(self, state: TrainState, batch: Any, rows: Any = None) -> dict[str, Any]:
        """Like `eval_step`, as `st.Mean`s that add up over batches.

        Args:
          state: The trained state; not donated.
          batch: One global batch.
          rows: `[batch]` of 0 and 1: which rows count; None: all. Rows are then evaluated one by
            one, which is the same for every model whose evaluation does not mix examples.
        """
        self._need_devices("eval_step")
        self._check_alive(state)
        if rows is None or bool(jnp.all(jnp.asarray(rows) == 1)):
            return self._jitted_eval(state, self.place(batch))
        return self._jitted_eval_rows(state, self.place(batch), jnp.asarray(rows, jnp.float32))

    def call(self, state: TrainState, fn: Callable[..., Any], *args: Any) -> Any:
        """`fn(model, *args)` on the trained model, sharded: predict, sample, embed.

        Args:
          state: The trained state; not donated.
          fn: Called with the model as its author knows it (in eval mode for NNX).
          args: Arrays or pytrees of arrays.
        """
        self._need_devices("call")
        self._check_alive(state)
        if fn not in self._jitted_calls:
            self._jitted_calls[fn] = jax.jit(self._calling(fn))
        return self._jitted_calls[fn](state.params, state.variables, state.rng, args)

    def model(self, state: TrainState) -> Any:
        """The trained model: an NNX module, `(linen module, variables)`, or functional variables.

        Its arrays are copies: they live on when the state is donated to the next step.
        """
        self._check_alive(state)
        copy = lambda tree: jax.tree.map(jnp.copy, tree)
        return self.form.rebuild(copy(state.params), copy(state.variables))

    def place(self, batch: Any) -> Any:
        """A batch of global shape as arrays in the plan's shardings.

        Raises:
          BatchError: A leaf differs from the plan; says which and how.
        """
        if is_placed(batch, self.layout.batch):
            return batch
        check_batch(batch, self.layout.batch)
        return place_tree(batch, self.layout.batch)

    # -- programs ------------------------------------------------------------------------------

    def _gradients(self) -> GradientPlan:
        layout, s = self.layout, self.strategy
        if self.pipelined is not None:
            return GradientPlan(pipeline_gradients(self.pipelined, s), ())
        loss_for = lambda local_axes: make_loss(
            self.form,
            self.loss,
            s,
            layout.mesh,
            gather=gather_at_use(layout.mesh, layout.compute_specs, layout.full_specs)
            if s.zero == 3 and layout.sizes["fsdp"] > 1
            else None,
            num_parts=s.num_microbatches,
            local_axes=local_axes,
        )
        return make_gradients(loss_for, self.proof_loss, layout, s)

    def _make_step(self) -> Any:
        layout = self.layout
        body = make_step(
            self.gradients.grad_fn,
            self.optimizer,
            self.strategy.max_grad_norm,
            layout.constrain(layout.update_specs),
        )

        def step(state: TrainState, rng: jax.Array, batch: Any) -> Any:
            self.trace_counts["step"] += 1
            rng = jax.random.wrap_key_data(rng)
            new_state, metrics = body(state.replace(rng=rng), batch)
            return new_state.replace(rng=None), metrics

        shardings = layout.state_shardings.replace(rng=None)
        return jax.jit(
            step,
            in_shardings=(shardings, self._replicated(), layout.batch_shardings),
            out_shardings=(shardings, self._replicated()),
            donate_argnums=(0,) if self.donate else (),
        )

    def _raw(self, rng: jax.Array) -> jax.Array:
        """The run's key as plain integers: a typed key costs Python time at every dispatch.

        The key never changes, so it is converted once.
        """
        if rng is not self._rng[0]:
            self._rng = (rng, jax.device_put(jax.random.key_data(rng), self._replicated()))
        return self._rng[1]

    def _step_arguments(self) -> tuple[Any, Any, Any]:
        """What the compiled step takes, as shapes and shardings."""
        state = self.layout.state
        data = jax.eval_shape(jax.random.key_data, state.rng)
        data = jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=self._replicated())
        return state.replace(rng=None), data, self.layout.batch

    def _lower_step(self) -> jax.stages.Lowered:
        return self._jitted_step.lower(*self._step_arguments())

    def _make_eval(self) -> Any:
        layout = self.layout
        loss = make_loss(self.form, self.eval_loss, self.strategy, layout.mesh, train=False)
        body = make_eval(loss)

        def evaluate(state: TrainState, batch: Any) -> Any:
            self.trace_counts["eval_step"] += 1
            return body(state, batch)

        return jax.jit(
            evaluate,
            in_shardings=(layout.state_shardings, layout.batch_shardings),
            out_shardings=self._replicated(),
        )

    def _make_eval_rows(self) -> Any:
        layout = self.layout
        loss = make_loss(
            self.form,
            self.eval_loss,
            self.strategy,
            layout.mesh,
            train=False,
            local_axes=layout.batch_axes,
        )
        body = over_rows(make_eval(loss), layout.batch_axes)

        def evaluate(state: TrainState, batch: Any, rows: jax.Array) -> Any:
            self.trace_counts["eval_rows"] += 1
            return body(state, batch, rows)

        shardings = (layout.state_shardings, layout.batch_shardings, None)
        return jax.jit(evaluate, in_shardings=shardings, out_shardings=self._replicated())

    def _calling(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        def called(params: Any, variables: Any, rng: jax.Array, args: Any) -> Any:
            self.trace_counts["call"] += 1
            return self.form.apply(fn, params, variables, rng, False, args, Calls())[0]

        return called

    def _replicated(self) -> Any:
        return jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec())

    # -- checks --------------------------------------------------------------------------------

    def _need_devices(self, what: str) -> None:
        if isinstance(self.mesh, jax.sharding.AbstractMesh):
            raise ShardtrainError(
                f"plan.{what}: this plan is for hardware that is not here "
                f"({self.mesh.size} devices). Plan again without hardware= to run on this "
                "machine's devices, or simulate them: st.simulate(n)"
            )

    def _check_alive(self, state: TrainState) -> None:
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

    def _check_shardings(self, state: TrainState) -> None:
        """After the first compile: what XLA made is what was planned."""
        planned = leaves_by_path(self.layout.state)
        for path, leaf in leaves_by_path(state).items():
            wanted = planned[path].sharding
            if not leaf.sharding.is_equivalent_to(wanted, leaf.ndim):
                raise ShardingDriftError(
                    f"{path}: planned {wanted.spec}, compiled as {leaf.sharding}"
                )

    def _given(self, values: Any) -> tuple[Any, Any]:
        if isinstance(values, nnx.Module):
            _, params, others = nnx.split(values, nnx.Param, ...)
            given = nnx.to_pure_dict(params), nnx.to_pure_dict(others)
        elif isinstance(values, dict) and "params" in values and self.form.kind != "nnx":
            given = values["params"], {k: v for k, v in values.items() if k != "params"}
        else:
            given = values, None
        params, others = given
        wanted = self.abstract_checkpoint
        self._check_values("params", params, wanted.params)
        if self.pipelined is not None:
            params = self.pipelined.stack_params(params)
        if others is None or not jax.tree.leaves(others):
            return params, self._initial_variables()
        self._check_values("variables", others, wanted.variables)
        if self.pipelined is not None:
            others = self.pipelined.stack_variables(others)
        return params, others

    def _initial_variables(self) -> Any:
        if self.form.initial is not None:
            return self.form.initial[1]
        init = self.form.init
        assert init is not None
        return jax.jit(lambda key: init(key)[1])(jax.random.key(0))

    def _check_values(self, what: str, given: Any, planned: Any) -> None:
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

    # -- the state in the model's own layout ------------------------------------------------------

    def to_checkpoint(self, state: TrainState) -> TrainState:
        """The state as any mesh can restore it: layers that a pipeline stacked, one by one."""
        if self.pipelined is None:
            return state
        return self._convert("unstack", state, self.abstract_checkpoint)

    def from_checkpoint(self, state: TrainState) -> TrainState:
        """The inverse of `to_checkpoint`."""
        if self.pipelined is None:
            return state
        return self._convert("stack", state, self.layout.state)

    @property
    def abstract_checkpoint(self) -> TrainState:
        """Shapes and shardings of what `to_checkpoint` returns."""
        return self.layout.state if self.pipelined is None else self.pipelined.abstract_unstacked

    def _convert(self, how: str, state: TrainState, like: TrainState) -> TrainState:
        if how not in self._jitted_calls:
            shardings = jax.tree.map(lambda x: x.sharding, like)
            self._jitted_calls[how] = jax.jit(getattr(self.pipelined, how), out_shardings=shardings)
        return self._jitted_calls[how](state)

    def describe(self) -> dict[str, Any]:
        """What a checkpoint records about the plan that wrote it; JSON-able."""
        return {
            "model": self.form.name,
            "strategy": str(self.strategy),
            "mesh": {k: v for k, v in self.layout.sizes.items() if v > 1},
            "num_devices": self.mesh.size,
        }


def _gradient_findings(gradients: GradientPlan, strategy: Strategy) -> tuple[str, ...]:
    if not gradients.reason:
        return ()
    if strategy.num_microbatches > 1:
        return (
            f"gradients are reduced in each of {strategy.num_microbatches} microbatches, not once "
            f"per step: {gradients.reason}",
        )
    return (f"gradients are reduced in bf16, not float32: {gradients.reason}",)
