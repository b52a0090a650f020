"""Values as YAML and JSON have them."""

from typing import Any, TypeAlias

# null, a truth value, a number, text, a list or a mapping; which one is known where it is checked
Value: TypeAlias = Any
Values: TypeAlias = dict[str, Value]
