"""What every section of a config is made of: types of values, and a base class."""

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

from jaxprompt.config.limits import MOST_ROWS
from jaxprompt.config.names import current_section
from jaxprompt.config.paths import expanded

# steps are int32 on the device and seeds 32 bits of a random key; a size beyond memory is a typo
Positive = Annotated[int, Field(gt=0, lt=2**31, strict=True)]
Count = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
Size = Annotated[int, Field(gt=0, le=MOST_ROWS, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=2**32, strict=True)]
# a file, a directory, or a name that cannot begin with ~
PathText = Annotated[
    str, AfterValidator(expanded), WithJsonSchema({"type": "string", "format": "path"})
]
Rate = Annotated[float, Field(ge=0)]
Weight = Annotated[float, Field(gt=0)]


class Schema(BaseModel):
    """Unknown keys are refused, and nothing changes once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    # where the settings stand in a config; old names are known by it
    section: ClassVar[str] = ""

    @model_validator(mode="before")
    @classmethod
    def _old_names_are_read(cls, values: object) -> object:
        """Settings under their present names (``config/names.py``)."""
        return current_section(values, cls.section) if isinstance(values, Mapping) else values
