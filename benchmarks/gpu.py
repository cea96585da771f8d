"""How close the full training step of a decoder comes to one GPU's limit, beside its peers.

    python benchmarks/gpu.py                          # one H100 or H200, under 8 minutes
    python benchmarks/gpu.py --only 3B-4096 --continue            # one more case into the results
    python benchmarks/gpu.py --torch /venv/bin/python             # PyTorch from elsewhere
    python benchmarks/gpu.py --toy                    # the same on a CPU at toy size
    python benchmarks/gpu.py --deviceless             # real GPU compiler, no GPU; the `cuda` extra

For each shape: the AdamW step through `st.plan` and the same step written by hand in JAX take turns
in one process; then PyTorch (compiled, flash attention) runs the same shape. Every program has a
process of its own, so one that runs out of memory takes nothing with it. The most telling cases run
first; what `--budget-minutes` leaves no time for is named. Results are written after every case.

JAX is what the running Python has (0.10 on the `cuda` extra, or newer with CUDA 13). FP8 needs
`pip install qwix` and is left out with a sentence where it is missing.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"


@dataclass(frozen=True)
class Job:
    """One process: a case in one framework.

    Args:
      framework: "jax" (through the plan and by hand) or "torch".
      case: Fields of `gpu_cases.Case`.
      least_s: A job with less time left is not started.
    """

    framework: str
    case: dict[str, Any]
    least_s: float = 45.0

    @property
    def key(self) -> str:
        """Names the job in results and in `--only`."""
        parts = [f"{self.case['shape']}-{self.case['length']}"]
        parts += [self.case["layers"]] if "layers" in self.case else []
        parts += ["fp8"] if self.case.get("precision") == "fp8" else []
        return "-".join(parts) + (" torch" if self.framework == "torch" else "")


def jobs() -> list[Job]:
    """All of them, the most telling first."""
    both = lambda shape, length: [
        Job("jax", {"shape": shape, "length": length}),
        Job("torch", {"shape": shape, "length": length}),
    ]
    unrolled = Job("jax", {"shape": "3B", "length": 4096, "layers": "unrolled"}, 90.0)
    auto = Job("jax", {"shape": "3B", "length": 4096, "layers": "auto"})
    fp8 = Job("jax", {"shape": "3B", "length": 4096, "precision": "fp8", "xla": "cublas"})
    first = [*both("3B", 4096), *both("8B", 4096), fp8, unrolled, *both("1B", 4096), auto]
    rest = [job for s in ("3B", "1B", "8B") for job in both(s, 8192)]
    return [*first, *rest, *both("0.5B", 4096), *both("0.5B", 8192)]


def toy_jobs() -> list[Job]:
    """The same kinds at a size for a CPU."""
    case = {"shape": "toy", "length": 64}
    unrolled = Job("jax", {**case, "layers": "unrolled"})
    return [Job("jax", case), Job("torch", case), unrolled]


def skip_reason(job: Job, torch_python: str) -> str:
    """Why a job cannot run here; "" where it can be tried."""
    if job.framework == "torch":
        if not shutil.which(torch_python):
            return f"{torch_python} is not a Python (see --torch)"
        found = subprocess.run([torch_python, "-c", "import torch"], capture_output=True)
        return "" if not found.returncode else "PyTorch is not installed here (see --torch)"
    if job.case.get("precision") == "fp8" and importlib.util.find_spec("qwix") is None:
        return "FP8 needs the package qwix"
    return ""


def request_of(job: Job, options: argparse.Namespace, done: dict[str, Any]) -> dict[str, Any]:
    """What the worker reads. PyTorch gets the rows and recomputation chosen for JAX."""
    base: dict[str, Any] = {
        "toy": options.toy,
        "tokens": [256, 128] if options.toy else [32_768, 16_384, 8_192],
        "rounds": options.rounds,
        "steps": options.steps,
        "cache": str(options.cache),
        "case": job.case,
    }
    if job.framework == "torch":
        same = done.get(job.key.removesuffix(" torch"))
        if same is None:
            raise LookupError("its shape was not measured in JAX, which chooses the batch")
        base["config"], base["model_flops"] = same["config"], same["model_flops"]
        base["case"] = same["case"]
        base["peak"] = same["peak_flops"]
    return base


def run_job(
    job: Job, options: argparse.Namespace, done: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """The worker's record, or `{"left_out": why}`."""
    script, python = ("gpu_steps.py", sys.executable)
    if job.framework == "torch":
        script, python = ("gpu_torch.py", options.torch)
    environment = dict(os.environ)
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in environment:  # its older name; both are an error
        environment.setdefault("XLA_CLIENT_MEM_FRACTION", "0.95")
    if options.toy:
        environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    try:
        request = request_of(job, options, done)
    except LookupError as error:
        return {"left_out": str(error)}
    with tempfile.TemporaryDirectory() as directory:
        asked, answer = Path(directory, "request.json"), Path(directory, "result.json")
        asked.write_text(json.dumps(request))
        command = [python, str(HERE / script), str(asked), str(answer)]
        try:
            ended = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            return {"left_out": f"took longer than the {seconds:.0f} s that were left"}
        if not answer.exists():
            lines = [line for line in ended.stderr.strip().splitlines() if line.strip()]
            return {"left_out": f"failed: {' '.join(lines[-3:])[-400:]}"}
        return json.loads(answer.read_text())


