"""The tuning methods by the names that ``method:`` of a config has for them."""

from jaxprompt.methods.base import Method
from jaxprompt.methods.full import MODEL_TUNING
from jaxprompt.methods.prompt import PROMPT_TUNING
from jaxprompt.methods.residual import RESIDUAL_PROMPT_TUNING
from jaxprompt.methods.superposition import SUPERPOSITION_PROMPT_TUNING

METHODS: dict[str, Method] = {
    "prompt-tuning": PROMPT_TUNING,
    "residual-prompt-tuning": RESIDUAL_PROMPT_TUNING,
    "superposition-prompt-tuning": SUPERPOSITION_PROMPT_TUNING,
    "model-tuning": MODEL_TUNING,
}
