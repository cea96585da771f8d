"""Which process am I, of how many, and which devices are mine? Read from the environment only.

Detected, first match wins: arguments of our own launcher, Open MPI, SLURM (`srun`), Kubernetes
JobSet, GKE TPU slices, else a single process. Counts that do not add up are an error, because the
usual outcome is n trainings of the same model side by side, or seven idle accelerators.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from shardtrain.errors import DistributedError
from shardtrain.launch.gpus import select_gpus
from shardtrain.launch.slurm import first_host, tasks_per_node
from shardtrain.monitoring.progress import PROCESS_INDEX_VARIABLE

PROCESS_COUNT_VARIABLE = "SHARDTRAIN_PROCESS_COUNT"
COORDINATOR_VARIABLE = "SHARDTRAIN_COORDINATOR"
DEVICES_VARIABLE = "SHARDTRAIN_DEVICES_PER_PROCESS"
DEFAULT_PORT = 8476

_TITLES = {
    "launcher": "shardtrain launch",
    "openmpi": "Open MPI",
    "slurm": "SLURM",
    "jobset": "Kubernetes JobSet",
    "tpu": "GKE TPU slice",
    "arguments": "arguments",
    "single": "single process",
}


@dataclass(frozen=True)
class ProcessLayout:
    """The place of this process in the run. `print` it: it is one sentence.

    Attributes:
      process_index: 0 ... process_count - 1.
      process_count: processes in the whole run.
      coordinator: "host:port" where process 0 listens; None for a single process.
      devices_per_process: accelerators this process drives; None where only JAX knows.
      source: "launcher", "openmpi", "slurm", "jobset", "tpu", "arguments" or "single".
      host_count: machines, None where unknown.
      on_first_host: whether this process shares a machine with process 0, None where unknown.
      local_device_ids: accelerators to select among the visible ones; None for all.
    """

    process_index: int
    process_count: int
    coordinator: str | None
    devices_per_process: int | None
    source: str
    host_count: int | None = None
    on_first_host: bool | None = None
    local_device_ids: tuple[int, ...] | None = None

    def __str__(self) -> str:
        title = _TITLES[self.source]
        if self.process_count == 1:
            return f"{title}: one process drives all its devices"
        hosts = f" on {self.host_count} hosts" if (self.host_count or 1) > 1 else ""
        devices = ""
        if self.devices_per_process:
            total = self.devices_per_process * self.process_count
            devices = f", each drives {self.devices_per_process} devices ({total} total)"
        return (
            f"{title}: {self.process_count} processes{hosts}{devices}; this is process "
            f"{self.process_index}, coordinator {self.coordinator}"
        )


def detect_layout(
    environ: Mapping[str, str] = os.environ, *, visible_gpus: int | None = None
) -> ProcessLayout:
    """Read the layout from environment variables. Pure: looks at nothing else.

    Args:
      environ: the environment.
      visible_gpus: GPUs of this host, used where `CUDA_VISIBLE_DEVICES` says nothing.

    Raises:
      DistributedError: variables are missing, not numbers, or their counts do not add up.

    Example:
      >>> str(detect_layout({}))
      'single process: one process drives all its devices'
    """
    variables = _Variables(environ, visible_gpus)
    if PROCESS_COUNT_VARIABLE in environ:
        layout = _launcher(variables)
    elif "OMPI_COMM_WORLD_SIZE" in environ:
        layout = _openmpi(variables)
    elif "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ:
        layout = _slurm(variables)
    elif "KUBERNETES_SERVICE_HOST" in environ and "TPU_WORKER_HOSTNAMES" in environ:
        layout = _tpu(variables)
    elif "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        layout = _jobset(variables)
    else:
        _refuse_slurm_without_srun(variables)
        return ProcessLayout(0, 1, None, None, "single", 1, True)
    if not 0 <= layout.process_index < layout.process_count:
        raise DistributedError(
            f"{_TITLES[layout.source]} says this is process {layout.process_index} of "
            f"{layout.process_count}: indices run from 0 to {layout.process_count - 1}"
        )
    return layout


@dataclass(frozen=True)
class _Variables:
    environ: Mapping[str, str]
    visible_gpus: int | None

    def integer(self, name: str, default: int | None = None) -> int:
        text = self.environ.get(name)
        if text is None and default is not None:
            return default
        if text is None or not text.strip().isdigit():
            raise DistributedError(f"environment variable {name} is {text!r}, not a number")
        return int(text)

    def gpus(self) -> int | None:
        """Accelerators this process can see."""
        if self.environ.get("JAX_PLATFORMS", "").startswith(("cpu", "tpu")):
            return None
        visible = self.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is None:
            return self.visible_gpus
        return len([part for part in visible.split(",") if part.strip()])

    def coordinator(self, host: str, port: int) -> str:
        return self.environ.get("JAX_COORDINATOR_ADDRESS") or f"{host}:{port}"


def _launcher(v: _Variables) -> ProcessLayout:
    count = v.integer(PROCESS_COUNT_VARIABLE)
    devices = v.integer(DEVICES_VARIABLE) if v.environ.get(DEVICES_VARIABLE) else None
    coordinator = v.environ.get(COORDINATOR_VARIABLE)
    index = v.integer(PROCESS_INDEX_VARIABLE)
    return ProcessLayout(index, count, coordinator, devices, "launcher", 1, True)


def _openmpi(v: _Variables) -> ProcessLayout:
    count, index = v.integer("OMPI_COMM_WORLD_SIZE"), v.integer("OMPI_COMM_WORLD_RANK")
    local_count = v.integer("OMPI_COMM_WORLD_LOCAL_SIZE")
    one_host = local_count == count
    explicit = v.environ.get("JAX_COORDINATOR_ADDRESS")
    if count > 1 and not one_host and not explicit:
        raise DistributedError(
            f"Open MPI: {count} processes on several hosts, but mpirun does not tell where process "
            "0 runs. Name its host: mpirun -x JAX_COORDINATOR_ADDRESS=$(hostname -f):"
            f"{DEFAULT_PORT} ... python train.py"
        )
    lines = ("mpirun --map-by ppr:1:node python train.py", "mpirun --map-by ppr:{gpus}:node ...")
    local_index = v.integer("OMPI_COMM_WORLD_LOCAL_RANK")
    ids = select_gpus(v.gpus(), None, local_index, local_count, "Open MPI", lines)
    # A port from the job's name, so that two jobs on one host do not meet.
    job = v.environ.get("OMPI_MCA_ess_base_jobid") or v.environ.get("PMIX_NAMESPACE", "")
    coordinator = v.coordinator("127.0.0.1", _port(sum(job.encode())))
    return ProcessLayout(
        index,
        count,
        coordinator,
        len(ids) if ids else v.gpus(),
        "openmpi",
        host_count=1 if one_host else None,
        on_first_host=True if one_host or index == 0 else None,
        local_device_ids=ids,
    )


def _slurm(v: _Variables) -> ProcessLayout:
    count, index = v.integer("SLURM_STEP_NUM_TASKS"), v.integer("SLURM_PROCID")
    hosts, node = v.integer("SLURM_STEP_NUM_NODES", 1), v.integer("SLURM_NODEID", 0)
    tasks = tasks_per_node(v.environ.get("SLURM_STEP_TASKS_PER_NODE", str(count)))
    if len(tasks) != hosts or sum(tasks) != count or node >= hosts:
        raise DistributedError(
            f"SLURM: {hosts} nodes and {count} tasks do not fit the tasks per node {list(tasks)}"
        )
    lines = (
        f"srun --nodes={hosts} --ntasks-per-node=1 --gpus-per-node={{gpus}} python train.py",
        f"srun --nodes={hosts} --ntasks-per-node={{gpus}} --gpus-per-node={{gpus}} python train.py",
    )
    on_node = v.integer("SLURM_GPUS_ON_NODE", 0) or None
    ids = select_gpus(v.gpus(), on_node, v.integer("SLURM_LOCALID", 0), tasks[node], "SLURM", lines)
    first = first_host(v.environ.get("SLURM_STEP_NODELIST", "127.0.0.1"))
    port = _port(v.integer("SLURM_JOB_ID", 0) * 31 + v.integer("SLURM_STEP_ID"))
    return ProcessLayout(
        index,
        count,
        v.coordinator(first, port) if count > 1 else None,
        len(ids) if ids else v.gpus(),
        "slurm",
        host_count=hosts,
        on_first_host=node == 0,
        local_device_ids=ids,
    )


def _jobset(v: _Variables) -> ProcessLayout:
    needed = ("JOBSET_NAME", "REPLICATED_JOB_NAME", "JOB_INDEX", "REPLICAS", "PODS_PER_JOB")
    if missing := [name for name in needed if not v.environ.get(name)]:
        raise DistributedError(
            f"Kubernetes: an indexed job, but {', '.join(missing)} not set, so the number of "
            "processes is unknown. Set them in the pod template from the JobSet annotations as "
            "docs/multi-host.md shows, or pass process_count, process_index and coordinator to "
            "st.init_distributed()."
        )
    pods = v.integer("PODS_PER_JOB")
    count = pods * v.integer("REPLICAS")
    index = v.integer("JOB_INDEX") * pods + v.integer("JOB_COMPLETION_INDEX")
    jobset, job = v.environ["JOBSET_NAME"], v.environ["REPLICATED_JOB_NAME"]
    coordinator = v.coordinator(f"{jobset}-{job}-0-0.{jobset}", DEFAULT_PORT)
    return ProcessLayout(index, count, coordinator, v.gpus(), "jobset", count, index == 0)


def _tpu(v: _Variables) -> ProcessLayout:
    workers = [name for name in v.environ["TPU_WORKER_HOSTNAMES"].split(",") if name.strip()]
    slices, slice_index = v.integer("MEGASCALE_NUM_SLICES", 1), v.integer("MEGASCALE_SLICE_ID", 0)
    count = len(workers) * slices
    index = slice_index * len(workers) + v.integer("TPU_WORKER_ID", 0)
    host = v.environ.get("MEGASCALE_COORDINATOR_ADDRESS", workers[0]).split(":")[0]
    coordinator = v.coordinator(host, DEFAULT_PORT) if count > 1 else None
    return ProcessLayout(index, count, coordinator, None, "tpu", count, index == 0)


def _refuse_slurm_without_srun(v: _Variables) -> None:
    tasks = v.environ.get("SLURM_NTASKS", "1")
    if "SLURM_JOB_ID" in v.environ and tasks.isdigit() and int(tasks) > 1:
        raise DistributedError(
            f"SLURM allocated {tasks} tasks, but this process was not started by srun and would "
            "train alone. Start all of them:\n  srun python train.py\nor, for one process on this "
            "node only:\n  srun --nodes=1 --ntasks=1 python train.py"
        )


def _port(number: int) -> int:
    return 61440 + number % 4096
