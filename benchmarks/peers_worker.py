"""One process of `peers.py`: builds a program, runs its first step, then steps when told to.

Reads a JSON description from its command line, then one number of steps per line from stdin;
answers each with a line of JSON. Nothing of it counts as lines that a user writes.
"""

import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

SCRIPTS = Path(__file__).parent / "peers_scripts"


def make_batch(spec: dict[str, Any]) -> dict[str, np.ndarray]:
    """The one batch that every program trains on."""
    random = np.random.default_rng(0)
    shape = (spec["batch"], spec["sequence"] + 1)
    tokens = random.integers(0, spec["config"]["vocab_size"], shape, dtype=np.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}


def peak_bytes() -> int:
    """The most memory this process held, from when it started its own program."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class JaxProgram:
    """A script whose state is a pytree of JAX arrays."""

    def __init__(self, spec: dict[str, Any]):
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # a start that finds nothing
        if spec["num_devices"] > 1:
            os.environ.setdefault("NPROC", str(8 * spec["num_devices"]))
        import jax

        from shardtrain.models import DecoderConfig

        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", spec["num_devices"])
        self.jax = jax
        self.batch = make_batch(spec)
        script = importlib.import_module(spec["script"])
        config = DecoderConfig(**spec["config"])
        self.state, self.step, *found = script.start(
            config, self.batch, spec["num_devices"], spec["layout"]
        )
        params = found[0] if found else getattr(self.state, "params", None)
        params = self.state[0] if params is None else params
        self.parameters = sum(x.size for x in jax.tree.leaves(params))
        self.shardings = sorted({str(x.sharding.spec) for x in jax.tree.leaves(params)})
        self.versions = {"jax": jax.__version__}

    def run(self, num_steps: int) -> float:
        for _ in range(num_steps):
            self.state, loss = self.step(self.state, self.batch)
        self.jax.block_until_ready((self.state, loss))
        return float(loss)


class TorchProgram:
    """A script whose state changes in place."""

    def __init__(self, spec: dict[str, Any]):
        os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
        import torch

        torch.set_num_threads(spec["threads"])
        self.batch = {k: torch.from_numpy(v).long() for k, v in make_batch(spec).items()}
        config = SimpleNamespace(**spec["config"], weights=dict(np.load(spec["weights"])))
        script = importlib.import_module(spec["script"])
        self.state, self.step = script.start(
            config, self.batch, spec["num_devices"], spec["layout"]
        )
        self.parameters = sum(x.numel() for x in self.state.parameters())
        self.shardings: list[str] = []
        self.versions = {"torch": torch.__version__}

    def run(self, num_steps: int) -> float:
        for _ in range(num_steps):
            self.state, loss = self.step(self.state, self.batch)
        return float(loss)


def write_weights(spec: dict[str, Any]) -> None:
    """The initial values of the Flax decoder, "blocks/0/mlp/up/kernel" -> array."""
    import jax
    from flax import nnx

    from shardtrain.models import Decoder, DecoderConfig

    model = Decoder(DecoderConfig(**spec["config"]), rngs=nnx.Rngs(0))
    values = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    flat = jax.tree_util.tree_leaves_with_path(values)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    np.savez(spec["weights"], **{name(path): np.asarray(x) for path, x in flat})


def answer(line: dict[str, Any], out: Any) -> None:
    out.write(json.dumps(line) + "\n")
    out.flush()


def serve(program: Any, out: Any) -> None:
    for line in sys.stdin:
        start = time.perf_counter()
        loss = program.run(int(line))
        seconds = time.perf_counter() - start
        answer({"seconds": seconds, "loss": loss, "peak_bytes": peak_bytes()}, out)


def main() -> None:
    spec = json.loads(sys.argv[1])
    sys.path.insert(0, str(SCRIPTS))
    if spec["script"] == "weights":
        write_weights(spec)
        return
    # What a library prints must not be taken for an answer.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    frameworks: dict[str, Callable[..., Any]] = {"jax": JaxProgram, "torch": TorchProgram}
    program = frameworks[spec["framework"]](spec)
    loss = program.run(1)
    first = {
        "seconds_to_first_step": time.time() - spec["started"],
        "cpu_seconds_to_first_step": time.process_time(),
        "loss": loss,
        "parameters": program.parameters,
        "shardings": program.shardings,
        "versions": {"python": sys.version.split()[0], **program.versions},
    }
    answer(first, out)
    serve(program, out)


if __name__ == "__main__":
    main()
