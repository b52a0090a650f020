"""A prompt for each user: one that all share, plus a change of his own.

The change is free in every number (``full``), or r numbers times vectors that all users have in
common (``low_rank``): p_u = p_shared + z_u B with z_u [r] and B [r, P, D]. With r = 1 this is close
to multitask prompt tuning (arXiv 2303.02861).

The leaves of ``OWN`` have an axis of users. The others are the same for all of them.
"""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxprompt.config.schema import PromptConfig
from jaxprompt.config.users import UsersConfig
from jaxprompt.methods.base import Method, seeded
from jaxprompt.models.injection import Injection, Params

OWN = ("numbers", "change")  # of a user: r of them, or [P, D]
BASIS = "basis"  # the vectors in common, [r, P, D]
SHARED = "shared"  # the shared prompt, [P, D], which is not trained

Leaves = Mapping[str, Array]  # of one user, or of M with a first axis


def change_of(user: Leaves) -> Float[Array, "P D"]:
    """How the prompt of one user differs from the shared one."""
    if "change" in user:
        return user["change"]
    return jnp.einsum("r,rpd->pd", user["numbers"], user[BASIS])


def prompts_of(users: Leaves) -> Float[Array, "M P D"]:
    """The prompts of M users, of which each leaf has a first axis M."""
    if "change" in users:
        return users[SHARED] + users["change"]
    return users[SHARED] + jnp.einsum("mr,mrpd->mpd", users["numbers"], users[BASIS])


def first_leaves(
    settings: UsersConfig, shared: Float[Array | np.ndarray, "P D"], count: int, seed: int
) -> dict[str, Array]:
    """What is trained before step 0: all of ``count`` users have the shared prompt.

    Own leaves are [count, ...]. The vectors in common are random: of zeros nothing would be learnt.
    """
    leaves = {SHARED: jnp.asarray(shared, jnp.float32)}
    if settings.freedom == "full":
        return leaves | {"change": jnp.zeros((count, *shared.shape), jnp.float32)}
    drawn = seeded(seed, "users").standard_normal((settings.rank, *shared.shape))
    basis = jnp.asarray(drawn, jnp.float32)
    return leaves | {BASIS: basis, "numbers": jnp.zeros((count, settings.rank), jnp.float32)}


def user_method(settings: UsersConfig) -> Method:
    """The method whose members are users, each with a copy of what they have in common."""

    def init(
        params: Params, start: Float[np.ndarray, "K P D"], config: PromptConfig, seed: int
    ) -> dict[str, Array]:
        count = len(start)
        leaves = first_leaves(settings, start[0], count, seed)
        copies = lambda x: jnp.broadcast_to(x, (count, *x.shape))
        return {name: x if name in OWN else copies(x) for name, x in leaves.items()}

    def inject(trainables: Leaves, params: Params) -> Injection:
        return Injection(prompts_of(trainables))

    return Method(init, inject)
