"""The parameter tree of a T5: the path of each leaf and the letters of its axes.

Formats name these leaves in their own ways (``hf_t5.py``, ``t5x.py``). The order is that of the
tensors in a file that we write.
"""

from jaxprompt.models.t5.config import T5Config

# the parts of a layer in order; each has a norm of its own
SUBLAYERS = {
    "encoder": ("attention", "mlp"),
    "decoder": ("self_attention", "cross_attention", "mlp"),
}
_ATTENTION = {"query": "LDNH", "key": "LDNH", "value": "LDNH", "out": "LNHD"}


def depths(config: T5Config) -> dict[str, int]:
    """The number of layers of each stack."""
    return {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}


def tree_axes(config: T5Config) -> dict[str, str]:
    """Path -> letters of the axes, such as "encoder/layers/attention/query" -> "LDNH"."""
    axes = {"token_embedder/embedding": "VD"}
    for stack in SUBLAYERS:
        axes |= _stack_axes(stack, config)
    if not config.tied:
        axes["head"] = "DV"
    return axes


def _stack_axes(stack: str, config: T5Config) -> dict[str, str]:
    gates = ("wi_0", "wi_1") if config.gated else ("wi",)
    mlp = {**{gate: "LDF" for gate in gates}, "wo": "LFD"}
    axes = {}
    for sublayer in SUBLAYERS[stack]:
        axes[f"{stack}/layers/{sublayer}_norm/scale"] = "LD"
        for weight, letters in (mlp if sublayer == "mlp" else _ATTENTION).items():
            axes[f"{stack}/layers/{sublayer}/{weight}"] = letters
    if config.per_layer_bias:
        axes[f"{stack}/layers/relative_bias"] = "LRN"
    else:
        axes[f"{stack}/relative_bias"] = "RN"
    axes[f"{stack}/final_norm/scale"] = "D"
    return axes
