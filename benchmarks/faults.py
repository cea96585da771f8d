"""Fault campaign: damage a supervised two-process run again and again, compare with a clean one.

    python benchmarks/faults.py --faults 200 --json faults.json

Each run is one `launch` of `faults_worker.py`; each of its generations gets one fault, drawn at
random: kill -9 of a process in any phase, kill during a save, SIGSTOP, a process that sleeps, an
exception, a full disk, one flipped bit, a truncated or deleted checkpoint file, a slow process,
gradients that are not finite on one process, a host that loses its memory. Every other run takes
snapshots in memory too.
A run counts as recovered if it ends with code 0, every loss it ever reported equals the clean run's
bit for bit, and so does the fingerprint of its final state. The clean run of one that left out bad
batches leaves out the same. The JSON file is written after every run; where it exists, the campaign
goes on from it.
"""

import argparse
import collections
import itertools
import json
import os
import pathlib
import random
import statistics
import sys
import tempfile
import time

from shardtrain.launch import launch

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORKER = pathlib.Path(__file__).with_name("faults_worker.py")
SAVE_EVERY = 2
STEPS_PER_FAULT = 3
HANG_TIMEOUTS = {
    "dist_init": 90.0,
    "restore": 120.0,
    "first_step": 120.0,
    "data": 8.0,
    "dispatch": 8.0,
    "wait": 8.0,
    "ckpt": 30.0,
}
ONLY_DISTURBS = ("slow", "disk", "nan")  # these do not end a generation
STEP_PHASES = ("data", "dispatch", "wait", "ckpt")
START_PHASES = ("import", "dist_init", "restore", "first_step")
KINDS = {  # how often each is drawn
    "kill": 48,
    "kill in save": 14,
    "raise": 7,
    "stop": 5,
    "sleep": 4,
    "flip": 6,
    "truncate": 4,
    "delete": 4,
    "disk": 4,
    "slow": 4,
    "nan": 6,
    "lost host": 4,
}


def num_steps(faults):
    """Long enough for every fault to strike at a later step than the one before."""
    return STEPS_PER_FAULT * (faults + 1) + 2


def draw_generation(draw, number, kind):
    """The faults of one generation; the last one ends it."""
    step = STEPS_PER_FAULT * number + draw.randrange(STEPS_PER_FAULT)

    def fault(kind, phase, step, delay=0.0):
        return {
            "kind": kind,
            "process": draw.randrange(2),
            "phase": phase,
            "step": step,
            "delay": delay,
            "seed": draw.randrange(2**31),
        }

    if kind == "kill":
        phase = draw.choice(START_PHASES + STEP_PHASES)
        return [fault("kill", phase, None if phase in START_PHASES else step)]
    if kind == "kill in save":
        return [fault("kill", "ckpt", step, draw.uniform(0.0, 0.3))]
    if kind in ("flip", "truncate", "delete", "lost host"):
        return [fault(kind, draw.choice(("data", "wait")), step)]
    if kind == "disk":  # the save fails; what ends the generation is that, or the kill
        return [fault("disk", "ckpt", step), fault("kill", "data", step + SAVE_EVERY + 1)]
    if kind == "nan":
        return [fault("nan", "data", step), fault("kill", "data", step + 2)]
    if kind == "slow":
        return [fault("slow", "data", step), fault("kill", "wait", step + 2)]
    return [fault(kind, "data" if kind == "raise" else draw.choice(("data", "wait")), step)]


def run(directory, schedule, steps, output="none", snapshot_every=None, skip=()):
    """One supervised run; returns its exit code and seconds."""
    directory.mkdir(parents=True)
    (directory / "schedule.json").write_text(json.dumps(schedule))
    options = {
        "num_steps": steps,
        "save_every": SAVE_EVERY,
        "snapshot_every": snapshot_every,
        "skip_steps": list(skip),
    }
    (directory / "options.json").write_text(json.dumps(options))
    started = time.time()
    code = launch(
        [sys.executable, str(WORKER), str(directory)],
        num_processes=2,
        devices_per_process=2,
        max_restarts=len(schedule) + 3,
        hang_timeouts=HANG_TIMEOUTS,
        run_directory=directory / "launch",
        output=output,
        environ={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )
    return code, time.time() - started


def timeline(directory):
    return [json.loads(line) for line in (directory / "timeline.jsonl").read_text().splitlines()]


def losses(events):
    """step -> set of all loss values (exact, as hex) any process reported in any generation."""
    found = collections.defaultdict(set)
    for event in events:
        if event["kind"] == "step":
            found[event["step"]].add(event["loss"])
    return found


def left_out(directory):
    """Steps that a run recorded as bad."""
    file = directory / "run" / "bad_steps.jsonl"
    if not file.exists():
        return ()
    return tuple(sorted({json.loads(line)["step"] for line in file.read_text().splitlines()}))


def clean_run(folder, steps, skip=()):
    """The undisturbed run that leaves out `skip`; made once."""
    directory = folder / "-".join(map(str, ["clean", *skip]))
    if not directory.exists():
        code, _ = run(directory, [], steps, skip=skip)
        if code != 0:
            raise SystemExit(f"the clean run failed with code {code}; see {directory}")
    return directory


def compare(directory, clean_directory, code):
    """What is wrong with a run; empty if it recovered."""
    wrong = [] if code == 0 else [f"exit code {code}"]
    clean, events = losses(timeline(clean_directory)), timeline(directory)
    skip = left_out(directory)
    different = [
        s for s, values in sorted(losses(events).items()) if s not in skip and values != clean[s]
    ]
    if different:
        wrong.append(f"losses differ at steps {different}")
    final = directory / "final.json"
    if not final.exists():
        wrong.append("no final state")
    elif final.read_text() != (clean_directory / "final.json").read_text():
        wrong.append("final state differs")
    return wrong


def recovery_times(events):
    """Seconds from a fault to the end of the next first step, where no other fault came between."""
    times, open_fault = [], None
    for event in sorted(events, key=lambda e: e["time"]):
        if event["kind"] == "fault" and event["fault"]["kind"] not in ONLY_DISTURBS:
            open_fault = event
        elif (
            event["kind"] == "first step done"
            and open_fault is not None
            and event["generation"] == open_fault["generation"] + 1
        ):
            times.append(event["time"] - open_fault["time"])
            open_fault = None
    return times


def quantile(values, q):
    ordered = sorted(values)
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)] if ordered else float("nan")


