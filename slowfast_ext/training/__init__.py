"""Training: configurations, the loop, and what keeps a run from losing work."""

from .batches import DataSource
from .config_file import apply_overrides, format_config, read_config
from .errors import TrainingError
from .recipes import RECIPES, Recipe, starting_weights, zoo_config
from .run import RunOptions, train
from .settings import TrainingSettings, read_settings

__all__ = [
    "RECIPES",
    "DataSource",
    "Recipe",
    "RunOptions",
    "TrainingError",
    "TrainingSettings",
    "apply_overrides",
    "format_config",
    "read_config",
    "read_settings",
    "starting_weights",
    "train",
    "zoo_config",
]
