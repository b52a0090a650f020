"""Bottleneck adapters: small networks that read a sublayer and add to the residual stream.

With x the residual stream before a sublayer and f what the sublayer gives, x + f becomes
x + f + A(h), where A(h) = scale (activation(h W_down + b_down) W_up + b_up). What h is says
``adapter.reads``, see ``jaxprompt.models.injection.Adapter``. Houlsby et al. 2019
(arXiv 1902.00751), Pfeiffer et al. 2020 (arXiv 2005.00247), He et al. 2021 (arXiv 2110.04366).

Starts are those of the AdapterHub library. Random numbers are the same for all members of a seed.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Array, Float

from jaxprompt.config.errors import UserError, listed
from jaxprompt.config.methods import AdapterConfig
from jaxprompt.config.schema import PromptConfig
from jaxprompt.methods.base import Method, members_of, no_start_vectors, seeded
from jaxprompt.methods.layers import SUBLAYERS, at, nested
from jaxprompt.models.injection import Adapter, Injection, Params

# names of sublayers in the parameter tree: what ``adapter.after`` calls them, and their adapter
_PLACES = {
    "attention": ("attention", "attention_adapter"),
    "self_attention": ("attention", "attention_adapter"),
    "cross_attention": ("cross", "cross_attention_adapter"),
    "mlp": ("mlp", "mlp_adapter"),
}
_DEVIATION = 0.02  # of the random start, as in BERT


def adapter(config: AdapterConfig) -> Method:
    """The method of these settings; its leaves are "PATH/mlp_adapter/down" [K, L, D, m] and so on.

    The others of an adapter are down_bias [K, L, m], up [K, L, m, D] and up_bias [K, L, D].
    """

    def init(
        params: Params, start: Float[np.ndarray, "K R D"], prompt: PromptConfig, seed: int
    ) -> dict[str, Array]:
        rng = seeded(seed, "adapter")
        shapes = adapter_shapes(config, params)
        return members_of({n: _start(config, n, shape, rng) for n, shape in shapes.items()}, start)

    def inject(trainables: dict[str, Array], params: Params) -> Injection:
        places = dict.fromkeys(name.rpartition("/")[0] for name in trainables)
        return Injection(layers=nested({place: of_place(place, trainables) for place in places}))

    def of_place(place: str, trainables: dict[str, Array]) -> Adapter:
        return Adapter(
            down=trainables[f"{place}/down"],
            down_bias=trainables[f"{place}/down_bias"],
            up=trainables[f"{place}/up"],
            up_bias=trainables[f"{place}/up_bias"],
            activation=config.activation,
            reads=config.reads,
            scale=config.scale,
        )

    return Method(init, inject, num_start_vectors=no_start_vectors, uses_prompt=False)


def adapter_width(config: AdapterConfig, d_model: int) -> int:
    """m, the width of the bottleneck."""
    return config.width or max(int(d_model // config.reduction), 1)


def adapter_shapes(config: AdapterConfig, params: Params) -> dict[str, tuple[int, ...]]:
    """The shape of each leaf of one member by its name.

    Args:
        params: of the frozen model; shapes without values do.

    Raises:
        UserError: the model has no sublayer of one of the names in ``config.after``.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for place, depth, d_model in _places(config, params):
        width = adapter_width(config, d_model)
        shapes[f"{place}/down"] = depth, d_model, width
        shapes[f"{place}/down_bias"] = depth, width
        shapes[f"{place}/up"] = depth, width, d_model
        shapes[f"{place}/up_bias"] = depth, d_model
    return shapes


def _places(config: AdapterConfig, params: Params) -> Iterator[tuple[str, int, int]]:
    """The path of each adapter, with the number of layers and the width of the model."""
    present = [path for path in SUBLAYERS if at(params, path) is not None]
    known = dict.fromkeys(_PLACES[path[-1]][0] for path in present)
    for name in config.after:
        if name not in known:
            raise UserError(
                f"adapter.after names {name!r}, and this backbone has no such sublayer; it has "
                f"{listed(known)}."
            )
    for *modules, sublayer in present:
        name, leaf = _PLACES[sublayer]
        if name in config.after:
            norm = at(params, (*modules, f"{sublayer}_norm", "scale"))
            assert norm is not None
            depth, d_model = norm.shape
            yield "/".join((*modules, leaf)), depth, d_model


def _start(
    config: AdapterConfig, name: str, shape: tuple[int, ...], rng: np.random.Generator
) -> np.ndarray:
    """The float32 start of a leaf."""
    if name.endswith("_bias"):
        return np.zeros(shape, np.float32)
    if config.init == "normal":
        return _DEVIATION * rng.standard_normal(shape, np.float32)
    if name.endswith("/up"):
        return np.zeros(shape, np.float32)
    bound = shape[-2] ** -0.5  # the start of torch's linear layers
    return bound * (2 * rng.random(shape, np.float32) - 1)
