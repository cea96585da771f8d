"""What a plan can say about itself before, and after, it is compiled."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax

from shardtrain.errors import HardwareError, KernelNeedsDevicesError
from shardtrain.partitioning.rules import as_axes
from shardtrain.pipeline.scanned import keep_products
from shardtrain.pipeline.schedules import Schedule, make_schedule
from shardtrain.plan.explain import device_bytes, explain_leaf, explain_table
from shardtrain.plan.report import (
    Report,
    local_hardware,
    plan_figures,
    plan_platform,
    summary_table,
)
from shardtrain.planner.collectives import Collective
from shardtrain.planner.compiled import Compiled, compile_lowered
from shardtrain.planner.remote import compile_elsewhere
from shardtrain.planner.targets import target_devices
from shardtrain.planner.time_estimate import StepEstimate, estimate_step
from shardtrain.planner.traffic import collectives_table
from shardtrain.tables import Table, bytes_text
from shardtrain.train import split_batch
from shardtrain.xla_options import describe_xla

if TYPE_CHECKING:
    from shardtrain.plan.core import Plan


@dataclass(frozen=True)
class Memory:
    """Bytes on each device while training.

    Args:
      params: Stored parameters.
      grads: Accumulated gradients (float32).
      optimizer: Optimizer state.
      variables: Everything else the model carries.
      batch: One global batch's shard.
      replicas: What each replica keeps for its own (`Strategy(sync=..., compression=...)`).
      activations: Estimate: what the forward pass of one microbatch keeps for the backward pass,
        split over the batch, sequence and tensor axes.
      compiled_arguments: Measured by the compiler; None before `plan.compile()`.
      compiled_temporaries: Measured by the compiler; None before `plan.compile()`.
    """

    params: int
    grads: int
    optimizer: int
    variables: int
    batch: int
    activations: int
    compiled_arguments: int | None = None
    compiled_temporaries: int | None = None
    replicas: int = 0

    @property
    def total(self) -> int:
        """Sum of the estimated parts."""
        kept = self.params + self.grads + self.optimizer + self.variables
        return kept + self.batch + self.activations + self.replicas

    def table(self) -> Table:
        """Estimated and compiled side by side."""
        names = ("params", "grads", "optimizer", "variables", "batch", "activations", "total")
        rows = [(n, bytes_text(getattr(self, n)), "estimate") for n in names]
        if self.replicas:
            rows.insert(-1, ("replicas", bytes_text(self.replicas), "estimate"))
        for name in ("compiled_arguments", "compiled_temporaries"):
            value = getattr(self, name)
            if value is not None:
                rows.append((name.replace("_", " "), bytes_text(value), "compiler"))
        return Table("Memory on each device", ("what", ">bytes", "from"), tuple(rows))

    def __rich__(self) -> Any:
        return self.table().__rich__()

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


class PlanViews:
    """The explaining half of `Plan`."""

    def explain(self: "Plan", path: str | None = None) -> Table:
        """Which rule decided each array, its sharding, and bytes on each device.

        Args:
          path: One parameter, in detail, with the lines of the model that tie its dims to those
            of others; None: all of them.
        """
        if path is not None:
            return explain_leaf(self.layout, path, self.strategy.zero, self.axis_table)
        return explain_table(self.layout, self.strategy.zero, self.findings)

    def memory(self: "Plan") -> Memory:
        """Bytes on each device by class; after `compile()`, the compiler's figures too."""
        state = self.layout.state
        compiled = self._compiled.get(self.hardware)
        return Memory(
            params=device_bytes(state.params),
            grads=device_bytes(self._sharded_like(self.layout.grad_specs)),
            optimizer=device_bytes(state.opt_state),
            variables=device_bytes(state.variables),
            batch=device_bytes(self.layout.batch),
            activations=self.activation_bytes(),
            compiled_arguments=compiled.argument_bytes if compiled else None,
            compiled_temporaries=compiled.temp_bytes if compiled else None,
            replicas=device_bytes(state.sync),
        )

    def compile(self: "Plan", hardware: str | None = None) -> Compiled:
        """Compile the step and read what the compiler decided; runs nothing.

        Args:
          hardware: Compile for hardware that is not here, e.g. "v5e:4x4" (needs the `tpu` extra)
            or "h100:1x8" (the `cuda` extra), in a process of its own; without the extra, CPU
            devices stand in and `.note` says so. None: the plan's own devices.

        Returns:
          Bytes by class, FLOPs per device, collectives, HLO text, seconds.

        Raises:
          OutOfMemoryError: The compiler found that the step does not fit.
          XlaOptionError: The compiler does not know a flag of `Strategy(xla=...)`.
          HardwareError: The hardware is unknown.
        """
        asked = hardware or self.hardware
        if asked not in self._compiled:
            if asked is None:
                found = compile_lowered(self._lower_step(), self.mesh, options=self.xla_options)
            else:
                there = self if self.hardware == asked else self.again(hardware=asked)
                try:
                    found = compile_elsewhere(
                        there._jitted_step,
                        there._step_arguments(),
                        there.layout.sizes,
                        asked,
                        dcn=there.strategy.dcn,
                        options=there.xla_options,
                    )
                except KernelNeedsDevicesError as error:
                    found = self._compile_described(asked, error)
            self._compiled[asked] = found
        return self._compiled[asked]

    def _compile_described(self: "Plan", asked: str, why: KernelNeedsDevicesError) -> Compiled:
        """Compile in this process, for devices that a compiler describes and nobody has."""
        target = target_devices(asked)
        if target.is_proxy or not target.devices:
            raise HardwareError(f"{asked}: {why}; {target.note}") from why
        there = self.again(hardware=None, devices=list(target.devices))
        return compile_lowered(there._lower_step(), there.mesh, target.note, there.xla_options)

    @property
    def is_compiled(self: "Plan") -> bool:
        """Whether `compile()` has run for the plan's own hardware."""
        return self.hardware in self._compiled

    def collectives(self: "Plan") -> list[Collective]:
        """What the compiled step communicates: kind, bytes, mesh axes, times per step, source."""
        return list(self.compile().collectives)

    def estimate(self: "Plan", hardware: str | None = None) -> StepEstimate:
        """Step time from the compiled step: compute, memory and communication, term by term.

        Args:
          hardware: As in `compile`; None: the plan's own.
        """
        compiled = self.compile(hardware)
        moved = (compiled.argument_bytes or 0) + (compiled.output_bytes or 0)
        machine = hardware or self.hardware or local_hardware(self.mesh)
        return estimate_step(
            compiled.flops,
            moved + 2 * (compiled.temp_bytes or 0),
            compiled.collectives,
            self.layout.sizes,
            machine,
            self.schedule.bubble_fraction,
            dtype=self.strategy.precision,
            slow_axes=tuple(self.strategy.dcn),
        )

    @property
    def schedule(self: "Plan") -> Schedule:
        """The pipeline's table of ticks and stages (one stage where there is no pipeline)."""
        s = self.strategy
        name = s.schedule if s.pipeline > 1 else "gpipe"
        return make_schedule(name, max(s.pipeline, 1), s.num_microbatches, s.virtual_stages)

    def summary(self: "Plan") -> Table:
        """Devices, mesh, batch arithmetic, parameters: what a run prints when it starts."""
        return summary_table(self.form, self.layout, self.strategy, self.hardware)

    def xla_text(self: "Plan") -> str:
        """Which compiler flags the step is compiled with."""
        return describe_xla(self.strategy.xla, plan_platform(self.mesh, self.hardware))

    def report(self: "Plan") -> Report:
        """Everything known so far: the compiler's part is there once `compile()` has run."""
        tables = [self.summary(), self.explain(), self.memory().table()]
        if self.hardware in self._compiled:
            tables.append(collectives_table(self.collectives()))
        return Report(tuple(tables))

    def plot(self: "Plan", path: str | None = None) -> Any:
        """Pictures: the mesh, which slices of the largest parameters live where, memory.

        Args:
          path: Also write them to this PNG (mesh), with `-parameters` and `-memory` beside it.

        Returns:
          Name -> matplotlib `Figure`.
        """
        return plan_figures(self, path)

    def _sharded_like(self: "Plan", specs: Any) -> Any:
        sharding = lambda s: jax.sharding.NamedSharding(self.mesh, s)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(s)),
            self.form.abstract_params,
            specs,
        )

    def activation_bytes(self: "Plan") -> int:
        """Bytes on each device that one microbatch's forward pass keeps for the backward pass.

        From the traced program under the remat policy. The batch and sequence axes divide all of
        it, `tensor` the arrays that have a dim of a size that only sharded dims of parameters have.
        """
        plain = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
        state = self._traced[2].state
        batch = plain(self.layout.batch)
        if self.strategy.num_microbatches > 1:
            parts = jax.eval_shape(lambda b: split_batch(b, self.strategy.num_microbatches), batch)
            batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), parts)

        loss = self.proof_loss
        if self.layer_scan is not None and self.strategy.remat == "none":
            loss = jax.checkpoint(loss, policy=keep_products)  # as the loop does

        def residuals(params: Any, variables: Any, batch: Any, key: jax.Array) -> Any:
            total = lambda p: loss(p, variables, batch, key)[0].loss.total
            return jax.vjp(total, params)[1]

        kept = jax.eval_shape(
            residuals, plain(state.params), plain(state.variables), batch, plain(state.rng)
        )
        sizes = self.layout.sizes
        split = sizes["context"]
        for axis in self.layout.batch_axes:
            split *= sizes[axis]
        inputs = {(x.shape, x.dtype) for x in jax.tree.leaves(plain(state.params))}
        made = [x for x in jax.tree.leaves(kept) if (x.shape, x.dtype) not in inputs]
        wide = self._tensor_dims() - {n for x in jax.tree.leaves(batch) for n in x.shape}
        over = lambda x: sizes["tensor"] if wide & set(x.shape) else 1
        return sum(x.size * x.dtype.itemsize // over(x) for x in made) // split

    def _tensor_dims(self: "Plan") -> set[int]:
        """Sizes of parameter dims over `tensor` that no other parameter dim has."""
        split: set[int] = set()
        whole: set[int] = set()
        for plan in self.layout.params.values():
            entries = (*plan.compute, *(None for _ in plan.shape))
            for size, entry in zip(plan.shape, entries, strict=False):
                (split if "tensor" in as_axes(entry) else whole).add(size)
        return split - whole
