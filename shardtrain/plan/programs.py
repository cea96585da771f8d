"""The programs of a plan: gradients, step, evaluation, calls of the trained model."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax

from shardtrain.modules import ModelForm
from shardtrain.modules.intercept import Calls
from shardtrain.plan.grads import GradientPlan, TracedLoss, make_gradients
from shardtrain.plan.layout import Layout
from shardtrain.plan.loss import UserLoss, make_loss
from shardtrain.plan.pipelined import pipeline_gradients, reduced_once
from shardtrain.plan.replicas import replica_gradients
from shardtrain.plan.stream import constrain_stream
from shardtrain.train import LossFn, TrainState, make_eval, make_step, over_rows, sharded_norm

if TYPE_CHECKING:
    from shardtrain.plan.core import Plan


_ADDRESS = re.compile(r"\d{9,}")


class PlanPrograms:
    """The compiling half of `Plan`."""

    def _gradients(self: "Plan") -> GradientPlan:
        layout, s = self.layout, self.strategy
        if self.pipelined is not None and self.layer_scan is None:
            found = self.pipelined
            grad_fn = pipeline_gradients(found, s)
            if self.algorithm is None:
                grad_fn = reduced_once(grad_fn, found)
            return GradientPlan(grad_fn, found.local_axes, found.reason)
        scan = self.layer_scan
        form, user_loss, whole = self._traced
        gathers = s.zero == 3 and layout.sizes["fsdp"] > 1 and scan is None
        finish = (lambda loss: loss) if scan is None else lambda loss: scan.run(loss, s)

        def loss_for(local_axes: tuple[str, ...], mesh: Any = layout.mesh) -> LossFn:
            loss = make_loss(
                form,
                user_loss,
                s if form.blocks or scan is None else s.replace(remat="none"),
                mesh,
                gather=layout.gather() if gathers else None,
                gather_frozen=layout.gather_frozen() if gathers and self.form.base else None,
                num_parts=s.num_microbatches,
                local_axes=local_axes,
            )
            return loss if mesh is None else constrain_stream(loss, whole, s, local_axes)

        if self.algorithm is not None:
            traced = TracedLoss(loss_for, loss_for((), None), whole, layout, finish)
            return GradientPlan(replica_gradients(traced, s), ("data",))
        return make_gradients(TracedLoss(loss_for, self.proof_loss, whole, layout, finish), s)

    @property
    def _traced(self: "Plan") -> tuple[ModelForm, UserLoss, Layout]:
        """The model, loss and layout in which the program is traced: before layers are stacked."""
        scan = self.layer_scan
        if scan is None:
            return self.form, self.loss, self.layout
        return scan.form, scan.marked(self.loss), scan.whole

    def _first_optimizer_state(self: "Plan", params: Any, variables: Any) -> tuple[Any, Any]:
        """The state of the optimizer and, where replicas keep something, theirs."""
        shardings = self.layout.state_shardings
        if self.algorithm is None:
            make = jax.jit(self.optimizer.init, out_shardings=shardings.opt_state)
            return make(params), None
        out = (shardings.opt_state, shardings.sync)
        return jax.jit(self.algorithm.init, out_shardings=out)(params, variables)

    def _agreed(self: "Plan", state: TrainState) -> TrainState:
        """The state with the parameters that the replicas agree on."""
        if self.algorithm is None or self.algorithm.agreed is None:
            return state
        if "agreed" not in self._jitted_calls:
            self._jitted_calls["agreed"] = jax.jit(
                self.algorithm.agreed, out_shardings=self.layout.state_shardings
            )
        return self._jitted_calls["agreed"](state)

    def _make_step(self: "Plan") -> Any:
        layout = self.layout
        if self.algorithm is not None:
            body = self.algorithm.make_step(self.gradients.grad_fn)
        else:
            body = make_step(
                self.gradients.grad_fn,
                self.optimizer,
                self.strategy.max_grad_norm,
                layout.constrain(layout.update_specs),
                sharded_norm(layout.mesh, layout.update_specs),
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
            # Compiled elsewhere, the step becomes part of another program, which then has them.
            compiler_options=(self.xla_options or None) if self.hardware is None else None,
        )

    def _raw(self: "Plan", rng: jax.Array) -> jax.Array:
        """The run's key as plain integers: a typed key costs Python time at every dispatch.

        The key never changes, so it is converted once.
        """
        if rng is not self._rng[0]:
            self._rng = (rng, jax.device_put(jax.random.key_data(rng), self._replicated()))
        return self._rng[1]

    def _step_arguments(self: "Plan") -> tuple[Any, Any, Any]:
        """What the compiled step takes, as shapes and shardings."""
        state = self.layout.state
        data = jax.eval_shape(jax.random.key_data, state.rng)
        data = jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=self._replicated())
        return state.replace(rng=None), data, self.layout.batch

    def _lower_step(self: "Plan") -> jax.stages.Lowered:
        return self._jitted_step.lower(*self._step_arguments())

    def program_text(self: "Plan") -> str:
        """The step before compilation (StableHLO); equal on all processes that run the same.

        Host callbacks carry an address of this process; long numbers are left out.
        """
        return _ADDRESS.sub("#", self._lower_step().as_text())

    def _make_eval(self: "Plan") -> Any:
        layout = self.layout
        loss = make_loss(self.form, self.eval_loss, self.strategy, layout.mesh, train=False)
        scan = self.layer_scan
        if scan is not None:
            marked = make_loss(
                scan.form, scan.marked(self.eval_loss), self.strategy, layout.mesh, train=False
            )
            loss = scan.run(marked, self.strategy, fallback=loss)
        body = make_eval(loss)

        def evaluate(state: TrainState, batch: Any) -> Any:
            self.trace_counts["eval_step"] += 1
            return body(state, batch)

        return jax.jit(
            evaluate,
            in_shardings=(layout.state_shardings, layout.batch_shardings),
            out_shardings=self._replicated(),
        )

    def _make_eval_rows(self: "Plan") -> Any:
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

    def _calling(self: "Plan", fn: Callable[..., Any]) -> Callable[..., Any]:
        def called(params: Any, variables: Any, rng: jax.Array, args: Any) -> Any:
            self.trace_counts["call"] += 1
            return self.form.apply(fn, params, variables, rng, False, args, Calls())[0]

        return called

    def _replicated(self: "Plan") -> Any:
        return jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec())
