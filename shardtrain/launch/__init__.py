"""Starting, joining and supervising the processes of a run."""

from shardtrain.launch.distributed import init_distributed as init_distributed
from shardtrain.launch.environment import ProcessLayout as ProcessLayout
from shardtrain.launch.environment import detect_layout as detect_layout
from shardtrain.launch.supervisor import launch as launch
from shardtrain.launch.worker import guard as guard
