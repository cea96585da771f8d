"""A worker that imports no JAX: `fake.py SCRATCH behaviour...`, one behaviour per generation.

Each behaviour is `name@process`; the last one repeats. All other processes run `steps` and then
wait at a barrier for everybody, as a collective would.
"""

import importlib
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

ROOT = pathlib.Path(__file__).resolve().parent.parent
for name in ("shardtrain", "shardtrain.monitoring"):  # without their __init__, which import JAX
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [str(ROOT.joinpath(*name.split(".")))]
Progress = importlib.import_module("shardtrain.monitoring.progress").Progress

scratch = pathlib.Path(sys.argv[1])
index = int(os.environ["SHARDTRAIN_PROCESS_INDEX"])
count = int(os.environ["SHARDTRAIN_PROCESS_COUNT"])
directory = pathlib.Path(os.environ["SHARDTRAIN_RUN_DIRECTORY"])
number = int(directory.name.split("-")[1])
behaviours = sys.argv[2:] or ["none@0"]
behaviour, _, who = behaviours[min(number, len(behaviours) - 1)].partition("@")
(scratch / f"pid-{os.getpid()}").touch()
progress = Progress.from_environment()
print(f"generation {number} process {index} of {count}")


def child():
    process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    (scratch / f"pid-{process.pid}").touch()


class Preempted(SystemExit):
    pass


def on_sigterm(*_):
    raise Preempted(42)


if behaviour == "lost":
    if str(index) == who:
        progress.phase("data", 1)
        (scratch / "stopping").touch()
        os.kill(os.getpid(), signal.SIGSTOP)
    while not (scratch / "stopping").exists():
        time.sleep(0.01)
    sys.exit(17)


def save_slowly(*_):
    time.sleep(1.0)
    (scratch / f"saved-{index}").touch()
    raise Preempted(42)


if behaviour == "half-preemptible" and str(index) == who:
    signal.signal(signal.SIGTERM, save_slowly)
if behaviour == "preemptible":
    signal.signal(signal.SIGTERM, on_sigterm)
if behaviour.endswith("preemptible"):
    (scratch / f"ready-{index}").touch()
    while True:
        time.sleep(0.01)
if behaviour == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child()
    (scratch / f"ready-{index}").touch()
    time.sleep(600)

for step in range(3):
    progress.phase("data", step)
    if step == 2 and str(index) == who:
        if behaviour == "kill":
            (scratch / f"killed-{number}").write_text(repr(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        if behaviour == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if behaviour == "raise":
            raise ValueError("boom at step 2")
        if behaviour == "sleep":
            time.sleep(600)
        if behaviour == "exit3":
            sys.exit(3)
        if behaviour == "child":
            child()
    progress.phase("wait", step)
    (directory / f"arrived-{step}-{index}").touch()
    while len(list(directory.glob(f"arrived-{step}-*"))) < count:
        time.sleep(0.01)
progress.phase("done")