def step_seconds(events):
    """Median seconds per step of process 0 within a generation."""
    gaps = collections.defaultdict(list)
    for event in events:
        if event["kind"] == "step" and event["process"] == 0:
            gaps[event["generation"]].append(event["time"])
    steps = [b - a for times in gaps.values() for a, b in itertools.pairwise(times)]
    return statistics.median(steps) if steps else float("nan")


def one_run(folder, number, names, draw, steps):
    """One damaged run, compared with the clean one; the record that goes into the JSON file."""
    schedule = [draw_generation(draw, i, kind) for i, kind in enumerate(names)]
    directory = folder / f"run-{number}"
    code, seconds = run(directory, schedule, steps, snapshot_every=number % 2 or None)
    events = timeline(directory)
    clean = clean_run(folder, steps, left_out(directory))
    struck = collections.Counter(e["fault"]["kind"] for e in events if e["kind"] == "fault")
    return {
        "faults": names,
        "struck": dict(struck),
        "code": code,
        "seconds": seconds,
        "useful_seconds": steps * step_seconds(events),
        "recovery_seconds": recovery_times(events),
        "left_out": left_out(directory),
        "wrong": compare(directory, clean, code),
    }


def summary(runs):
    """What all runs so far say together."""
    times = [t for run in runs for t in run["recovery_seconds"]]
    struck = collections.Counter()
    for run in runs:
        struck.update(run["struck"])
    faults = sum(len(run["faults"]) for run in runs)
    recovery = quantile(times, 0.5)
    useful = sum(run["useful_seconds"] for run in runs)
    return {
        "faults": faults,
        "struck": dict(struck),
        "recovered_runs": sum(not run["wrong"] for run in runs),
        "recovery_median": recovery,
        "recovery_p95": quantile(times, 0.95),
        "goodput": useful / sum(run["seconds"] for run in runs),
        # If a fault cost one recovery each and nothing else did, the first start included.
        "goodput_bound": useful / (useful + recovery * (faults + len(runs))),
    }


def campaign(faults, per_run, seed, folder, kinds=None, runs=(), report=lambda runs: None):
    """Run until `faults` were scheduled, those of the earlier `runs` included.

    `report` gets all runs so far after each: a campaign takes long, and may be cut short.
    """
    runs = list(runs)
    steps = num_steps(per_run)
    clean_run(folder, steps)
    while (done := sum(len(run["faults"]) for run in runs)) < faults:
        draw = random.Random(f"{seed} {len(runs)}")
        count = min(per_run, faults - done)
        names = draw.choices(list(KINDS), weights=list(KINDS.values()), k=count)
        names = (kinds or names)[:count]
        runs.append(one_run(folder, len(runs), names, draw, steps))
        report(runs)
        print(
            f"{done + count} faults, {runs[-1]['seconds']:.0f} s: "
            f"{runs[-1]['wrong'] or 'recovered'}",
            flush=True,
        )
    return {**summary(runs), "runs": runs}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--per-run", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--folder", type=pathlib.Path)
    options = parser.parse_args()
    folder = options.folder or pathlib.Path(tempfile.mkdtemp(prefix="faults-"))
    file = options.json
    earlier = json.loads(file.read_text())["runs"] if file and file.exists() else []
    save = lambda runs: (
        file.write_text(json.dumps({**summary(runs), "runs": runs}, indent=1)) if file else None
    )
    report = campaign(
        options.faults, options.per_run, options.seed, folder, runs=earlier, report=save
    )
    wrong = [r for r in report["runs"] if r["wrong"]]
    recoveries = sum(len(r["recovery_seconds"]) for r in report["runs"])
    print(
        f"{report['faults']} faults in {len(report['runs'])} runs "
        f"({', '.join(f'{n} {k}' for k, n in sorted(report['struck'].items()))} struck): "
        f"{report['recovered_runs']} runs recovered with every loss and the final state bitwise "
        f"equal to the clean run; {len(wrong)} wrong\n"
        f"time to recover: median {report['recovery_median']:.1f} s, 95 % "
        f"{report['recovery_p95']:.1f} s over {recoveries}\n"
        f"goodput {report['goodput']:.2%} with a fault every {STEPS_PER_FAULT} steps; bound if "
        f"only recoveries cost time {report['goodput_bound']:.2%}"
    )
    print(f"everything is in {folder}")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
