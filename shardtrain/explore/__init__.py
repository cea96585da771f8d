"""Know before you rent: which layout on which chips, and why not the others."""

from shardtrain.explore.core import explore
from shardtrain.explore.exploration import Exploration
from shardtrain.explore.oom import OomReport, explain_oom

__all__ = ["Exploration", "OomReport", "explain_oom", "explore"]