def run_all(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Job after job while there is time; writes the results after each."""
    end = time.monotonic() + 60 * options.budget_minutes
    done: dict[str, Any] = results.setdefault("jobs", {})
    for job in toy_jobs() if options.toy else jobs():
        if options.only and job.key not in options.only:
            continue
        if options.continue_ and "left_out" not in done.get(job.key, {"left_out": ""}):
            continue
        left = end - time.monotonic()
        why = skip_reason(job, options.torch)
        if not why and left < job.least_s:
            why = f"no time left in {options.budget_minutes:g} minutes (--continue runs it)"
        started = time.monotonic()
        measured = {k: v for k, v in done.items() if "left_out" not in v}
        record = {"left_out": why} if why else run_job(job, options, measured, left)
        record["wall_s"] = round(time.monotonic() - started, 1)
        done[job.key] = record
        print(describe(job.key, record), flush=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def describe(key: str, record: dict[str, Any]) -> str:
    """A line per program."""
    if "left_out" in record:
        return f"{key}: left out, {record['left_out']}"
    rows = record.get("programs", {"PyTorch": record})
    lines = []
    for name, row in rows.items():
        mfu = f", {row['mfu']:.1%} MFU" if row["mfu"] else ""
        held = f", peak {row['peak_bytes'] / 2**30:.1f} GiB" if row["peak_bytes"] else ""
        speed = f"{row['tokens_per_s']:,.0f} tokens/s"
        lines.append(f"{key} {name}: {speed}{mfu}{held}")
    return "\n".join(lines)


def environment() -> dict[str, Any]:
    """Date and versions."""
    versions = {}
    for name in ("jax", "jaxlib", "flax", "optax", "qwix"):
        spec = importlib.util.find_spec(name)
        if spec is not None:
            versions[name] = importlib.metadata.version(name)
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "versions": versions,
        "flops": "6 per token and matmul parameter + causal attention; see gpu_cases.py",
    }


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="tiny shapes, on the CPU")
    parser.add_argument("--deviceless", action="store_true", help="compile only, without a GPU")
    parser.add_argument("--budget-minutes", type=float, default=8.0)
    parser.add_argument("--only", nargs="+", default=[], help="keys of jobs, e.g. 3B-4096")
    parser.add_argument("--continue", dest="continue_", action="store_true")
    parser.add_argument("--torch", default=sys.executable, help="a Python that has PyTorch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="per round")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir(), "gpu-cache"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    options = parser.parse_args(given)
    kind = "gpu_deviceless" if options.deviceless else "gpu_toy" if options.toy else "gpu"
    # A toy run proves that all of it works; its figures are not worth keeping.
    folder = Path(tempfile.gettempdir()) if options.toy else RESULTS
    options.json = options.json or folder / f"{kind}.json"
    options.png = options.png or options.json.with_suffix(".png")
    return options


def main(given: list[str] | None = None) -> None:
    options = arguments(given)
    if options.deviceless:
        os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX starts: it then keeps the CUDA plugin
        import gpu_deviceless

        found = json.loads(options.json.read_text()) if options.continue_ else {}
        for part in gpu_deviceless.run(options.only):
            found |= environment() | part
            options.json.write_text(json.dumps(found, indent=1) + "\n")
        return
    results: dict[str, Any] = {}
    if options.continue_ and options.json.exists():
        results = json.loads(options.json.read_text())
    results |= environment() | {"toy": options.toy}
    run_all(options, results)
    import gpu_figure

    gpu_figure.draw(results, options.png)
    print(gpu_figure.table(results))
    print(f"written: {options.json}, {options.png}")


if __name__ == "__main__":
    main()
