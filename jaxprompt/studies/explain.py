"""Why a prompt answers as it does: importance, attributions, logit lens, words and probes.

Each part has a control: a prompt of random vectors that are as long as the prompt's.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxprompt.config.errors import UserError, listed, shown
from jaxprompt.config.schema import TaskConfig
from jaxprompt.config.values import Values
from jaxprompt.data.examples import tokenize
from jaxprompt.data.rows import Row, Rows
from jaxprompt.data.templates import input_columns
from jaxprompt.data.virtual_tokens import VirtualTokens
from jaxprompt.evaluation.explain import kinship, layers, probes, words
from jaxprompt.evaluation.explain.importance import Importance, importance
from jaxprompt.evaluation.explain.layers import Lens
from jaxprompt.evaluation.explain.probes import FEWEST_ROWS, Probe
from jaxprompt.evaluation.explain.tokens import TokenAttributions, token_attributions
from jaxprompt.evaluation.explain.variants import Subject, engine_of, random_like
from jaxprompt.evaluation.explain.words import Projected
from jaxprompt.inference.session import Session
from jaxprompt.methods.contents import changes_in
from jaxprompt.studies.compare_prompts import Answering, Asked, Questions, ask

PARTS = ("importance", "tokens", "lens", "probes", "words")
MEASURED_ROWS, DELETED_ROWS, TOKEN_ROWS = 16, 64, 6


class Probes(NamedTuple):
    """Probes of the text's mean state and of the state at the answer, by form of the prompt."""

    text: dict[str, Probe]
    answer: dict[str, Probe]
    type: str  # what gives a row its label in the control task


class Explained(NamedTuple):
    """What explains a prompt; None for parts that nobody asked for, or that cannot be had."""

    name: str
    facts: Values
    notes: list[str]  # what could not be explained, or holds with reservations
    importance: Importance | None = None
    tokens: TokenAttributions | None = None
    lens: dict[str, Lens] | None = None
    probes: Probes | None = None
    words: list[Projected] | None = None

    def to_json(self) -> Values:
        """JSON-ready, with numbers of five digits."""
        parts = {part: plain(getattr(self, part)) for part in PARTS}
        made = {part: value for part, value in parts.items() if value is not None}
        return {**self.facts, "notes": self.notes, **made}


def parts_of(text: str) -> list[str]:
    """The parts that a text names, "all" or names with commas. Raises UserError for others."""
    if text == "all":
        return list(PARTS)
    named = [part.strip() for part in text.split(",")]
    odd = [part for part in named if part not in PARTS]
    if odd:
        raise UserError(f"--explain is {shown(text)}; give all, or some of {', '.join(PARTS)}.")
    return named


