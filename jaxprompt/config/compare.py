"""The section ``compare``: formulations of one task, trained with the same rows and seeds."""

from pydantic import Field, field_validator, model_validator

from jaxprompt.config.errors import shown
from jaxprompt.config.fields import Positive, Schema, Seed
from jaxprompt.config.paths import as_folder
from jaxprompt.config.values import Values


class CompareConfig(Schema):
    """What ``jaxprompt compare CONFIG.yaml`` compares. The rest of the file is a run."""

    section = "compare"

    formulations: dict[str, Values] = Field(
        description=(
            "At least two, by name: what each changes of the run. Keys of `task` stand alone, such "
            "as `template` or `labels`; others are settings, such as `prompt.length` or `method`. "
            "Example: {plain: {}, asked: {template: 'what is it? {text}', prompt.length: 5}}."
        ),
    )
    seeds: list[Seed] = Field(
        default=[0, 1, 2],
        min_length=1,
        description="Seeds of the start, of batches and of dropout; each formulation has them all.",
    )
    successive_halving_every: Positive | None = Field(
        default=None,
        description=(
            "The worse half of the formulations that train together stops after so many steps, and "
            "again after as many, until two are left; a multiple of `train.evaluate_every`. They "
            "are judged by validation rows, and those that stopped are in no pair. null: all go on."
        ),
    )

    @field_validator("formulations", mode="before")
    @classmethod
    def _nothing_may_change(cls, formulations: object) -> object:
        """In YAML, ``plain:`` alone is a formulation without changes."""
        if not isinstance(formulations, dict):
            return formulations
        return {name: {} if values is None else values for name, values in formulations.items()}

    @model_validator(mode="after")
    def _can_be_compared(self) -> "CompareConfig":
        if len(self.formulations) < 2:
            raise ValueError(
                f"compare.formulations are {shown([*self.formulations])}; give two or more"
            )
        for name in self.formulations:
            as_folder(name, "formulation")
        if len({*self.seeds}) < len(self.seeds):
            raise ValueError(f"compare.seeds are {self.seeds}; give each once")
        return self
