"""What a tuning method is, and members whose prompts have several lengths.

A method has trainables, a small pytree, and only they are ever trained. Every leaf has a leading
axis K, one entry for each member of a run, so that the optimizer can be vmapped over it and K
members are tuned exactly as if each were alone.

Members whose prompts have one length share one pytree. Members with several lengths are a tuple of
such pytrees, one for each length: no prompt is padded where it is trained.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, Shaped

from jaxprompt.config.schema import PromptConfig
from jaxprompt.models.injection import Injection, Params

# a dict of arrays [K, ...], or a tuple of such dicts where prompts have several lengths
Trainables: TypeAlias = PyTree

T = TypeVar("T")


def _prompt_length(config: PromptConfig) -> int:
    return config.length


def _embeddings(trainables: Trainables, injection: Injection) -> dict[str, PyTree]:
    return {"prompt": injection.embeddings}


class Method(NamedTuple):
    """What is trained, how it starts, and what the model is given. All functions are pure.

    init: ``(params, start, config, seed) -> trainables``, from ``start`` vectors [K, R, D], of
        which ``num_start_vectors(config)`` says R.
    inject: ``(trainables, params) -> Injection``, for trainables of prompts of one length; use
        ``jaxprompt.methods.base.inject``, which takes any.
    export: ``(trainables, injection) -> arrays [K, ...]`` that are saved. ``injection`` is what
        ``inject`` has made of the trainables.
    uses_prompt: it tunes virtual tokens, and is stored as a prompt.
    frozen: the model's parameters stay as they are; else they are among the trainables.
    """

    init: Callable[[Params, Float[np.ndarray, "K R D"], PromptConfig, int], Trainables]
    inject: Callable[[Trainables, Params], Injection]
    num_start_vectors: Callable[[PromptConfig], int] = _prompt_length
    export: Callable[[Trainables, Injection], dict[str, PyTree]] = _embeddings
    uses_prompt: bool = True
    frozen: bool = True


def inject(method: Method, trainables: Trainables, params: Params) -> Injection:
    """The injection of trainables whose prompts have one length or several.

    In a bank of several lengths the shorter prompts end with zeros, which no id addresses.
    """
    if not isinstance(trainables, tuple):
        return method.inject(trainables, params)
    injections = [method.inject(group, params) for group in trainables]
    banks = [x.embeddings for x in injections if x.embeddings is not None]
    longest = max(bank.shape[1] for bank in banks)
    padded = [jnp.pad(bank, ((0, 0), (0, longest - bank.shape[1]), (0, 0))) for bank in banks]
    return Injection(jnp.concatenate(padded))


def length_groups(value: PyTree, like: Trainables | None = None) -> tuple[PyTree, ...]:
    """The part of each group of members whose prompts have one length.

    like: the trainables that ``value`` belongs to, as their gradient or optimizer state does; None
    where it is the trainables.
    """
    grouped = value if like is None else like
    return value if isinstance(grouped, tuple) else (value,)


def join_groups(groups: Sequence[T]) -> T | tuple[T, ...]:
    """The inverse of ``length_groups``: a single group is returned without a tuple."""
    return groups[0] if len(groups) == 1 else tuple(groups)


def num_members(trainables: Trainables) -> int:
    """K, the members of all groups."""
    return sum(len(jax.tree.leaves(group)[0]) for group in length_groups(trainables))


def split_by_group(
    values: Shaped[Array, "K ..."], trainables: Trainables
) -> list[Shaped[Array, "_ ..."]]:
    """The part of ``values`` [K, ...] that belongs to each length group."""
    counts = list(map(num_members, length_groups(trainables)))
    ends = itertools.accumulate(counts)
    return [values[end - count : end] for end, count in zip(ends, counts, strict=True)]


@contextlib.contextmanager
def without_member_axis(trainables: Trainables) -> Iterator[Trainables]:
    """The trainables of a single member without axis K, in the same memory, within the block.

    Within the context no array of ``trainables`` itself can be used; afterwards it has them back.
    """
    alone = _without_members(trainables)
    try:
        yield alone
    finally:
        _give_back(trainables, _with_members(alone))


# donated, so that no copy of a whole model is made
_without_members = jax.jit(lambda tree: jax.tree.map(lambda x: x[0], tree), donate_argnums=0)
_with_members = jax.jit(lambda tree: jax.tree.map(lambda x: x[None], tree), donate_argnums=0)


def _give_back(tree: dict[str, PyTree], arrays: dict[str, PyTree]) -> None:
    for name, value in arrays.items():
        if isinstance(value, dict):
            _give_back(tree[name], value)
        else:
            tree[name] = value
