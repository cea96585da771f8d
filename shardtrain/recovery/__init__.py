"""Coming back: saved states of a run, the watch over its loss, and the replay of a bad step."""

from shardtrain.recovery.preflight import check_first_batch as check_first_batch
from shardtrain.recovery.preflight import check_run as check_run
from shardtrain.recovery.replay import Finding as Finding
from shardtrain.recovery.replay import ReplayReport as ReplayReport
from shardtrain.recovery.replay import replay_step as replay_step
from shardtrain.recovery.saved import SavedStates as SavedStates
from shardtrain.recovery.saved import has_snapshots as has_snapshots
from shardtrain.recovery.watch import LossWatch as LossWatch
from shardtrain.recovery.watch import skip_step as skip_step
