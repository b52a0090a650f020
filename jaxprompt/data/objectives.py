"""Self-supervised objectives: pure functions from token ids to an example."""

import numpy as np
from jaxtyping import Integer

from jaxprompt.data.batches import Example

Ids = Integer[np.ndarray, " _"]  # uint16 where a vocabulary is small


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

    One sentinel takes the place of each span; the target has each sentinel and then the ids of its
    span. The length of the text fixes the numbers of hidden ids and of spans. Their places are
    random, and the text never starts with a span. With sentinels [99 98], "a b c d e f" may become
    inputs [a b 99 d e 98 EOS] and targets [99 c 98 f EOS].

    Args:
        ids: at least 2.
        sentinels: ids of the sentinels, in order of use.
        noise_density: share of the ids that spans hide.
        mean_span: average length of a span.
    """
    size = len(ids)
    noise, spans = _noise_and_spans(size, noise_density, mean_span)
    spans = min(spans, len(sentinels))
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
    """Lengths of the inputs and targets of ``size`` ids, with sentinels and EOS."""
    noise, spans = _noise_and_spans(size, noise_density, mean_span)
    return size - noise + spans + 1, noise + spans + 1


def _noise_and_spans(size: int, noise_density: float, mean_span: float) -> tuple[int, int]:
    """How many of ``size`` ids are hidden, and in how many spans."""
    noise = min(max(round(size * noise_density), 1), size - 1)
    return noise, min(max(round(noise / mean_span), 1), noise, size - noise)


def prefix_lm(ids: Ids, rng: np.random.Generator, *, eos: int, longest_target: int) -> Example:
    """Text cut at a random place: the encoder reads the first part, the decoder writes the rest.

    This is the LM adaptation of Lester et al. 2021, section 3.1. With its EOS the rest has at most
    ``longest_target`` ids. The EOS marks the end of this stretch of text, not of the document.
    """
    rest = int(rng.integers(1, min(len(ids) - 1, longest_target - 1) + 1))
    end = np.array([eos], ids.dtype)
    return Example(
        np.concatenate([ids[: len(ids) - rest], end]),
        np.concatenate([ids[len(ids) - rest :], end]),
    )


def masked_lm(
    ids: Ids, rng: np.random.Generator, *, mask: int, around: tuple[Ids, Ids], noise_density: float
) -> Example:
    """The masked language model of BERT (Devlin et al. 2019, arXiv 1810.04805, section 3.1).

    Every chosen id becomes the mask; the target has what stood there, in order. BERT leaves a tenth
    of them and replaces another tenth by random words, which is no better (Wettig et al. 2023,
    arXiv 2202.08005, section 6). With mask 99, "a b c d" may become inputs [CLS a 99 c d SEP] and
    targets [b].

    Args:
        around: ids in front of the text, such as CLS, and behind it, such as SEP.
        noise_density: share of the ids that are chosen.
    """
    chosen = np.sort(rng.choice(len(ids), masks(len(ids), noise_density), replace=False))
    hidden = ids.copy()
    hidden[chosen] = mask
    return Example(np.concatenate([around[0], hidden, around[1]]), ids[chosen])


def masks(size: int, noise_density: float) -> int:
    """How many of ``size`` ids are masked."""
    return max(round(size * noise_density), 1)


def _composition(total: int, parts: int, rng: np.random.Generator) -> Ids:
    """Random positive numbers, ``parts`` of them, that sum to ``total``; all are equally likely."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))