def explain(
    name: str, session: Session, questions: Questions, parts: Sequence[str], rows: int,
    how: Answering,
) -> Explained:  # fmt: skip
    """Explain a prompt on rows of its task.

    Args:
        name: of the prompt, for errors and pages.
        session: a prompt with vectors.
        questions: which rows.
        parts: some of ``PARTS``.
        rows: at most; they are drawn at random, with ``how.seed``.
        how: the batch size, and who hears of progress and warnings.

    Raises:
        UserError: the prompt has no vectors, or its task has no labels.
    """
    check_explainable(name, session)
    asked = ask(name, session, questions, how.warn)
    subject, chosen, numbers, notes = _subject(asked, rows, how)
    facts = {
        "task": asked.task.name, "data": asked.origin, "rows": len(chosen),
        "backbone": session.backbone.source, "length": session.length,
    }  # fmt: skip
    found: Values = {}
    if "importance" in parts:
        some = subject.part(range(min(MEASURED_ROWS + DELETED_ROWS, len(chosen))))
        measured = min(MEASURED_ROWS, len(some.examples) // 2)
        if measured:
            found["importance"] = importance(some, measured)
        else:
            notes.append("importance: it needs two rows, one to measure and one to check.")
    if "tokens" in parts:
        _explain_tokens(subject, numbers, found, notes)
    if {"lens", "probes"} & {*parts}:
        _explain_layers(subject, chosen, parts, found, notes)
    if "words" in parts:
        found["words"] = words.project(subject, chosen)
    return Explained(name, facts, notes + _reservations(found), **found)


def check_explainable(name: str, session: Session) -> None:
    """Refuse what has no vectors. Raises UserError, which says what it has instead."""
    prompt = session.prompt
    if prompt is not None and len(prompt.vectors):
        return
    kinds = [] if prompt is None else [change["kind"] for change in changes_in(prompt.layers)]
    raise UserError(
        f"{name} has no virtual tokens, only {listed(kinds) or 'nothing'}; explanations are of a "
        "prompt's vectors, so changes of the layers (LoRA, prefixes, IA3, adapters) cannot be "
        "explained: leave out --explain, --data, --split, --task, --rows and --output, and inspect "
        "lists what it has."
    )


def _subject(asked: Asked, most: int, how: Answering) -> tuple[Subject, Rows, list[int], list[str]]:
    """The subject with rows drawn at random, those rows, their numbers, and first notes."""
    task, session, notes = asked.task, asked.session, []
    if not task.labels or task.decoding != "rank":
        raise UserError(
            f"Task {shown(task.name)} has its answers generated, and explanations are of the "
            "choice among labels; name a task with task.labels and decoding: rank."
        )
    if task.calibration is not None or task.label_prior is not None:
        notes.append(
            "The task is calibrated; explanations are of the likelihoods before calibration."
        )
        task = task.model_copy(update={"calibration": None, "label_prior": None})
    assert session.prompt is not None
    if session.prompt.layers is not None:
        kinds = listed(change["kind"] for change in changes_in(session.prompt.layers))
        notes.append(
            f"The prompt also changes the layers ({kinds}). That part is never explained: it stays "
            "as it is also where vectors are left out, random or words."
        )
    order = np.random.default_rng(how.seed).permutation(len(asked.rows))[:most].tolist()
    chosen = [asked.rows[i] for i in order]
    virtual = VirtualTokens(session.backbone.config.vocab_size, session.length)
    examples = tokenize(task, chosen, session.tokenizer, virtual, need_targets=False)
    names = {label: number for number, label in enumerate(task.labels or ())}
    right = np.array([names[str(asked.texts[i])] for i in order])
    vectors = session.prompt.vectors
    engine = engine_of(session, [vectors, random_like(vectors)])
    subject = Subject(session, engine, task, examples, right, how.progress, how.batch_size)
    return subject, chosen, order, notes


def _explain_tokens(
    subject: Subject, numbers: Sequence[int], found: Values, notes: list[str]
) -> None:
    some = range(min(TOKEN_ROWS, len(subject.examples)))
    try:
        found["tokens"] = token_attributions(subject.part(some), [numbers[i] for i in some])
    except UserError as error:
        notes.append(f"tokens: {error}")


def _explain_layers(
    subject: Subject, rows: Rows, parts: Sequence[str], found: Values, notes: list[str]
) -> None:
    """The logit lens and the probes, which read the same passes."""
    seen = layers.see_forms(subject)
    if "lens" in parts:
        found["lens"] = {form: layers.lens_of(subject, one) for form, one in seen.items()}
        first = layers.first_tokens(subject)
        if len({*first.tolist()}) < len(first):
            notes.append(
                "lens: some labels begin with the same token, and the lens sees first tokens "
                "alone, so it cannot tell these labels apart."
            )
    if "probes" not in parts:
        return
    if len(rows) < FEWEST_ROWS or len({*subject.right.tolist()}) < 2:
        notes.append(
            f"probes: they need {FEWEST_ROWS} rows with two labels or more, and there are "
            f"{len(rows)} of {len({*subject.right.tolist()})}."
        )
        return
    kind, types = word_types(subject.task, rows)
    found["probes"] = Probes(
        {form: probes.probe(one.text, subject.right, types) for form, one in seen.items()},
        {form: probes.probe(one.answer, subject.right, types) for form, one in seen.items()},
        kind,
    )


def word_types(task: TaskConfig, rows: Rows) -> tuple[str, list[str]]:
    """The word that is the type of each row in the control task, and which word it is.

    It is the first or the last of the first column, the one that repeats more in many kinds: a
    label of a word that comes but once cannot be learned.
    """
    column = input_columns(task)[0]
    words_of = [_words(row, column) for row in rows]
    choices = {}
    for kind, at in (("first", 0), ("last", -1)):
        types = [words[at] for words in words_of]
        counts = {name: types.count(name) for name in {*types}}
        repeated = sum(count for count in counts.values() if count > 1)
        choices[kind] = (repeated if len(counts) > 1 else -1), types
    best = max(choices, key=lambda kind: choices[kind][0])
    return f"the {best} word of {column!r}", choices[best][1]


def _words(row: Row, column: str) -> list[str]:
    return str(row.get(column, "")).casefold().split() or [""]


def _reservations(found: Values) -> list[str]:
    """What the numbers themselves say against the explanations."""
    notes = []
    vectors, tokens = found.get("importance"), found.get("tokens")
    if vectors is not None and not (vectors.tuned.complete and vectors.random.complete):
        notes.append(
            "importance: the integrated gradients do not add up to the difference of the outputs "
            f"within 2% (tuned: {vectors.tuned.gap:.3g} of {vectors.tuned.difference:.3g} nats, "
            f"random: {vectors.random.gap:.3g} of {vectors.random.difference:.3g}); read their "
            "order, not their size."
        )
    if tokens is not None and not tokens.complete:
        notes.append(
            "tokens: the attributions of some forms do not add up to the difference of the outputs "
            "within 2%; read their order, not their size."
        )
    return notes


def kin(sessions: Mapping[str, Session]) -> kinship.Kinship:
    """How alike the vectors of several prompts are.

    Raises:
        UserError: one has no vectors, or they are of different widths.
    """
    vectors = {}
    for name, session in sessions.items():
        check_explainable(name, session)
        assert session.prompt is not None
        vectors[name] = session.prompt.vectors
    widths = {name: rows.shape[1] for name, rows in vectors.items()}
    if len({*widths.values()}) > 1:
        raise UserError(
            "Vectors of different widths cannot be compared, and "
            f"{listed(f'{name} has {width}' for name, width in widths.items())} numbers; leave out "
            "the prompts of other backbones."
        )
    return kinship.kinship(list(vectors), list(vectors.values()))


def plain(value: object) -> object:
    """Named tuples as objects, arrays as lists, numbers of five digits."""
    fields = getattr(value, "_fields", None)
    if fields is not None:
        return {key: plain(getattr(value, key)) for key in fields}
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, float | np.floating):
        return float(f"{float(value):.5g}")
    return int(value) if isinstance(value, np.integer) else value
