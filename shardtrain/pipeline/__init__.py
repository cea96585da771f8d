"""Pipeline parallelism: schedules as data, stage split of unmodified models, one SPMD executor."""
