"""`shardtrain train`, top to bottom."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from rich.console import Console

from shardtrain.checkpoint import agreement, steps
from shardtrain.cli.train.devices import Devices, choose_devices
from shardtrain.cli.train.directory import choose_directory, claim, write_settings
from shardtrain.cli.train.options import TrainOptions
from shardtrain.cli.train.report import (
    closing_paragraph,
    print_paragraph,
    print_sample,
    print_start,
)
from shardtrain.cli.train.sizes import Size, model_size
from shardtrain.cli.train.text import Text, eval_loader, load_text, train_loader
from shardtrain.data import DataLoader
from shardtrain.errors import ShardtrainError
from shardtrain.fit import FitResult, evaluate, fit
from shardtrain.models import Decoder
from shardtrain.models.generate import generate
from shardtrain.modules import Mean, cross_entropy
from shardtrain.monitoring.guard import LossGuard
from shardtrain.monitoring.metrics_log import MetricsLog, TensorBoardLog, read_metrics
from shardtrain.plan import Plan
from shardtrain.plan import plan as make_plan
from shardtrain.recovery import has_snapshots
from shardtrain.viz.figure import save
from shardtrain.viz.loss import loss_figure

_MAY_CHANGE = ("steps", "strategy", "lr")
_INTERRUPTED = 130


def run(options: TrainOptions) -> int:
    """Train, evaluate, save, sample; the exit code."""
    _check(options)
    console = Console(highlight=False)
    devices = choose_devices(options.strategy, options.devices, options.batch)
    is_main = jax.process_index() == 0
    console.quiet = not is_main
    text = load_text(options.data, options.tokenizer)
    size = model_size(options.model, text.tokenizer.vocab_size)
    directory = choose_directory(options.out, f"{options.model}-{text.name}", options.fresh)
    settings = _settings(options, size, devices)
    # Also a barrier: nobody writes before all processes have looked.
    claimed = claim(directory, settings, _MAY_CHANGE) and _is_saved(directory, options)
    continues = not agreement.all_agree(not claimed)  # another host's memory counts too

    loader = train_loader(text, options.sequence, options.batch, options.seed)
    held_out = eval_loader(text, options.sequence, options.batch)
    plan = build_plan(size, options, loader, devices)
    place = f"{directory} ({'continuing the run there' if continues else 'new'})"
    print_start(
        console,
        plan,
        {
            "devices": devices.description,
            "data": text.description,
            "model": _describe_model(options, size, plan),
            "directory": place,
        },
    )
    if is_main:
        write_settings(directory, settings)
    result, seconds = train(console, plan, loader, held_out, options, directory, continues)
    if result.stopped:
        print_paragraph(console, _stopped_text(result, directory))
        return _INTERRUPTED
    finish(console, plan, result, text, options, directory, devices, seconds)
    return 0


def next_token_loss(model: Any, batch: Any) -> Mean:
    """Cross-entropy of each next token, in nats, over unmasked positions."""
    return cross_entropy(model(batch["tokens"]), batch["targets"], batch["mask"])


def build_plan(size: Size, options: TrainOptions, loader: DataLoader, devices: Devices) -> Plan:
    """The decoder under the strategy, with AdamW, warm-up and cosine decay."""
    peak = options.lr or size.learning_rate
    warmup = max(1, options.steps // 10)
    decay = max(options.steps, warmup + 1)
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, decay, peak / 10)
    matrices = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    optimizer = optax.adamw(schedule, b2=0.95, weight_decay=0.1, mask=matrices)
    factory = lambda rngs: Decoder(size.config, rngs=rngs)
    return make_plan(factory, next_token_loss, optimizer, loader.abstract_batch, devices.strategy)


def train(
    console: Console,
    plan: Plan,
    loader: DataLoader,
    held_out: DataLoader,
    options: TrainOptions,
    directory: Path,
    continues: bool,
) -> tuple[FitResult, float]:
    """Evaluate the untrained model, then `fit`; the result and the seconds it took."""
    started = time.monotonic()
    state = None
    if not continues:
        console.print("compiling ...", style="dim")
        state = plan.init(options.seed)
        before = evaluate(plan, state, held_out)
        console.print(f"step 0: held-out loss {before['loss']:.4f}", style="green")
        if jax.process_index() == 0:
            log = directory / "metrics.jsonl"
            log.unlink(missing_ok=True)  # of a run that ended before its first checkpoint
            MetricsLog(log).write({"kind": "eval", "step": 0, **before})
    quarter = max(1, options.steps // 4)
    result = fit(
        plan,
        loader,
        options.steps,
        directory,
        [TensorBoardLog(directory / "tensorboard")] if options.tensorboard else [],
        seed=options.seed,
        state=state,
        eval_loader=held_out,
        eval_every=options.eval_every or quarter,
        save_every=options.save_every or quarter,
        snapshot_every=options.snapshot_every,
        guard=None if options.no_guard else LossGuard(),
    )
    return result, time.monotonic() - started


def finish(
    console: Console,
    plan: Plan,
    result: FitResult,
    text: Text,
    options: TrainOptions,
    directory: Path,
    devices: Devices,
    seconds: float,
) -> None:
    """Sample, loss curve, closing paragraph."""
    if options.sample:
        prompt, sample = _sample(plan, result, text, options)
        print_sample(console, prompt, sample)
        if jax.process_index() == 0:
            (directory / "sample.txt").write_text(prompt + sample, "utf-8")
    if jax.process_index() != 0:
        return
    records = read_metrics(directory / "metrics.jsonl")
    layout = str(plan.strategy).replace(",", ", ")  # so that a long one can be wrapped
    save(loss_figure(records, title=f"{directory.name}: {layout}"), directory / "loss.png")
    evals = [r["loss"] / text.bytes_per_token for r in records if r["kind"] == "eval"]
    done = len(result.history)
    facts = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(plan.abstract_state.params)),
        "steps": done,
        "tokens": done * options.batch * options.sequence,
        "seconds": seconds,
        "devices": devices.description.partition(" (")[0],
        "before": evals[0] if len(evals) > 1 else None,
        "after": evals[-1],
        "directory": directory,
        "step": int(result.state.step),
        "last_step": int(result.state.step),
    }
    print_paragraph(console, closing_paragraph(facts))


def _sample(plan: Plan, result: FitResult, text: Text, options: TrainOptions) -> tuple[str, str]:
    if options.prompt is not None:
        tokens = text.tokenizer.encode(options.prompt.encode())
    else:
        tokens = text.held_out[: options.sequence // 2]
    sample = generate(
        plan,
        result.state,
        np.asarray(tokens),
        options.sample,
        window=options.sequence,
        seed=options.seed,
    )
    return text.tokenizer.decode(np.asarray(tokens)), text.tokenizer.decode(sample)


def _is_saved(directory: Path, options: TrainOptions) -> bool:
    in_memory = options.snapshot_every is not None and has_snapshots(directory)
    return in_memory or bool(steps.committed(directory))


def _settings(options: TrainOptions, size: Size, devices: Devices) -> dict[str, Any]:
    """What decides the numbers of a run, for `run.json`."""
    return {
        "model": options.model,
        "config": dataclasses.asdict(size.config),
        "data": [str(path.expanduser().resolve()) for path in options.data] or "stdlib",
        "tokenizer": str(options.tokenizer.resolve()) if options.tokenizer else "bytes",
        "sequence": options.sequence,
        "batch": options.batch,
        "seed": options.seed,
        "steps": options.steps,
        "lr": options.lr or size.learning_rate,
        "strategy": str(devices.strategy),
    }


def _describe_model(options: TrainOptions, size: Size, plan: Plan) -> str:
    c = size.config
    count = sum(leaf.size for leaf in jax.tree.leaves(plan.abstract_state.params))
    return (
        f"{options.model}: {count:,} parameters, {c.num_layers} layers, width {c.embed_dim}, "
        f"{c.num_heads} heads ({c.num_kv_heads} key/value)"
    )


def _stopped_text(result: FitResult, directory: Path) -> str:
    return (
        f"Stopped at step {int(result.state.step)}, which is saved in {directory}. "
        "The same command continues from there."
    )


def _check(options: TrainOptions) -> None:
    """Numbers that nothing below would explain as well."""
    for name in ("steps", "batch", "sequence"):
        if getattr(options, name) < 1:
            raise ShardtrainError(f"--{name} {getattr(options, name)}: give at least 1")
    for name in ("eval_every", "save_every", "snapshot_every", "devices"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ShardtrainError(f"--{name.replace('_', '-')} {value}: give at least 1")
    if options.sample < 0 or (options.lr is not None and options.lr <= 0):
        raise ShardtrainError("--sample must be at least 0 and --lr above 0")
