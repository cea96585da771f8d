"""Layout detection: pure functions of a mapping."""

import pytest

from shardtrain.errors import DistributedError
from shardtrain.launch.environment import ProcessLayout, detect_layout


def slurm(**changes):
    environ = {
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "1",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURM_STEP_NODELIST": "gpu[007-008]",
        "SLURM_GPUS_ON_NODE": "8",
        "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
    }
    return {k: v for k, v in {**environ, **changes}.items() if v is not None}


def test_single_process():
    layout = detect_layout({"HOME": "/root"})
    assert layout == ProcessLayout(0, 1, None, None, "single", 1, True)


def test_our_launcher_wins_over_slurm():
    layout = detect_layout(
        slurm(
            SHARDTRAIN_PROCESS_INDEX="1",
            SHARDTRAIN_PROCESS_COUNT="4",
            SHARDTRAIN_COORDINATOR="127.0.0.1:9999",
            SHARDTRAIN_DEVICES_PER_PROCESS="2",
        )
    )
    assert str(layout) == (
        "shardtrain launch: 4 processes, each drives 2 devices (8 total); this is process 1, "
        "coordinator 127.0.0.1:9999"
    )


def test_slurm_one_process_per_node_drives_all_gpus():
    layout = detect_layout(slurm())
    assert layout == ProcessLayout(
        1, 2, "gpu007:64121", 8, "slurm", host_count=2, on_first_host=False
    )
    assert str(layout) == (
        "SLURM: 2 processes on 2 hosts, each drives 8 devices (16 total); this is process 1, "
        "coordinator gpu007:64121"
    )


def test_slurm_one_process_per_gpu_with_all_visible_selects_its_own():
    layout = detect_layout(
        slurm(
            SLURM_PROCID="11",
            SLURM_LOCALID="3",
            SLURM_STEP_NUM_TASKS="16",
            SLURM_STEP_TASKS_PER_NODE="8(x2)",
        )
    )
    assert (layout.local_device_ids, layout.devices_per_process) == ((3,), 1)


def test_slurm_two_processes_per_node_divide_the_gpus():
    layout = detect_layout(
        slurm(
            SLURM_PROCID="3",
            SLURM_LOCALID="1",
            SLURM_STEP_NUM_TASKS="4",
            SLURM_STEP_TASKS_PER_NODE="2(x2)",
        )
    )
    assert layout.local_device_ids == (4, 5, 6, 7)


def test_slurm_gpus_bound_to_tasks_need_no_selection():
    layout = detect_layout(
        slurm(
            SLURM_PROCID="9",
            SLURM_LOCALID="1",
            SLURM_STEP_NUM_TASKS="16",
            SLURM_STEP_TASKS_PER_NODE="8(x2)",
            CUDA_VISIBLE_DEVICES="0",
        )
    )
    assert (layout.local_device_ids, layout.devices_per_process) == (None, 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"CUDA_VISIBLE_DEVICES": "0"},  # one task, sees 1 of 8
        {"SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_TASKS_PER_NODE": "3(x2)"},  # 8 over 3
    ],
)
def test_slurm_counts_that_do_not_add_up_spell_out_both_launch_lines(changes):
    with pytest.raises(DistributedError) as caught:
        detect_layout(slurm(**changes))
    text = str(caught.value)
    assert "srun --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 python train.py" in text
    assert "srun --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 python train.py" in text


def test_slurm_tasks_and_nodes_must_agree():
    with pytest.raises(DistributedError, match=r"2 nodes and 2 tasks do not fit .*\[1\]"):
        detect_layout(slurm(SLURM_STEP_TASKS_PER_NODE="1"))


