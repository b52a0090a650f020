"""Whether the words nearest to a prompt say what it does ("wayward": Khashabi et al. 2022).

ArXiv 2112.08348: a prompt may lie near any text, and yet solve its task, so its nearest words need
not explain it. Here those words are asked as a hard prompt, beside the vectors themselves.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from jaxprompt.data.batches import with_member
from jaxprompt.data.examples import tokenize
from jaxprompt.data.rows import Rows
from jaxprompt.data.virtual_tokens import VirtualTokens
from jaxprompt.evaluation.analysis import nearest_words
from jaxprompt.evaluation.explain.variants import Subject, engine_of, judged, without
from jaxprompt.evaluation.statistics import mcnemar
from jaxprompt.inference.predict import predict
from jaxprompt.methods.hard_prompt import (
    allowed_words,
    as_template,
    nearest,
    rows_of,
    surviving,
    table_of,
)

SOFT = "the vectors themselves"
BY_COSINE, BY_DISTANCE = "nearest words by cosine", "nearest words by distance"
AS_TEXT = "nearest words by cosine, written and read"
RANDOM_WORDS, RANDOM_VECTORS, NOTHING = "random words", "random vectors as long", "nothing"


class Projected(NamedTuple):
    """A prompt in place of the vectors, and what it scores.

    text: its words; None where it has none. p: McNemar's, against the vectors themselves.
    """

    name: str
    accuracy: float
    log_p: float
    p: float | None
    text: str | None
    survives: bool | None  # whether reading the text gives the same tokens again


def project(subject: Subject, rows: Rows) -> list[Projected]:
    """The accuracy of the prompt, of its nearest words, and of random words and vectors.

    Args:
        subject: the prompt with its rows as examples.
        rows: the same rows, which are read again with words in place of the vectors.
    """
    prompt, tokenizer = subject.session.prompt, subject.tokenizer
    assert prompt is not None
    params, vectors = subject.session.backbone.params, prompt.vectors
    table = table_of(params)
    allowed = allowed_words(tokenizer, len(table), "all")
    choices = np.flatnonzero(allowed)
    # by cosine among allowed rows alone
    near = nearest_words(vectors, table[jnp.asarray(choices)], pieces=len(choices), count=1)
    words = {
        BY_COSINE: choices[near.ids[:, 0]],
        BY_DISTANCE: np.asarray(nearest(jnp.asarray(vectors), table, allowed)),
        RANDOM_WORDS: np.random.default_rng(0).choice(choices, len(vectors)),
    }
    random = np.asarray(subject.engine.injection.embeddings)[1]
    banks = {SOFT: vectors, RANDOM_VECTORS: random}
    banks |= {name: np.asarray(rows_of(params, jnp.asarray(ids))) for name, ids in words.items()}
    engine = engine_of(subject.session, list(banks.values()))
    examples = [
        with_member(example, member, subject.vocabulary, subject.length)
        for member in range(len(banks))
        for example in subject.examples
    ]
    bare = np.ones(subject.length, bool)
    examples += [
        without(example, subject.vocabulary, subject.length, bare) for example in subject.examples
    ]
    template = as_template(subject.task.template, words[BY_COSINE].tolist(), tokenizer)
    longer = subject.task.max_input_length + 4 * subject.length  # words are text, too
    written = subject.task.model_copy(update={"template": template, "max_input_length": longer})
    virtual = VirtualTokens(subject.vocabulary, 0)
    examples += tokenize(written, rows, tokenizer, virtual, need_targets=False)
    found = predict(
        engine, subject.task, examples, tokenizer, batch_size=subject.batch_size, pack=True,
        progress=subject.progress,
    )  # fmt: skip
    assert found.scores is not None
    names = [*banks, NOTHING, AS_TEXT]
    answers = judged(found.scores.reshape(len(names), len(rows), -1), subject.right)
    texts = {name: _text(ids, tokenizer) for name, ids in words.items()}
    kept = {name: bool(surviving(ids[None], tokenizer)[0]) for name, ids in words.items()}
    order = (SOFT, BY_COSINE, AS_TEXT, BY_DISTANCE, RANDOM_WORDS, RANDOM_VECTORS, NOTHING)
    made = {
        name: Projected(
            name, float(answers.correct[i].mean()), float(answers.log_p[i].mean()),
            None if name == SOFT else _p(answers.correct[0], answers.correct[i]),
            texts.get(name), kept.get(name),
        )
        for i, name in enumerate(names)
    }  # fmt: skip
    return [made[name] for name in order]


def _p(soft: Bool[np.ndarray, " n"], other: Bool[np.ndarray, " n"]) -> float:
    return mcnemar(int((soft & ~other).sum()), int((other & ~soft).sum()))


def _text(ids, tokenizer) -> str:
    return " ".join(tokenizer.token_text(int(id)).strip() for id in ids)
