"""What `shardtrain verify` does once its options are read."""

from typing import Any

import numpy as np
import optax
from rich.console import Console

from shardtrain.cli.problem import load_problem
from shardtrain.cli.train.devices import choose_devices
from shardtrain.cli.train.run import next_token_loss
from shardtrain.cli.train.sizes import model_size
from shardtrain.cli.verify import VerifyOptions
from shardtrain.models import Decoder
from shardtrain.plan import plan as make_plan
from shardtrain.verify import verify


def run(options: VerifyOptions) -> int:
    """Verify and print; 0 if all arrays agree, else 1."""
    console = Console(highlight=False)
    devices = choose_devices(options.strategy, options.devices)
    model, loss_fn, optimizer, batch = (
        load_problem(options.problem) if options.problem else decoder_problem()
    )
    plan = make_plan(model, loss_fn, optimizer, batch, devices.strategy)
    report = verify(plan, num_steps=options.steps)
    if options.table:
        console.print(report)
    console.print(str(report), style="green" if report.passed else "red", markup=False)
    return 0 if report.passed else 1


def decoder_problem(rows: int = 8, length: int = 16) -> tuple[Any, Any, Any, Any]:
    """A tiny decoder on random tokens, a tenth of them masked."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, 256, (rows, length + 1)).astype(np.int32)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "mask": (random.random((rows, length)) < 0.9).astype(np.float32),
    }
    config = model_size("tiny", 256).config
    return (
        lambda rngs: Decoder(config, rngs=rngs),
        next_token_loss,
        optax.sgd(0.1, momentum=0.9),
        batch,
    )