def test_slurm_allocation_without_srun_is_refused():
    with pytest.raises(DistributedError, match="was not started by srun and would train alone"):
        detect_layout({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"})
    assert detect_layout({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1"}).source == "single"


def test_slurm_on_cpu_ignores_gpus():
    layout = detect_layout(slurm(JAX_PLATFORMS="cpu", SLURM_STEP_NODELIST="gpu007,gpu008"))
    assert (layout.devices_per_process, layout.coordinator) == (None, "gpu007:64121")


def ompi(**changes):
    return {
        "OMPI_COMM_WORLD_SIZE": "4",
        "OMPI_COMM_WORLD_RANK": "2",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
        "OMPI_COMM_WORLD_LOCAL_RANK": "2",
        **changes,
    }


def test_openmpi_on_one_host_meets_on_loopback():
    layout = detect_layout(ompi(PMIX_NAMESPACE="job-1"))
    assert (layout.process_index, layout.process_count, layout.host_count) == (2, 4, 1)
    assert layout.coordinator.startswith("127.0.0.1:")


def test_openmpi_divides_gpus_seen_on_the_host():
    layout = detect_layout(ompi(), visible_gpus=4)
    assert layout.local_device_ids == (2,)
    with pytest.raises(DistributedError, match="ppr:1:node"):
        detect_layout(ompi(), visible_gpus=3)


def test_openmpi_on_several_hosts_asks_for_the_coordinator():
    with pytest.raises(DistributedError, match="-x JAX_COORDINATOR_ADDRESS="):
        detect_layout(ompi(OMPI_COMM_WORLD_LOCAL_SIZE="2"))
    layout = detect_layout(
        ompi(OMPI_COMM_WORLD_LOCAL_SIZE="2", JAX_COORDINATOR_ADDRESS="10.0.0.4:8476")
    )
    assert (layout.coordinator, layout.host_count) == ("10.0.0.4:8476", None)


def test_jobset_indices_and_stable_pod_names():
    layout = detect_layout(
        {
            "KUBERNETES_SERVICE_HOST": "10.0.0.1",
            "JOB_COMPLETION_INDEX": "1",
            "JOB_INDEX": "2",
            "PODS_PER_JOB": "2",
            "REPLICAS": "3",
            "JOBSET_NAME": "run7",
            "REPLICATED_JOB_NAME": "workers",
        }
    )
    assert (layout.process_index, layout.process_count) == (5, 6)
    assert layout.coordinator == "run7-workers-0-0.run7:8476"
    assert str(layout) == (
        "Kubernetes JobSet: 6 processes on 6 hosts; this is process 5, "
        "coordinator run7-workers-0-0.run7:8476"
    )


def test_jobset_names_what_is_missing():
    environ = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1", "JOB_INDEX": "0"}
    with pytest.raises(
        DistributedError, match="JOBSET_NAME, REPLICATED_JOB_NAME, REPLICAS, PODS_PER_JOB not set"
    ):
        detect_layout(environ)
    assert detect_layout({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}).source == "single"


def test_tpu_slices():
    layout = detect_layout(
        {
            "KUBERNETES_SERVICE_HOST": "10.0.0.1",
            "TPU_WORKER_HOSTNAMES": "a,b,c,d",
            "TPU_WORKER_ID": "3",
            "MEGASCALE_NUM_SLICES": "2",
            "MEGASCALE_SLICE_ID": "1",
            "MEGASCALE_COORDINATOR_ADDRESS": "head:8080",
        }
    )
    assert (layout.process_index, layout.process_count) == (7, 8)
    assert layout.coordinator == "head:8476"


def test_indices_and_numbers_are_checked():
    launcher = {"SHARDTRAIN_PROCESS_COUNT": "2", "SHARDTRAIN_PROCESS_INDEX": "2"}
    with pytest.raises(DistributedError, match="process 2 of 2: indices run from 0 to 1"):
        detect_layout(launcher)
    with pytest.raises(DistributedError, match="SHARDTRAIN_PROCESS_INDEX is 'x', not a number"):
        detect_layout({**launcher, "SHARDTRAIN_PROCESS_INDEX": "x"})
