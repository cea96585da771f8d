"""`Plan`: a strategy resolved against one model, loss, optimizer, batch and set of devices."""

import collections
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from shardtrain.modules import ModelForm
from shardtrain.partitioning.infer.table import AxisTable
from shardtrain.plan.grads import GradientPlan
from shardtrain.plan.layer_scan import LayerScan
from shardtrain.plan.layout import Layout
from shardtrain.plan.loss import UserLoss, make_loss
from shardtrain.plan.pipelined import Pipelined
from shardtrain.plan.placement import PlacedCheck, check_batch, own, place_key, place_tree
from shardtrain.plan.programs import PlanPrograms
from shardtrain.plan.report import plan_platform
from shardtrain.plan.states import PlanStates
from shardtrain.plan.stream import stream_findings
from shardtrain.plan.views import PlanViews
from shardtrain.plan.wide_products import wide_products
from shardtrain.planner.compiled import Compiled, accepted_options
from shardtrain.strategy import Strategy
from shardtrain.sync import Algorithm
from shardtrain.train import TrainState, with_rng
from shardtrain.xla_options import compiler_options


class Plan(PlanPrograms, PlanStates, PlanViews):
    """How one model will train: every array's sharding and why, and the step program.

    Made by `st.plan`. Making one allocates and compiles nothing. The methods that train:

    - `init` makes a `TrainState`, sharded from birth;
    - `step` and `eval_step` run one batch; `call` runs any function of the trained model;
    - `model` gives the model back as its author knows it.

    The methods that explain (`explain`, `memory`, `collectives`, `report`, ...) are in
    `shardtrain.plan.views`; what is compiled is in `shardtrain.plan.programs`.
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
        layer_scan: LayerScan | None = None,
        axis_table: Callable[[], AxisTable] | None = None,
        algorithm: Algorithm | None = None,
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
        self.layer_scan = layer_scan
        self.axis_table = axis_table
        self.algorithm = algorithm
        self.trace_counts: collections.Counter[str] = collections.Counter()
        traced, _, whole = self._traced
        parts = strategy.num_microbatches
        self.proof_loss = make_loss(traced, loss, strategy, None, num_parts=parts)
        self.gradients = self._gradients()
        self.findings = findings + _gradient_findings(self.gradients, strategy)
        if strategy.precision == "bf16" and strategy.pipeline == 1:
            self.findings += wide_products(self.proof_loss, whole)
        if strategy.sequence_parallel and strategy.pipeline == 1:
            self.findings += stream_findings(self.proof_loss, whole)
        platform = plan_platform(self.mesh, hardware)
        self.xla_options = compiler_options(strategy.xla, platform)
        if hardware is None and self.xla_options:
            # Before anything is trained: a flag the compiler does not know.
            self.xla_options = accepted_options(self.xla_options, self.mesh.local_devices[0])
        self._jitted_step = self._make_step()
        self._jitted_eval = self._make_eval()
        self._jitted_eval_rows = self._make_eval_rows()
        self._jitted_calls: dict[Any, Any] = {}
        self._is_placed = PlacedCheck(layout.batch)
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
            (`{"params": ...}`), or a params pytree; for an adapted model (`st.lora`) those of the
            model itself. Copied, never donated.

        Raises:
          ModelError: The given values do not have the model's paths, shapes and dtypes.
        """
        self._need_devices("init")
        given = self._start_values(seed, variables)
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
        return self.first_state(params, others, seed)

    def first_state(self, params: Any, variables: Any, seed: int = 0) -> TrainState:
        """The first state around arrays that are already placed as planned; they become part of it.

        Args:
          params: As in `abstract_state`.
          variables: As in `abstract_state`.
          seed: Seed of the run's random keys.
        """
        shardings = self.layout.state_shardings
        opt_state, sync = self._first_optimizer_state(params, variables)
        zero = lambda s: jax.device_put(jnp.zeros((), jnp.int32), s)
        return TrainState(
            step=zero(shardings.step),
            params=params,
            opt_state=opt_state,
            variables=variables,
            rng=place_key(jax.random.fold_in(jax.random.key(seed), 1), shardings.rng),
            skipped=zero(shardings.skipped),
            sync=sync,
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
        new_state, metrics = self._jitted_step(with_rng(state, None), self._raw(rng), placed)
        new_state = with_rng(new_state, rng)
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
            return self._jitted_eval(self._agreed(state), self.place(batch))
        state = self._agreed(state)
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
        state = self._agreed(state)
        return self._jitted_calls[fn](state.params, state.variables, state.rng, args)

    def model(self, state: TrainState) -> Any:
        """The trained model: an NNX module, `(linen module, variables)`, or functional variables.

        Its arrays are copies: they live on when the state is donated to the next step.
        """
        self._check_alive(state)
        state = self._agreed(state)
        copy = lambda tree: jax.tree.map(jnp.copy, tree)
        return self.form.rebuild(copy(state.params), copy(state.variables))

    def place(self, batch: Any) -> Any:
        """A batch of global shape as arrays in the plan's shardings.

        Raises:
          BatchError: A leaf differs from the plan; says which and how.
        """
        if self._is_placed(batch):
            return batch
        check_batch(batch, self.layout.batch)
        return place_tree(batch, self.layout.batch)

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
    return (
        f"gradients are reduced in each of {strategy.num_microbatches} microbatches, not once "
        f"per step: {gradients.reason}",
    )
