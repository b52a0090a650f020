"""What a tuning method is, methods of several parts, and members of several structures.

A method has trainables, a small pytree, and only they are ever trained. Every leaf has a leading
axis K, one entry for each member of a run, so that the optimizer can be vmapped over it and K
members are tuned exactly as if each were alone.

Members whose trainables have one structure (prompts of one length, LoRA of one rank) share one
pytree. Members of several structures are a tuple of such pytrees, one for each: nothing is padded
where it is trained.
"""

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxprompt.config.schema import PromptConfig
from jaxprompt.methods.layers import combined, joined
from jaxprompt.models.injection import Injection, Params

# a dict of arrays [K, ...], or of such dicts, one for each part of a method; or a tuple of them
# where members have several structures
Trainables: TypeAlias = PyTree

T = TypeVar("T")


def _prompt_length(config: PromptConfig) -> int:
    return config.length


class Method(NamedTuple):
    """What is trained, how it starts, and what the model is given. All functions are pure.

    init: ``(params, start, config, seed) -> trainables``, from ``start`` vectors [K, R, D], of
        which ``num_start_vectors(config)`` says R.
    inject: ``(trainables, params) -> Injection``. It is what an artefact holds, so networks that
        only make it are not stored.
    uses_prompt: it tunes virtual tokens.
    frozen: the model's parameters stay as they are; else they are among the trainables.
    """

    init: Callable[[Params, Float[np.ndarray, "K R D"], PromptConfig, int], Trainables]
    inject: Callable[[Trainables, Params], Injection]
    num_start_vectors: Callable[[PromptConfig], int] = _prompt_length
    uses_prompt: bool = True
    frozen: bool = True


def no_start_vectors(config: PromptConfig) -> int:
    """For methods without virtual tokens."""
    return 0


def seeded(seed: int, part: str) -> np.random.Generator:
    """The random numbers of a part of a method, independent of those of other parts."""
    stream = int.from_bytes(hashlib.sha256(part.encode()).digest()[:4], "little")
    return np.random.Generator(np.random.Philox(key=[seed, stream]))


def members_of(
    leaves: Mapping[str, np.ndarray], start: Float[np.ndarray, "K R D"]
) -> dict[str, Array]:
    """Float32 trainables [K, ...] in which all members of ``start`` have the same leaves."""
    count = len(start)
    return {
        name: jnp.tile(jnp.asarray(leaf, jnp.float32), (count, *[1] * leaf.ndim))
        for name, leaf in leaves.items()
    }


def composed(parts: Mapping[str, Method]) -> Method:
    """The method that trains several parts together, with a dict of their trainables."""
    vectors = [part.num_start_vectors for part in parts.values() if part.uses_prompt]

    def init(
        params: Params, start: Float[np.ndarray, "K R D"], config: PromptConfig, seed: int
    ) -> dict[str, Trainables]:
        return {name: part.init(params, start, config, seed) for name, part in parts.items()}

    def inject(trainables: dict[str, Trainables], params: Params) -> Injection:
        whole = Injection()
        for name, part in parts.items():
            one = part.inject(trainables[name], params)
            embeddings = whole.embeddings if one.embeddings is None else one.embeddings
            whole = Injection(embeddings, combined(whole.layers, one.layers))
        return whole

    return Method(
        init,
        inject,
        num_start_vectors=vectors[0] if vectors else no_start_vectors,
        uses_prompt=bool(vectors),
    )


def grouped(methods: Sequence[Method]) -> Method:
    """The method of members of several structures: its trainables are a tuple, one for each.

    Args:
        methods: of the groups, in their order.
    """
    if len(methods) == 1:
        return methods[0]

    def inject(trainables: tuple[Trainables, ...], params: Params) -> Injection:
        pairs = zip(methods, trainables, strict=True)
        return joined([method.inject(group, params) for method, group in pairs])

    return methods[0]._replace(inject=inject)


def member_groups(value: PyTree, like: Trainables | None = None) -> tuple[PyTree, ...]:
    """The part of each group of members of one structure.

    like: the trainables that ``value`` belongs to, as their gradient or optimizer state does; None
    where it is the trainables.
    """
    grouped = value if like is None else like
    return value if isinstance(grouped, tuple) else (value,)


def join_groups(groups: Sequence[T]) -> T | tuple[T, ...]:
    """The inverse of ``member_groups``: a single group is returned without a tuple."""
    return groups[0] if len(groups) == 1 else tuple(groups)


def num_members(trainables: Trainables) -> int:
    """K, the members of all groups."""
    return sum(len(jax.tree.leaves(group)[0]) for group in member_groups(trainables))


def split_by_group(values: T, trainables: Trainables) -> list[T]:
    """The part of ``values``, a pytree with leaves [K, ...], that belongs to each group."""
    counts = list(map(num_members, member_groups(trainables)))
    ends = itertools.accumulate(counts)
    part = lambda first, last: jax.tree.map(lambda x: x[first:last], values)
    return [part(end - count, end) for end, count in zip(ends, counts, strict=True)]


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
