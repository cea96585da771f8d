"""The same decoder and the same tokens under every algorithm by which replicas can agree.

    python benchmarks/sync.py                      # 8 virtual devices, 200 steps, a few minutes
    python benchmarks/sync.py --steps 600 --only "DiLoCo 100 Int4" "all-reduce"

Reports, per algorithm: loss on held-out text after the last step; bytes that one replica sends per
step, read from the compiled program; the staleness of what is applied; and, for a model of a
billion parameters whose step computes for one second, the predicted step time when the replicas
are 1, 10 and 100 Gbit/s apart. Communication of a late gradient hides behind the computation,
all other communication is added to it.

Writes a table, `--json` and `--png`. The text is the source of Python's standard library; batches,
their order and the first parameters are the same for all. Losses of short runs differ by chance in
the third digit. Replicas that agree rarely are evaluated at what they last agreed on: choose a
number of steps that every `sync_every` divides.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from rich.console import Console

import shardtrain as st
from shardtrain.data import TokenDataset, stdlib_text, train_validation_split
from shardtrain.models import Decoder, DecoderConfig
from shardtrain.planner.traffic import total_wire_bytes
from shardtrain.sync.traffic import exchange_payloads
from shardtrain.tables import Table
from shardtrain.viz.figure import Picture

REPLICAS = 8
CONFIG = DecoderConfig(
    num_layers=2, embed_dim=64, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=160
)
GBITS = (1, 10, 100)
SECOND = 1.0
BILLION = [(4096, 4096)] * 60
"""A model of 1.007e9 numbers, for the predicted times."""

ALGORITHMS: dict[str, tuple[Any, Any]] = {
    "all-reduce": (None, None),
    "all-reduce Int8": (None, st.Int8(64)),
    "all-reduce Float8": (None, st.Float8(64)),
    "all-reduce Int4": (None, st.Int4(64)),
    "all-reduce Sign": (None, st.Sign(64)),
    "all-reduce TopK 1%": (None, st.TopK(0.01)),
    "all-reduce PowerSGD 4": (None, st.PowerSGD(4)),
    "parameter server": (st.ParameterServer(), None),
    "parameter server, 1 late": (st.ParameterServer(1), None),
    "parameter server, 4 late": (st.ParameterServer(4), None),
    "local SGD 8": (st.LocalSGD(8), None),
    "DiLoCo 20": (st.DiLoCo(20), None),
    "DiLoCo 20 Int8": (st.DiLoCo(20), st.Int8(64)),
    "DiLoCo 100 Int4": (st.DiLoCo(100), st.Int4(64)),
    "gossip": (st.Gossip(), None),
}


@dataclass(frozen=True)
class Row:
    """One algorithm's figures.

    Args:
      name: As in `ALGORITHMS`.
      loss: Held-out, in nats per byte of text, after the last step.
      against: Its difference from all-reduce, in percent.
      sent: Bytes one replica sends per step, on average.
      fewer: How many times fewer than all-reduce.
      late: Steps between computing a gradient and its effect on the other replicas, at most.
      seconds: Predicted step time of a billion parameters at each of `GBITS`.
    """

    name: str
    loss: float
    against: float
    sent: float
    fewer: float
    late: int
    seconds: tuple[float, ...]


def main() -> None:
    """Run the algorithms one after another and report after each."""
    options = arguments()
    st.simulate(REPLICAS)
    loader, held_out = data(options)
    rows: list[Row] = []
    for name in options.only or ALGORITHMS:
        rows.append(measure(name, options.steps, loader, held_out, rows))
        print(f"{name}: loss {rows[-1].loss:.4f}, {rows[-1].sent:,.0f} bytes per step", flush=True)
        write(rows, options)
    Console(width=150).print(table(rows, options))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16, help="sequences per step, all replicas")
    parser.add_argument("--sequence", type=int, default=64)
    parser.add_argument("--only", nargs="*", choices=list(ALGORITHMS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    return parser.parse_args()


def data(options: argparse.Namespace) -> tuple[st.DataLoader, st.DataLoader]:
    """Windows of the standard library's source, and held-out ones."""
    tokens = np.frombuffer(stdlib_text()[:4_000_000], np.uint8).astype(np.int32)
    train, test = train_validation_split(tokens)
    windows = TokenDataset(test, options.sequence)
    chosen = [windows[i] for i in np.linspace(0, len(windows) - 1, 8 * options.batch).astype(int)]
    columns = {key: np.stack([window[key] for window in chosen]) for key in chosen[0]}
    loader = st.DataLoader(TokenDataset(train, options.sequence), options.batch, seed=0)
    return loader, st.DataLoader(columns, options.batch, allow_repeats=True)


