"""Watching a run: stop requests, progress, hangs, stragglers, agreement between processes."""

from shardtrain.monitoring.preemption import PREEMPTED_EXIT_CODE as PREEMPTED_EXIT_CODE
from shardtrain.monitoring.preemption import Preempted as Preempted
from shardtrain.monitoring.preemption import Preemption as Preemption
