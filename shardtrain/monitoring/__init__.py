"""Watching a run: stop requests, progress, hangs, stragglers, agreement between processes."""

from shardtrain.monitoring.agreement import check_agreement as check_agreement
from shardtrain.monitoring.agreement import disagreements as disagreements
from shardtrain.monitoring.agreement import exchange_facts as exchange_facts
from shardtrain.monitoring.agreement import fingerprint as fingerprint
from shardtrain.monitoring.goodput import best_interval as best_interval
from shardtrain.monitoring.goodput import expected_goodput as expected_goodput
from shardtrain.monitoring.goodput import goodput_report as goodput_report
from shardtrain.monitoring.hang import DEFAULT_HANG_TIMEOUTS as DEFAULT_HANG_TIMEOUTS
from shardtrain.monitoring.hang import Hang as Hang
from shardtrain.monitoring.hang import ProcessStatus as ProcessStatus
from shardtrain.monitoring.hang import describe_hang as describe_hang
from shardtrain.monitoring.hang import find_hang as find_hang
from shardtrain.monitoring.hang import hang_timeouts as hang_timeouts
from shardtrain.monitoring.preemption import PREEMPTED_EXIT_CODE as PREEMPTED_EXIT_CODE
from shardtrain.monitoring.preemption import Preempted as Preempted
from shardtrain.monitoring.preemption import Preemption as Preemption
from shardtrain.monitoring.progress import PHASES as PHASES
from shardtrain.monitoring.progress import Progress as Progress
from shardtrain.monitoring.progress import ProgressRecord as ProgressRecord
from shardtrain.monitoring.progress import read_progress as read_progress
from shardtrain.monitoring.stragglers import Straggler as Straggler
from shardtrain.monitoring.stragglers import find_stragglers as find_stragglers
from shardtrain.monitoring.stragglers import gather_step_times as gather_step_times
from shardtrain.monitoring.watchdog import WATCHDOG_EXIT_CODE as WATCHDOG_EXIT_CODE
from shardtrain.monitoring.watchdog import Watchdog as Watchdog
from shardtrain.monitoring.watchdog import enable_stack_dumps as enable_stack_dumps
