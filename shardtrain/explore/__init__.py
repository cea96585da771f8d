"""Know before you rent: which layout on which chips, and why not the others."""

from shardtrain.explore.core import explore
from shardtrain.explore.exploration import Exploration

__all__ = ["Exploration", "explore"]
