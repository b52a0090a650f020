"""The tuning methods by the names that ``method:`` of a config has for them."""

from jaxprompt.config.schema import RunConfig
from jaxprompt.methods.adapter import adapter
from jaxprompt.methods.base import Method, composed
from jaxprompt.methods.bitfit import bitfit
from jaxprompt.methods.full import MODEL_TUNING
from jaxprompt.methods.hard_prompt import GCG, PEZ
from jaxprompt.methods.ia3 import ia3
from jaxprompt.methods.lora import lora
from jaxprompt.methods.low_rank import LOW_RANK_PROMPT_TUNING
from jaxprompt.methods.multitask import MULTITASK_PROMPT_TUNING
from jaxprompt.methods.norm_tuning import norm_tuning
from jaxprompt.methods.p_tuning import p_tuning
from jaxprompt.methods.prefix import prefix
from jaxprompt.methods.prompt import PROMPT_TUNING
from jaxprompt.methods.residual import RESIDUAL_PROMPT_TUNING
from jaxprompt.methods.soft_verbalizer import labels_of, soft_verbalizer
from jaxprompt.methods.superposition import SUPERPOSITION_PROMPT_TUNING

# those without settings of their own
METHODS: dict[str, Method] = {
    "prompt-tuning": PROMPT_TUNING,
    "residual-prompt-tuning": RESIDUAL_PROMPT_TUNING,
    "superposition-prompt-tuning": SUPERPOSITION_PROMPT_TUNING,
    "multitask-prompt-tuning": MULTITASK_PROMPT_TUNING,
    "low-rank-prompt-tuning": LOW_RANK_PROMPT_TUNING,
    "model-tuning": MODEL_TUNING,
}


def method_of(config: RunConfig) -> Method:
    """The method of a run, with the settings of its parts."""
    parts = {name: _part(name, config) for name in config.parts}
    return composed(parts) if len(parts) > 1 else parts[config.parts[0]]


def _part(name: str, config: RunConfig) -> Method:
    match name:
        case "p-tuning":
            return p_tuning(config.p_tuning)
        case "lora":
            return lora(config.lora)
        case "prefix":
            return prefix(config.prefix)
        case "ia3":
            return ia3(config.ia3)
        case "adapter":
            return adapter(config.adapter)
        case "bitfit":
            return bitfit(config.bitfit)
        case "soft-verbalizer":
            # of a population the task is that of its members
            return soft_verbalizer(labels_of(config.members()[0].task))
        case "norm":
            return norm_tuning()
        case "gcg":
            return GCG
        case "pez":
            return PEZ
    return METHODS[f"{name}-tuning"]
