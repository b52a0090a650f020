"""A user who comes later: only what is his own is trained; what users have in common stays."""

import time
from typing import cast

import jax.numpy as jnp
import numpy as np

from jaxprompt.config.errors import UserError
from jaxprompt.data.examples import tokenize
from jaxprompt.data.sources import read_rows
from jaxprompt.data.tasks.rules import apply_rule
from jaxprompt.data.users import UserExamples
from jaxprompt.data.virtual_tokens import VirtualTokens
from jaxprompt.inference.session import open_session, prompt_task
from jaxprompt.methods.artefact import save_prompt
from jaxprompt.methods.tuned import Metadata, Prompt
from jaxprompt.methods.user_library import UserLibrary
from jaxprompt.methods.users import BASIS, prompts_of
from jaxprompt.runtime import parallel
from jaxprompt.training.step import all_finite
from jaxprompt.training.user_step import Tuned, state_of_users, user_optimizer, user_steps, users_in


def add_user(
    library: UserLibrary, user: str, data: str, backbone: str | None = None
) -> dict[str, object]:
    """Train the prompt of one more user on all of his rows, or anew where he has one.

    It has as many steps as each user of the library had.

    Args:
        data: a file with rows of this user alone.

    Raises:
        UserError: too few rows, rows that are not the task's, or a prompt that diverges.
    """
    begun, users = time.monotonic(), library.config.users
    assert users is not None
    session = open_session(library.shared_prompt, backbone)
    assert session.prompt is not None
    task = prompt_task(session.prompt, None)
    rows = apply_rule(task, read_rows(None, data), training=True, origin=data)
    if len(rows) < users.min_rows:
        raise UserError(
            f"{data} has {len(rows)} rows, and a user needs users.min_rows, {users.min_rows}, for "
            "a prompt of his own; until then the shared prompt serves him."
        )
    vectors, loaded = session.prompt.vectors, session.backbone
    length, mesh = len(vectors), loaded.mesh or parallel.make_mesh()
    examples = tokenize(
        task, rows, session.tokenizer, VirtualTokens(loaded.config.vocab_size, length), origin=data
    )
    shards = parallel.num_batch_shards(mesh)
    size = -(-users.rows // shards) * shards  # so that each device has a row
    settings = library.config.train.model_copy(
        update={"steps": library.visits, "batch_size": size, "micro_batch_size": None}
    )
    optimizer = user_optimizer(settings, library.visits, frozen=True)
    state = state_of_users(settings, users, optimizer, vectors, np.array([len(rows)]))
    basis = library.basis()
    if basis is not None:
        state.trainables[BASIS] = jnp.asarray(basis)[None]
    tuned = Tuned(loaded.model, loaded.params, session.tokenizer, mesh, task, length)
    steps = user_steps(tuned, settings, users, UserExamples([examples], 1, size), optimizer)
    for _ in range(library.visits):
        state, _, _ = steps.take(state)
    if not all_finite(state.trainables).all():
        raise UserError(
            "The prompt of the user is not finite any more after training, so nothing was saved; "
            "look for odd rows in the data."
        )
    prompt = np.asarray(prompts_of(users_in(state.trainables, np.array([0]))))[0]
    others = ("metrics", "test", "rows")  # of other users' rows
    known = {k: x for k, x in session.prompt.metadata.items() if k not in others}
    save_prompt(library.own_prompt(user), Prompt(prompt, cast(Metadata, known)))
    return {
        "prompt": str(library.own_prompt(user)),
        "training_rows": len(rows),
        "steps": library.visits,
        "seconds": round(time.monotonic() - begun, 3),
    }
