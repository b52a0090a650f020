"""What a run is asked to do: schemas, YAML with overrides, and what is said of mistakes."""

from jaxprompt.config.errors import UserError, listed, shown
from jaxprompt.config.overrides import dump_yaml, load_config, read_config, read_yaml, set_value
from jaxprompt.config.schema import (
    MeshConfig,
    ModelConfig,
    PromptConfig,
    RunConfig,
    TaskConfig,
    TrainConfig,
)
from jaxprompt.config.validation import parse

__all__ = [
    "MeshConfig", "ModelConfig", "PromptConfig", "RunConfig", "TaskConfig", "TrainConfig",
    "UserError", "dump_yaml", "listed", "load_config", "parse", "read_config", "read_yaml",
    "set_value", "shown",
]  # fmt: skip
