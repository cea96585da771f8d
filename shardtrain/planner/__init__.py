"""Reading compiled programs, memory and time models, hardware, and the search over strategies."""

from shardtrain.planner.points_predict import Prediction, predict_point
from shardtrain.planner.search import search_layouts

__all__ = ["Prediction", "predict_point", "search_layouts"]
