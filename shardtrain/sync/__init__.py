"""How replicas agree: the algorithms behind `Strategy(sync=..., compression=...)`.

One concept carries them all: *replica-local state*, arrays with a leading replica dim sharded over
the mesh axis `data`. An algorithm says what each replica keeps, what it computes alone, and what
they exchange, as pure functions; `shardtrain.plan` wires it to a model.
"""

from shardtrain.algorithms import AllReduce, Gossip, ParameterServer
from shardtrain.strategy import Strategy
from shardtrain.sync.algorithm import Algorithm, Job
from shardtrain.sync.all_reduce import explicit_all_reduce
from shardtrain.sync.averaging import averaging
from shardtrain.sync.gossip import gossip
from shardtrain.sync.parameter_server import parameter_server
from shardtrain.sync.replicas import Replicas, ReplicaState
from shardtrain.sync.reshard import needs_reshard, reshard, saved_form


def needs_replicas(strategy: Strategy) -> bool:
    """Whether a strategy asks for more than the compiler's own all-reduce."""
    plain = strategy.sync is None or strategy.sync == AllReduce()
    return not plain or strategy.compression is not None


def make_algorithm(strategy: Strategy, job: Job) -> Algorithm:
    """The algorithm of a strategy.

    Args:
      strategy: Its `sync` and `compression`.
      job: The plan's parts.

    Raises:
      StrategyError: The algorithm cannot do what is asked.
    """
    sync = strategy.sync or AllReduce()
    if isinstance(sync, AllReduce):
        return explicit_all_reduce(strategy.compression, job)
    if isinstance(sync, ParameterServer):
        return parameter_server(sync, strategy.compression, job)
    if isinstance(sync, Gossip):
        return gossip(sync, job)
    return averaging(sync, strategy.compression, job)


__all__ = [
    "Algorithm",
    "Job",
    "ReplicaState",
    "Replicas",
    "make_algorithm",
    "needs_replicas",
    "needs_reshard",
    "reshard",
    "saved_form",
]