def loss_fn(model: Any, batch: Any) -> st.Mean:
    """Next-byte cross-entropy."""
    return st.cross_entropy(model(batch["tokens"]), batch["targets"], batch.get("mask"))


def measure(
    name: str, steps: int, loader: st.DataLoader, held_out: st.DataLoader, before: list[Row]
) -> Row:
    """Train with one algorithm."""
    sync, compression = ALGORITHMS[name]
    strategy = st.Strategy(data=REPLICAS, sync=sync, compression=compression)
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 5e-3, steps // 10, steps))
    model = lambda rngs: Decoder(CONFIG, rngs=rngs)
    plan = st.plan(model, loss_fn, optimizer, loader.abstract_batch, strategy)
    result = st.fit(plan, loader, steps, progress=False)
    loss = st.evaluate(plan, result.state, held_out)["loss"]
    sent = total_wire_bytes(plan.collectives(), "data")
    base = before[0] if before else None
    return Row(
        name,
        loss,
        100 * (loss / base.loss - 1) if base else 0.0,
        sent,
        base.sent / sent if base else 1.0,
        lateness(sync),
        tuple(predicted(sync, compression, rate) for rate in GBITS),
    )


def lateness(sync: Any) -> int:
    """Steps until a gradient reaches the others."""
    return getattr(sync, "max_staleness", getattr(sync, "sync_every", 1) - 1)


def predicted(sync: Any, compression: Any, gbits: float) -> float:
    """Step time in seconds of the large model: computation and what communication adds."""
    if isinstance(sync, st.Gossip):
        sent = 2.0 * 4 * sum(a * b for a, b in BILLION)  # to two neighbours
    else:
        share = (REPLICAS - 1) / REPLICAS
        payloads = exchange_payloads(compression, BILLION, REPLICAS)
        sent = sum(size * share * (2 if kind == "all-reduce" else 1) for kind, size in payloads)
    seconds = sent / getattr(sync, "sync_every", 1) * 8 / (gbits * 1e9)
    late = getattr(sync, "max_staleness", 0) > 0
    return max(SECOND, seconds) if late else SECOND + seconds


def table(rows: list[Row], options: argparse.Namespace) -> Table:
    """All figures side by side."""
    tokens = options.steps * options.batch * options.sequence
    title = f"{REPLICAS} replicas, {options.steps} steps, {tokens:,} tokens"
    head = ("algorithm", ">loss", ">vs all-reduce", ">bytes/step", ">fewer", ">late")
    head += tuple(f">s/step at {rate} Gbit/s" for rate in GBITS)
    lines = [
        (
            r.name,
            f"{r.loss:.4f}",
            f"{r.against:+.2f} %",
            f"{r.sent:,.0f}",
            f"{r.fewer:,.1f} x",
            str(r.late),
            *(f"{s:,.2f}" for s in r.seconds),
        )
        for r in rows
    ]
    return Table(title, head, tuple(lines))


def write(rows: list[Row], options: argparse.Namespace) -> None:
    """The figures as JSON and as a picture of loss against bytes."""
    if options.json:
        facts = {"steps": options.steps, "batch": options.batch, "sequence": options.sequence}
        facts |= {"replicas": REPLICAS, "jax": jax.__version__, "gbits": GBITS}
        found = {**facts, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.png:
        figure = Picture(9, 5)
        axes = figure.subplots()
        for number, row in enumerate(rows):
            axes.plot(row.sent, row.loss, "o", color="C1" if row.late else "C0")
            place = (5, 5 - 12 * (number % 2))
            axes.annotate(row.name, (row.sent, row.loss), place, textcoords="offset points", size=8)
        axes.margins(x=0.16)
        axes.set_title(f"{options.steps} steps; orange: what arrives is late")
        figure.savefig(options.png)


if __name__ == "__main__":
    main()
