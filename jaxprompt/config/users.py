"""The section ``users``: a prompt for each user, near one that all of them share."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from jaxprompt.config.fields import PathText, Positive, Rate, Schema, Size, Weight

# of ``train``, for what nobody set: see methods/README.md
RECIPE: Mapping[str, object] = {
    "optimizer": "adamw",
    "learning_rate": 0.03,
    "schedule": "linear",
    "weight_decay": 0.0,
}


class UsersConfig(Schema):
    """A prompt for each user: a shared prompt plus a change that only his rows have taught."""

    section = "users"

    column: str = Field(min_length=1, description="Column of the rows that says whose a row is.")
    time: str | None = Field(
        default=None,
        description=(
            "Column by which the rows of a user are ordered, of numbers or of text such as "
            "2026-11-30. null: the order of the file. The latest rows are held out, never random "
            "ones."
        ),
    )
    validation: Annotated[float, Field(gt=0, le=0.5)] = Field(
        default=0.2,
        description=(
            "Share of a user's rows, before those of `users.test`, that are validation rows; at "
            "least one row. All rows are those of `task.train`."
        ),
    )
    test: Annotated[float, Field(ge=0, le=0.5)] = Field(
        default=0.0, description="Share of a user's rows, his latest, that are test rows. 0: none."
    )
    min_rows: Annotated[int, Field(ge=3, strict=True)] = Field(
        default=5,
        description=(
            "Users with fewer rows have no prompt of their own and keep the shared one, which "
            "learns from all of their rows."
        ),
    )
    shared: PathText | None = Field(
        default=None,
        description=(
            "Prompt that all users share: an artefact. null: it is trained first, on the training "
            "rows of all users, in `shared/` of the output."
        ),
    )
    shared_steps: Positive = Field(
        default=1000, description="Steps in which the shared prompt is trained, as in the paper."
    )
    shared_learning_rate: Weight = Field(
        default=0.3,
        description="Its peak learning rate; it falls linearly. `train` is for the users' prompts.",
    )
    freedom: Literal["low_rank", "full"] = Field(
        default="low_rank",
        description=(
            "How a user's prompt may differ from the shared one. low_rank: by `users.rank` numbers "
            "times vectors that all users have in common. full: in every number."
        ),
    )
    rank: Size = Field(default=8, description="Numbers of a user where `freedom` is low_rank.")
    ridge: Rate = Field(
        default=1e-4,
        description=(
            "Factor of the squared norm of a user's difference, divided by his training rows: who "
            "has few rows stays near the shared prompt. More is nearer."
        ),
    )
    rows: Size = Field(
        default=4,
        description="Rows of each user in a step, which has train.batch_size / rows users.",
    )

    @model_validator(mode="after")
    def _rows_are_left_to_train_on(self) -> "UsersConfig":
        if self.validation + self.test >= 0.9:
            raise ValueError(
                f"users.validation is {self.validation} and users.test {self.test}, which leaves "
                "hardly a row to train on; give shares with a sum below 0.9"
            )
        return self


def with_users_recipe(values: Mapping[str, object]) -> Mapping[str, object]:
    """The settings of a run; where it has users, what ``train`` does not set is usual for them."""
    train = values.get("train", {})
    if not isinstance(values.get("users"), Mapping) or not isinstance(train, Mapping):
        return values
    return {**values, "train": {**RECIPE, **train}}
