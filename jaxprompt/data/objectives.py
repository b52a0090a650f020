"""Self-supervised objectives: pure functions from token ids to an example."""

import numpy as np
from jaxtyping import Int

from jaxprompt.data.batches import Example

Ids = Int[np.ndarray, " n"]


def span_corruption(
    ids: Ids,
    rng: np.random.Generator,
    *,
    sentinels: Ids,
    eos: int,
    noise_density: float = 0.15,
    mean_span: float = 3.0,
) -> Example:
    """T5's denoising (Raffel et al. 2020, section 3.1.4).

    ``noise_density`` of the ids, in spans of ``mean_span`` on average, are replaced by one sentinel
    a span; the target is each sentinel followed by what it stands for. Numbers of tokens and spans
    are fixed by the length, their places are random; the text never starts with a span.

    ids: at least 2. sentinels: their ids in order of use.

    With sentinels [99 98], "a b c d e f" may become inputs [a b 99 d e 98 EOS] and targets
    [99 c 98 f EOS].
    """
    size = len(ids)
    noise = min(max(round(size * noise_density), 1), size - 1)
    spans = min(max(round(noise / mean_span), 1), noise, size - noise, len(sentinels))
    kept_lengths = _composition(size - noise, spans, rng)
    noise_lengths = _composition(noise, spans, rng)
    inputs, targets, at = [], [], 0
    for sentinel, kept, hidden in zip(sentinels, kept_lengths, noise_lengths, strict=False):
        mark = np.array([sentinel], ids.dtype)
        inputs += [ids[at : at + kept], mark]
        targets += [mark, ids[at + kept : at + kept + hidden]]
        at += kept + hidden
    end = np.array([eos], ids.dtype)
    return Example(np.concatenate([*inputs, end]), np.concatenate([*targets, end]))


def span_lengths(size: int, *, noise_density: float, mean_span: float) -> tuple[int, int]:
    """Tokens of inputs and targets that ``size`` ids become, sentinels and EOS included."""
    noise = min(max(round(size * noise_density), 1), size - 1)
    spans = min(max(round(noise / mean_span), 1), noise, size - noise)
    return size - noise + spans + 1, noise + spans + 1


def prefix_lm(ids: Ids, rng: np.random.Generator, *, eos: int, longest_target: int) -> Example:
    """Text cut at a random place: the encoder reads the first part, the decoder writes the rest.

    The LM adaptation of Lester et al. 2021, section 3.1. The rest has at most ``longest_target``
    ids with its EOS, which marks the end of the cut-out and not of the text.
    """
    rest = int(rng.integers(1, min(len(ids) - 1, longest_target - 1) + 1))
    end = np.array([eos], ids.dtype)
    return Example(
        np.concatenate([ids[: len(ids) - rest], end]),
        np.concatenate([ids[len(ids) - rest :], end]),
    )


def _composition(total: int, parts: int, rng: np.random.Generator) -> Ids:
    """``parts`` positive numbers that sum to ``total``, all such choices equally likely."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))
