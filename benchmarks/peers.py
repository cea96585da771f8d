"""shardtrain beside what people would pick instead: one decoder, one batch, the same cores.

    python benchmarks/peers.py --from torch=/venv/bin/python --json FILE --png FILE

`peers_report.py` then puts the table into the docs.

Each program is a script of `peers_scripts/`, in its own process (or one per device for PyTorch).
They start one after another, then take turns in rounds, so that what else the machine does meets
all alike; a ratio is the median over rounds of shardtrain's tokens per second over the peer's.
Asserted: the same number of parameters everywhere, and the same loss of the first step.

A peer that the running Python does not have comes from elsewhere: `--from NAME=PYTHON[:SOURCE]`,
NAME one of torch, kauldron, maxtext, torchtitan; SOURCE is a checkout put on its path. A peer that
does not run is left out, with the reason in the result.
"""

import argparse
import ast
import dataclasses
import datetime
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers_report import draw, table

HERE = Path(__file__).parent
SMALL = {
    "vocab_size": 256, "num_layers": 4, "embed_dim": 256, "num_heads": 8, "num_kv_heads": 4,
    "head_dim": 32, "mlp_dim": 640, "rope_theta": 10_000.0, "norm_epsilon": 1e-6,
}  # fmt: skip
TOY = SMALL | {"num_layers": 1, "embed_dim": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
TOY |= {"mlp_dim": 64}
FIRST_LOSS = {"jax": 1e-6, "torch": 1e-4}
"""How far the loss of the first step may be from the hand-written program's, relative."""


@dataclass(frozen=True)
class Peer:
    """A program that takes part.

    Args:
      name: In tables.
      script: Of `peers_scripts`.
      num_devices: Virtual devices of one process, or processes of one device.
      layout: What the script does with them.
      against: The shardtrain program that it is compared with.
      package: Whose interpreter runs it: "jax" for the one that runs this.
      framework: "jax" or "torch".
      own_weights: It draws its initial weights itself, so its losses are its own.
    """

    name: str
    script: str
    num_devices: int = 1
    layout: str = "data"
    against: str | None = None
    package: str = "jax"
    framework: str = "jax"
    own_weights: bool = False

    @property
    def processes(self) -> int:
        """PyTorch has a process per device."""
        return self.num_devices if self.framework == "torch" else 1


OURS = {n: f"shardtrain, {n}" for n in ("1 device", "8 devices, FSDP", "2 devices", "2, FSDP")}


def torch_peer(name: str, script: str, against: str, **more: Any) -> Peer:
    """A peer in PyTorch."""
    package = more.pop("package", "torch")
    return Peer(name, script, against=OURS[against], package=package, framework="torch", **more)


def framework_peers(name: str, script: str, package: str) -> tuple[Peer, ...]:
    """A framework on JAX, on one device and on eight."""
    return tuple(
        Peer(f"{name}, {size}", script, count, layout, OURS[size], package, own_weights=True)
        for size, count, layout in (("1 device", 1, "data"), ("8 devices, FSDP", 8, "fsdp"))
    )


PEERS = (
    Peer(OURS["1 device"], "with_shardtrain"),
    Peer("JAX by hand, 1 device", "by_hand", against=OURS["1 device"]),
    torch_peer("PyTorch, eager", "torch_single", "1 device", layout="eager"),
    torch_peer("PyTorch, torch.compile", "torch_single", "1 device", layout="compile"),
    Peer(OURS["2 devices"], "with_shardtrain", 2),
    torch_peer("PyTorch DDP, 2 processes", "torch_ddp", "2 devices", num_devices=2),
    Peer(OURS["2, FSDP"], "with_shardtrain", 2, "fsdp"),
    torch_peer("PyTorch FSDP2, 2 processes", "torch_fsdp2", "2, FSDP", num_devices=2),
    Peer(OURS["8 devices, FSDP"], "with_shardtrain", 8, "fsdp"),
    Peer("JAX by hand, 8 devices, FSDP", "by_hand", 8, "fsdp", OURS["8 devices, FSDP"]),
    *framework_peers("Kauldron", "with_kauldron", "kauldron"),
    *framework_peers("MaxText", "with_maxtext", "maxtext"),
    torch_peer(
        "torchtitan, 2 processes",
        "with_torchtitan",
        "2, FSDP",
        num_devices=2,
        package="torchtitan",
        own_weights=True,
    ),
)


@dataclass
class Running:
    """The processes of a peer, and what they told.

    Args:
      peer: Which.
      processes: One, or one per device.
      first: Answer of each process after its first step.
      seconds: Per step, one per turn.
      peak_bytes: Of all its processes together.
    """

    peer: Peer
    processes: list[subprocess.Popen[str]]
    first: list[dict[str, Any]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def turn(self, num_steps: int) -> None:
        """Run some steps; the slowest process counts."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(f"{num_steps}\n")
            process.stdin.flush()
        told = [_read(p) for p in self.processes]
        self.seconds.append(max(t["seconds"] for t in told) / num_steps)
        self.peak_bytes = sum(t["peak_bytes"] for t in told)

    def stop(self) -> None:
        """End the processes; they stop by themselves when their input ends."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()


class PeerError(Exception):
    """A peer does not run here."""


def _read(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        process.wait()
        raise PeerError(f"its process ended with code {process.returncode}")
    return json.loads(line)


def free_port() -> int:
    """A port for a rendezvous on this machine."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def start(peer: Peer, run: "Run") -> Running:
    """Start a peer and wait for its first step.

    Raises:
      PeerError: It does not run; the last thing it said.
    """
    python, source = run.interpreters.get(peer.package, (sys.executable, None))
    environment = dict(os.environ, PYTHONUNBUFFERED="1", MASTER_ADDR="127.0.0.1")
    environment |= {"MASTER_PORT": str(free_port()), "WORLD_SIZE": str(peer.processes)}
    paths = [str(HERE.parent), *([source] if source else []), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    threads = max(1, len(run.cores) // peer.processes)
    environment |= {"OMP_NUM_THREADS": str(threads)} if peer.framework == "torch" else {}
    spec = run.spec | dataclasses.asdict(peer) | {"threads": threads, "started": time.time()}
    command = [python, str(HERE / "peers_worker.py"), json.dumps(spec)]
    logs = [run.directory / f"{peer.script}-{peer.layout}-{i}.log" for i in range(peer.processes)]
    running = Running(peer, [])
    for rank, log in enumerate(logs):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with log.open("w") as said:
            running.processes.append(
                subprocess.Popen(
                    command,
                    env=environment | ranks,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=said,
                    text=True,
                )
            )
    try:
        running.first = [_read(p) for p in running.processes]
    except PeerError as error:
        running.stop()
        raise PeerError(_last_words(logs) or str(error)) from error
    return running


def _last_words(logs: list[Path]) -> str:
    lines = [x.strip() for log in logs for x in log.read_text().splitlines() if x.strip()]
    errors = [x for x in lines if "Error" in x.split(":")[0]]
    return (errors or lines or [""])[-1][:300]


@dataclass(frozen=True)
class Run:
    """What all peers of a run share."""

    spec: dict[str, Any]
    directory: Path
    cores: tuple[int, ...]
    interpreters: dict[str, tuple[str, str | None]]


def lines_of(script: str) -> int:
    """Lines that a user writes: no blank lines, comments or docstring."""
    text = (HERE / "peers_scripts" / f"{script}.py").read_text()
    body = ast.parse(text).body
    after = body[0].end_lineno if isinstance(body[0], ast.Expr) else 0
    lines = [line.strip() for line in text.splitlines()[after:]]
    return sum(bool(line) and not line.startswith("#") for line in lines)


def check(programs: list[Running]) -> None:
    """The same model, weights and batch, or the ratios mean nothing.

    Raises:
      SystemExit: Another number of parameters or another first loss than by hand.
    """
    base = next(p for p in programs if p.peer.script == "by_hand").first[0]
    for program in programs:
        if program.peer.own_weights:
            continue
        loss = statistics.fmean(f["loss"] for f in program.first)
        off = abs(loss - base["loss"]) / base["loss"]
        if off > FIRST_LOSS[program.peer.framework]:
            raise SystemExit(f"{program.peer.name}: first loss {loss}, by hand {base['loss']}")
    for program in programs:
        if program.first[0]["parameters"] != base["parameters"]:
            raise SystemExit(
                f"{program.peer.name}: {program.first[0]['parameters']} parameters, by hand "
                f"{base['parameters']}"
            )


def row_of(program: Running, ours: Running | None, tokens: int) -> dict[str, Any]:
    """What the table says of one program."""
    first = program.first
    row = {
        "name": program.peer.name,
        "against": program.peer.against,
        "tokens_per_second": tokens / statistics.median(program.seconds),
        "peak_bytes": program.peak_bytes,
        "seconds_to_first_step": max(f["seconds_to_first_step"] for f in first),
        "cpu_seconds_to_first_step": sum(f["cpu_seconds_to_first_step"] for f in first),
        "lines": lines_of(program.peer.script),
        "parameters": first[0]["parameters"],
        "first_loss": statistics.fmean(f["loss"] for f in first),
        "own_weights": program.peer.own_weights,
        "shardings": first[0]["shardings"],
        "versions": first[0]["versions"],
        "step_seconds": program.seconds,
    }
    if ours is not None:
        ratios = [b / a for a, b in zip(ours.seconds, program.seconds, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        row |= {"ratio": middle, "ratio_quartiles": [low, high]}
    return row


def measure(run: Run, peers: tuple[Peer, ...], rounds: int, steps: int) -> dict[str, Any]:
    """Start all, let them take turns, and say what was seen."""
    programs: list[Running] = []
    absent: dict[str, str] = {}
    try:
        for peer in peers:
            try:
                programs.append(start(peer, run))
                print(f"{peer.name}: {programs[-1].first[0]}", flush=True)
            except PeerError as error:
                absent[peer.name] = f"{peer.name} does not run here: {error}"
                print(absent[peer.name], flush=True)
        check(programs)
        for number in range(rounds + 1):
            for program in programs if number % 2 else reversed(programs):
                program.turn(steps)
        for program in programs:
            del program.seconds[0]  # the first round only warms up
    finally:
        for program in programs:
            program.stop()
    tokens = run.spec["batch"] * run.spec["sequence"]
    named = {p.peer.name: p for p in programs}
    rows = [row_of(p, named.get(p.peer.against or ""), tokens) for p in programs]
    return {"rows": rows, "absent": absent}


def environment(cores: tuple[int, ...]) -> dict[str, Any]:
    """When and where."""
    cpu = Path("/proc/cpuinfo")
    text = cpu.read_text() if cpu.exists() else ""
    names = [x.split(":")[1].strip() for x in text.splitlines() if x.startswith("model name")]
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "chip": names[0] if names else platform.processor(),
        "cores": len(cores),
        "load_at_start": os.getloadavg()[0],
        "platform": platform.platform(),
    }


def interpreters(given: list[str]) -> dict[str, tuple[str, str | None]]:
    """What `--from NAME=PYTHON[:SOURCE]` says: package -> (interpreter, checkout or None)."""
    found = {}
    for text in given:
        package, _, where = text.partition("=")
        python, _, source = where.partition(":")
        found[package] = (python, source or None)
    return found


def make_weights(run: Run) -> None:
    """The initial values that the PyTorch programs load."""
    worker = [sys.executable, str(HERE / "peers_worker.py")]
    paths = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [*worker, json.dumps(run.spec | {"script": "weights"})],
        env={**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"},
        check=True,
    )


def use_cores(count: int | None) -> tuple[int, ...]:
    """Hold this process and all it starts to some cores."""
    if not hasattr(os, "sched_getaffinity"):
        return tuple(range(os.cpu_count() or 1))
    cores = sorted(os.sched_getaffinity(0))[:count]
    os.sched_setaffinity(0, cores)
    return tuple(cores)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, and write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20, help="turns that count, per program")
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn")
    parser.add_argument("--batch", type=int, default=16, help="sequences per step")
    parser.add_argument("--sequence", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--toy", action="store_true", help="a tiny model, for a test")
    parser.add_argument("--cores", type=int, help="cores to hold all programs to")
    parser.add_argument(
        "--only", nargs="+", default=[], help="packages beside jax: torch kauldron ..."
    )
    parser.add_argument("--from", dest="where", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    args = parser.parse_args(arguments)
    cores = use_cores(args.cores)
    chosen = tuple(p for p in PEERS if not args.only or p.package in {"jax", *args.only})
    config = TOY if args.toy else SMALL
    with tempfile.TemporaryDirectory() as directory:
        spec = {"config": config, "batch": args.batch, "sequence": args.sequence}
        spec["weights"] = str(Path(directory, "weights.npz"))
        run = Run(spec, Path(directory), cores, interpreters(args.where))
        found = environment(cores) | {"rounds": args.rounds, "steps_per_turn": args.steps}
        found |= {"config": config, "batch": args.batch, "sequence": args.sequence}
        make_weights(run)
        found |= measure(run, chosen, args.rounds, args.steps)
    print(table(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if args.png:
        draw(found, args.png)
    return found


if __name__ == "__main__":
    main()
