"""What `shardtrain replay` does once its options are read."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from shardtrain.checkpoint import inspect
from shardtrain.checkpoint.steps import committed
from shardtrain.cli.problem import load_problem
from shardtrain.cli.replay import ReplayOptions
from shardtrain.cli.train.devices import choose_devices
from shardtrain.cli.train.directory import SETTINGS
from shardtrain.cli.train.options import TrainOptions
from shardtrain.cli.train.run import build_plan
from shardtrain.cli.train.sizes import model_size
from shardtrain.cli.train.text import load_text, train_loader
from shardtrain.data import DataLoader
from shardtrain.errors import ShardtrainError
from shardtrain.plan import Plan
from shardtrain.plan import plan as make_plan
from shardtrain.recovery import replay_step


def run(options: ReplayOptions) -> int:
    """Replay and print; 0 if everything was finite, else 1."""
    directory = options.directory.expanduser()
    if not directory.is_dir():
        raise ShardtrainError(f"no run directory {directory}")
    console = Console(highlight=False)
    settings = _settings(directory)
    strategy = options.strategy or settings.get("strategy") or _saved_strategy(directory)
    devices = choose_devices(strategy, options.devices)
    if options.problem is not None:
        model, loss_fn, optimizer, loader = load_problem(options.problem)
        if not isinstance(loader, DataLoader):
            raise ShardtrainError(
                f"{options.problem} returned a {type(loader).__name__} as its fourth value; replay "
                "needs the st.DataLoader of the run"
            )
        # Not `devices.strategy`: that is for `shardtrain train`, whose gradients are clipped.
        plan = make_plan(model, loss_fn, optimizer, loader.abstract_batch, strategy or "")
    else:
        plan, loader = _own_run(directory, settings, devices)
    report = replay_step(plan, loader, directory, options.step, seed=settings.get("seed", 0))
    console.print(str(report), markup=False)
    return 1 if report.findings else 0


def _own_run(directory: Path, settings: dict[str, Any], devices: Any) -> tuple[Plan, DataLoader]:
    """Plan and loader of a `shardtrain train` run, from what it recorded."""
    if not settings:
        raise ShardtrainError(
            f"{directory} has no {SETTINGS}: it was not made by `shardtrain train`. Give "
            "--problem FILE.py:NAME, a function that returns (model, loss_fn, optimizer, loader)"
        )
    data = () if settings["data"] == "stdlib" else tuple(map(Path, settings["data"]))
    tokenizer = None if settings["tokenizer"] == "bytes" else Path(settings["tokenizer"])
    given = TrainOptions(
        data=data,
        tokenizer=tokenizer,
        **{name: settings[name] for name in ("model", "steps", "batch", "sequence", "lr", "seed")},
    )
    text = load_text(data, tokenizer)
    loader = train_loader(text, given.sequence, given.batch, given.seed)
    size = model_size(given.model, text.tokenizer.vocab_size)
    return build_plan(size, given, loader, devices), loader


def _settings(directory: Path) -> dict[str, Any]:
    file = directory / SETTINGS
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}


def _saved_strategy(directory: Path) -> str | None:
    """The strategy of the newest checkpoint; None for a run that has none."""
    if not committed(directory.absolute()):
        return None
    return inspect(directory).header.plan.get("strategy")
