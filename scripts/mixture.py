"""Turn the corpus into packed rows of a text-to-text mixture whose instructions stand in front.

Objectives: span corruption, prefix language modelling, dictionary definition <-> headword, masked
or plain genus word of a definition, field, part of speech, topic and source labels (open, among
listed options, yes/no, or renamed to arbitrary words), unscrambling, "which word occurs". The
instruction is worded in several ways, padded with stray words, left away, or replaced by virtual
tokens: every task, and each of many random "micro tasks" (a few classes of one labelling, renamed
or not), owns trainable vectors in a bank that is thrown away after pre-training. It makes the
backbone used to being told what to do by vectors in front of its input, which is all that a soft
prompt can do.

Rows: `inputs, input_segments [n, S]`, `targets, target_segments, weights, objectives [n, T]`. A
target token weighs 1/sqrt(length of its target), so that labels are not drowned by long targets.

    python scripts/mixture.py --corpus corpus --tokens 14e6 \
        --tokenizer jaxprompt/builtin/backbone --out rows.npz
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

VOCABULARY, SENTINEL_0, EOS = 8192, 8191, 1
INPUT, TARGET = 128, 24  # S and T of a row
PROMPT, MICRO_TASKS = 50, 96  # vectors a prompt, number of micro tasks

FIELDS = {
    "Zool.": "zoology", "Bot.": "botany", "Chem.": "chemistry", "Med.": "medicine",
    "Anat.": "anatomy",
    "Naut.": "seafaring", "Law": "law", "Min.": "minerals", "Biol.": "biology", "Mus.": "music",
    "Music": "music", "Arch.": "architecture", "Mil.": "war", "Physiol.": "physiology",
    "Math.": "mathematics", "Physics": "physics", "Astron.": "astronomy", "Geol.": "geology",
    "Mach.": "machines", "Geom.": "geometry", "Her.": "heraldry", "Mining": "mining",
    "Elec.": "electricity", "Gram.": "grammar", "Eccl.": "church", "Mech.": "mechanics",
    "Paleon.": "fossils", "Surg.": "surgery", "Print.": "printing", "R. C. Ch.": "church",
    "Ethnol.": "peoples", "Fort.": "fortification", "Com.": "commerce", "Computers": "computers",
    "Logic": "logic", "Rhet.": "rhetoric", "Theol.": "religion", "Metal.": "metals",
    "Opt.": "optics",
    "Far.": "horses", "Cookery": "cooking", "Carp.": "carpentry", "Fine Arts": "art",
    "Shipbuilding": "ships", "Baseball": "sport", "Golf": "sport", "Football": "sport",
    "Cricket": "sport", "Sports": "sport", "Photog.": "photography", "Paint.": "painting",
    "Card Playing": "games", "Agric.": "farming", "Hort.": "gardening", "Railroad": "railways",
    "Railroads": "railways", "Geography": "geography", "Geog.": "geography", "Weaving": "weaving",
    "Class. Myth.": "myth", "Gr. Myth.": "myth", "Myth.": "myth", "Falconry": "hunting",
    "Meteor.": "weather", "Pharm.": "drugs", "Finance": "money", "Stock Exchange": "money",
    "Gun.": "weapons", "Firearms": "weapons", "Masonry": "building", "Pros.": "poetry",
}  # fmt: skip
# "film essay" is a misnomer (cfi-en is about hacker culture), kept as it was trained.
SOURCES = {
    "anarchism": "politics", "bible_kjv": "scripture", "brown": "press", "janeaustenr": "novel",
    "crawl-common": "quotation", "endless-sky-data": "space story", "fortunes": "saying",
    "mh-book": "mail manual", "debian_descriptions": "software", "debian-handbook": "handbook",
    "jargon-text": "slang", "gnome-user-docs": "help page", "cfi-en": "film essay",
}  # fmt: skip
PROSE = {
    "anarchism": 5, "bible_kjv": 3, "brown": 8, "janeaustenr": 4, "crawl-common": 1,
    "endless-sky-data": 1.5, "fortunes": 2, "mh-book": 1, "debian_descriptions": 4,
    "debian-handbook": 0.6, "jargon-text": 0.7, "gnome-user-docs": 0.3, "cfi-en": 0.4,
}  # fmt: skip
SHARES = {  # of examples
    "span": 0.05, "prefix": 0.03, "define_span": 0.08, "headword": 0.12, "definition": 0.03,
    "genus": 0.16, "field": 0.09, "topic": 0.02, "part": 0.02, "source": 0.04, "options": 0.10,
    "yes_no": 0.04, "renamed": 0.04, "unscramble": 0.01, "occurs": 0.02, "micro": 0.15,
}  # fmt: skip
LATE_SHARES = {  # the last part of the training: answers that stand in the instruction
    "span": 0.03, "prefix": 0.01, "define_span": 0.04, "headword": 0.06, "definition": 0.01,
    "genus": 0.12, "field": 0.06, "topic": 0.02, "part": 0.01, "source": 0.03, "options": 0.17,
    "yes_no": 0.03, "renamed": 0.12, "unscramble": 0.01, "occurs": 0.09, "micro": 0.19,
}  # fmt: skip
OBJECTIVES = tuple(SHARES)
LONG = ("span", "prefix")  # of these, more than 50 tokens of text are kept
WORDINGS = {
    "span": [
        "Fill in the blanks:",
        "Restore the missing words:",
        "What is missing?",
        "Complete the gaps in this text:",
    ],
    "prefix": ["Continue the text:", "What comes next?", "Go on:", "Write the rest of this:"],
    "define_span": ["Fill in the blanks:", "Complete the dictionary entry:", "What is missing?"],
    "headword": [
        "Which word is defined?",
        "Name the word that means:",
        "What is the word for this?",
        "Give the headword:",
    ],
    "definition": [
        "Define the word:",
        "What does this word mean?",
        "Give a definition of:",
        "Explain:",
    ],
    "genus": [
        "What kind of thing is this?",
        "Name the kind of thing:",
        "It is a kind of what?",
        "Give the general word:",
    ],
    "field": [
        "Which field is this from?",
        "Name the subject:",
        "What branch of knowledge uses this word?",
        "Subject area?",
    ],
    "topic": [
        "What is the topic?",
        "Name the computing topic:",
        "Which topic does this belong to?",
    ],
    "part": [
        "What part of speech is defined?",
        "Part of speech?",
        "Is it a noun, verb, adjective or adverb?",
    ],
    "source": [
        "Where is this text from?",
        "What kind of writing is this?",
        "Name the type of text:",
    ],
    "unscramble": [
        "Put the words in order:",
        "Unscramble:",
        "Write the words in their right order:",
    ],
    "occurs": [
        "Which of these words occurs in the text?",
        "Which word is in the text?",
        "Find the word that is mentioned.",
    ],
}
LISTING = ["{q} {o}.", "{q} Choose from: {o}.", "{q} Options: {o}.", "Choose one of {o}. {q}"]


class Labelled(NamedTuple):
    """A labelling of texts: `classes[c]` are the texts of class c; `task` asks for it in words."""

    task: str
    classes: dict[str, list[str]]


class Draft(NamedTuple):
    """An example before tokenization; `blank`: noise spans are cut after it."""

    objective: str
    prompt: int  # number of the bank's prompt
    instruction: str | None  # None: virtual tokens are the only way to know
    text: str
    target: str | None  # None: made from the text's tokens (span corruption, prefix)


def clean(definition: str, rng: np.random.Generator) -> str:
    """A definition as people print them: its first sentence, mostly without capital and dot."""
    if rng.random() < 0.8:
        definition = re.split(r"(?<=[a-z)]{2})\. (?=[A-Z])|; -- | -- ", definition)[0]
    if rng.random() < 0.3:
        definition = definition.split(";")[0]
    if rng.random() < 0.6:
        definition = definition[:1].lower() + definition[1:].rstrip(" .;")
    return definition[:500]


NOT_GENUS = set(
    "one any kind sort species genus act state quality name part same person form that".split()
)


def genus(definition: str) -> str | None:
    """The head noun of "A(n|ny) ... NOUN of|which|that|...", where the pattern is plain to see."""
    match = re.match(
        r"(?:An?|The|Any|Any one of several(?: species of)?|One of the|Some)((?: [a-z-]+,?){1,4}?)"
        r"(?= (?:of|which|that|with|in|on|for|used|having|who|made|by|to|from|resembling|or)\b"
        r"|[;.]|, )",
        definition,
    )
    word = match[1].split()[-1].strip(",") if match else ""
    return (
        word if len(word) > 2 and word not in NOT_GENUS and word[-2:] not in ("ed", "ly") else None
    )


def balanced(counts: dict[str, list[str]], rng: np.random.Generator, power: float = 0.5) -> str:
    """A class drawn with probability proportional to its size to the given power."""
    names = list(counts)
    sizes = np.array([len(counts[n]) for n in names], float) ** power
    return names[rng.choice(len(names), p=sizes / sizes.sum())]


class Mixture:
    """All texts, and one method for each objective that drafts a random example."""

    def __init__(self, corpus: Path, seed: int):
        self.rng = np.random.default_rng(seed)
        self.prose = {n: (corpus / "text" / f"{n}.txt").read_text().splitlines() for n in PROSE}
        self.senses = [json.loads(line) for line in open(corpus / "gcide.jsonl")]
        foldoc = [json.loads(line) for line in open(corpus / "foldoc.jsonl")]
        groups: dict[str, dict[str, list[str]]] = {
            k: {} for k in ("field", "part", "topic", "genus")
        }
        for sense in self.senses:
            text = sense["definition"]
            if (field := FIELDS.get(sense["field"])) is not None:
                groups["field"].setdefault(field, []).append(text)
            if sense["part"] in ("noun", "verb", "adjective", "adverb"):
                groups["part"].setdefault(sense["part"], []).append(text)
            if (word := genus(text)) is not None:
                groups["genus"].setdefault(word, []).append(text)
        for row in foldoc:
            if row["topic"]:
                groups["topic"].setdefault(row["topic"], []).append(row["definition"])
        least = {"field": 40, "part": 1, "topic": 40, "genus": 25}
        self.labelled = {
            k: Labelled(k, {n: t for n, t in g.items() if len(t) >= least[k]})
            for k, g in groups.items()
        }
        self.all_genus = groups["genus"]
        self.labelled["source"] = Labelled("source", {SOURCES[n]: t for n, t in self.prose.items()})
        self.definitions = [(s["headword"], s["definition"]) for s in self.senses] + [
            (r["headword"], r["definition"]) for r in foldoc
        ]
        words = Counter(
            w
            for n in ("brown", "janeaustenr")
            for p in self.prose[n][:6000]
            for w in re.findall(r"\b[a-z]{3,8}\b", p)
        )
        self.words = [w for w, _ in words.most_common(3000)[150:]]
        # The micro tasks are fixed by their own seed: all shards of the data must agree about them.
        fixed = np.random.default_rng(1234)
        self.micro = [self.new_micro(fixed) for _ in range(MICRO_TASKS)]

    def new_micro(self, rng: np.random.Generator) -> tuple[str, dict[str, str]]:
        kind = ("field", "genus", "source", "topic", "part", "field", "genus", "genus")[
            rng.integers(8)
        ]
        names = list(self.labelled[kind].classes)
        if kind == "genus":  # frequent ones carry enough texts to be learned
            names = sorted(names, key=lambda n: -len(self.labelled[kind].classes[n]))[:80]
        chosen = rng.permutation(names)[: rng.integers(2, 8)]
        renamed = rng.permutation(self.words)[: len(chosen)] if rng.random() < 0.5 else chosen
        return kind, {str(a): str(b) for a, b in zip(chosen, renamed, strict=True)}

    def word(self) -> str:
        return self.words[self.rng.integers(len(self.words))]

    def wording(self, task: str) -> str:
        return WORDINGS[task][self.rng.integers(len(WORDINGS[task]))]

    def passage(self) -> tuple[str, str]:
        """A prose source and 15 to 70 words of one or more of its paragraphs."""
        names = list(PROSE)
        weights = np.array(list(PROSE.values()))
        name = names[self.rng.choice(len(names), p=weights / weights.sum())]
        lines = self.prose[name]
        at = int(self.rng.integers(len(lines)))
        size = int(self.rng.integers(15, 70))
        words = lines[at].split()
        while len(words) < size and at + 1 < len(lines):
            at += 1
            words += lines[at].split()
        start = (
            0 if self.rng.random() < 0.5 else int(self.rng.integers(max(1, len(words) - size + 1)))
        )
        return name, " ".join(words[start : start + size])

    def one_of(self, kind: str, name: str) -> str:
        texts = self.labelled[kind].classes[name]
        text = texts[self.rng.integers(len(texts))]
        if kind == "source":
            words = text.split()
            size = int(self.rng.integers(10, 45))
            start = int(self.rng.integers(max(1, len(words) - size + 1)))
            return " ".join(words[start : start + size])
        if kind == "genus" and self.rng.random() < 0.5:
            return self.hide(clean(text, self.rng), name)
        return clean(text, self.rng)

    def hide(self, text: str, word: str) -> str:
        return re.sub(rf"\b{re.escape(word)}(e?s)?\b", "thing", text)

    def draft(self, objective: str) -> Draft:
        rng, number = self.rng, OBJECTIVES.index(objective)
        if objective in ("span", "prefix"):
            return Draft(objective, number, self.wording(objective), self.passage()[1], None)
        if objective in ("define_span", "headword", "definition"):
            headword, text = self.definitions[rng.integers(len(self.definitions))]
            headword = headword.lower() if rng.random() < 0.8 else headword
            text = clean(text, rng)
            ask = self.wording(objective)
            if objective == "define_span":
                return Draft(objective, number, ask, f"{headword}: {text}", None)
            if objective == "headword":
                return Draft(objective, number, ask, text, headword)
            return Draft(objective, number, ask, headword, text)
        if objective == "genus":
            name = balanced_cached(self, "all_genus")
            text = self.all_genus[name][rng.integers(len(self.all_genus[name]))]
            text = clean(text, rng)
            text = self.hide(text, name) if rng.random() < 0.75 else text
            return Draft(objective, number, self.wording("genus"), text, name)
        if objective in ("field", "topic", "part", "source"):
            name = balanced_cached(self, objective)
            return Draft(
                objective, number, self.wording(objective), self.one_of(objective, name), name
            )
        if objective == "unscramble":
            sentence = re.split(r"(?<=[.;?!])\s", self.passage()[1])[0].split()[:12]
            mixed = " ".join(rng.permutation(sentence))
            return Draft(objective, number, self.wording(objective), mixed, " ".join(sentence))
        if objective == "occurs":
            _, text = (
                self.passage()
                if rng.random() < 0.5
                else ("", clean(self.definitions[rng.integers(len(self.definitions))][1], rng))
            )
            inside = [w for w in re.findall(r"\b[a-z]{4,}\b", text)] or [self.word()]
            answer = inside[rng.integers(len(inside))]
            options = [answer] + [
                w for w in (self.word() for _ in range(rng.integers(1, 5))) if w not in text
            ]
            return Draft(
                objective, number, self.listed(self.wording("occurs"), options), text, answer
            )
        if objective == "micro":
            k = int(rng.integers(MICRO_TASKS))
            kind, labels = self.micro[k]
            name = list(labels)[rng.integers(len(labels))]
            return Draft(
                objective, len(OBJECTIVES) + k, None, self.one_of(kind, name), labels[name]
            )
        # options, yes_no, renamed: the same labellings, with the classes named in the instruction
        kind = ("field", "genus", "source", "topic", "part")[
            rng.choice(5, p=[0.35, 0.35, 0.14, 0.08, 0.08])
        ]
        name = balanced_cached(self, kind)
        text = self.one_of(kind, name)
        others = [n for n in self.labelled[kind].classes if n != name]
        if objective == "yes_no":
            yes = rng.random() < 0.5
            asked = name if yes else others[rng.integers(len(others))]
            ask = [
                f"{self.wording(kind)} Is it {asked}?",
                f"Is this {asked}? Answer yes or no.",
                f"{asked}, yes or no?",
            ]
            return Draft(objective, number, ask[rng.integers(3)], text, "yes" if yes else "no")
        options = [name, *rng.permutation(others)[: rng.integers(1, 6)]]
        if objective == "options":
            return Draft(objective, number, self.listed(self.wording(kind), options), text, name)
        options = options[:4]
        words = rng.permutation(self.words)[: len(options)]
        order = rng.permutation(len(options))
        form = ("{} = {}", "{}: {}", "say {1} for {0}", "if {} then {}")[rng.integers(4)]
        rules = ", ".join(form.format(options[i], words[i]) for i in order)
        return Draft(objective, number, f"{rules}.", text, str(words[0]))

    def listed(self, question: str, options: list[str]) -> str:
        shuffled = [str(o) for o in self.rng.permutation(options)]
        joined = (", ".join(shuffled), " or ".join(shuffled))[self.rng.integers(2)]
        return LISTING[self.rng.integers(len(LISTING))].format(q=question, o=joined)


def balanced_cached(mixture: Mixture, kind: str) -> str:
    """`balanced` over a labelling, its probabilities computed once."""
    cache = mixture.__dict__.setdefault("_cache", {})
    if kind not in cache:
        classes = mixture.all_genus if kind == "all_genus" else mixture.labelled[kind].classes
        sizes = np.array([len(t) for t in classes.values()], float) ** 0.6
        cache[kind] = list(classes), np.cumsum(sizes / sizes.sum())
    names, cumulative = cache[kind]
    return names[min(int(np.searchsorted(cumulative, mixture.rng.random())), len(names) - 1)]


def corrupt(
    ids: np.ndarray, rng: np.random.Generator, rate: float = 0.15, mean: float = 3.0
) -> tuple[list[int], list[int]]:
    """T5's span corruption: inputs with sentinels in place of spans, targets with the spans."""
    noisy = max(1, round(len(ids) * rate))
    spans = max(1, min(round(noisy / mean), len(ids) - noisy))
    cuts = (
        lambda total, parts: np.diff(  # a random composition
            np.concatenate([[0], np.sort(rng.permutation(total - 1)[: parts - 1]) + 1, [total]])
        )
    )
    noise, kept = cuts(noisy, spans), cuts(max(len(ids) - noisy, spans), spans)
    inputs: list[int] = []
    targets: list[int] = []
    at = 0
    for number, (k, n) in enumerate(zip(kept, noise, strict=True)):
        inputs += [*ids[at : at + k], SENTINEL_0 - number]
        targets += [SENTINEL_0 - number, *ids[at + k : at + k + n]]
        at += k + n
    return inputs, targets


def virtual(prompt: int, rng: np.random.Generator) -> list[int]:
    """Ids of the first n vectors of a prompt; n is mostly 20."""
    n = (5, 20, PROMPT)[rng.choice(3, p=[0.15, 0.65, 0.2])]
    return list(range(VOCABULARY + prompt * PROMPT, VOCABULARY + prompt * PROMPT + n))


def finish(
    draft: Draft, front: list[int], body: list[int], target: list[int], rng: np.random.Generator
) -> tuple[list[int], list[int]]:
    """Ids of one example: what stands in front (words, virtual tokens, noise), text, target."""
    if draft.objective == "prefix":
        body = body[:90]
        cut = int(rng.integers(len(body) // 3, max(len(body) // 3 + 1, 2 * len(body) // 3)))
        body, target = body[: max(1, cut)], body[max(1, cut) : cut + TARGET - 1]
    elif target is None:
        body, target = (
            corrupt(np.array(body[: 85 if draft.objective == "span" else 50]), rng)
            if len(body) > 4
            else (body, body)
        )
    choice = rng.random()
    listed = draft.objective in ("options", "yes_no", "renamed", "occurs")  # words are needed
    if draft.instruction is None:
        before = virtual(draft.prompt, rng)
    elif choice < 0.3:
        before = virtual(draft.prompt, rng) + (front if listed else [])
    elif choice < 0.4:
        before = [] if draft.objective in ("span", "define_span", "prefix", "headword") else front
    else:
        before = front
    if rng.random() < 0.06:  # stray tokens in front: position and surprise must not matter
        before = list(rng.integers(100, VOCABULARY - 100, rng.integers(4, 50))) + before
    room = INPUT - 1 - len(before)
    return [*before, *body[: min(room, 90 if draft.objective in LONG else 50)], EOS], [
        *target[: TARGET - 1],
        EOS,
    ]


class Packer:
    """First fit into a bounded set of open rows; a row that is nearly full, or old, is written."""

    def __init__(self, open_rows: int = 48):
        self.open: list[list[tuple[int, list[int], list[int]]]] = []
        self.room: list[list[int]] = []
        self.done: list[list[tuple[int, list[int], list[int]]]] = []
        self.limit = open_rows

    def add(self, objective: int, inputs: list[int], targets: list[int]) -> None:
        for i, (s, t) in enumerate(self.room):  # noqa: B007 - i is where the search stopped
            if len(inputs) <= s and len(targets) <= t:
                break
        else:
            i = len(self.open)
            self.open.append([])
            self.room.append([INPUT, TARGET])
        self.open[i].append((objective, inputs, targets))
        self.room[i][0] -= len(inputs)
        self.room[i][1] -= len(targets)
        full = self.room[i][0] < 12 or self.room[i][1] < 2
        if full or len(self.open) > self.limit:
            i = i if full else 0
            self.done.append(self.open.pop(i))
            self.room.pop(i)


def to_arrays(rows: list) -> dict[str, np.ndarray]:
    n = len(rows)
    out = {
        "inputs": np.zeros((n, INPUT), np.uint16),
        "input_segments": np.zeros((n, INPUT), np.uint8),
        "targets": np.zeros((n, TARGET), np.uint16),
        "target_segments": np.zeros((n, TARGET), np.uint8),
        "weights": np.zeros((n, TARGET), np.float16),
        "objectives": np.zeros((n, TARGET), np.uint8),
    }
    for r, row in enumerate(rows):
        s = t = 0
        for number, (objective, inputs, targets) in enumerate(row, 1):
            a, b = slice(s, s + len(inputs)), slice(t, t + len(targets))
            out["inputs"][r, a], out["input_segments"][r, a] = inputs, number
            out["targets"][r, b], out["target_segments"][r, b] = targets, number
            out["weights"][r, b] = len(targets) ** -0.5
            out["objectives"][r, b] = objective
            s, t = s + len(inputs), t + len(targets)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--tokens", type=float, default=25e6, help="filled positions, inputs and targets"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--late", action="store_true", help="the shares of the last part")
    parser.add_argument("--show", type=int, default=0, help="print so many examples and stop")
    args = parser.parse_args()

    tokenizer = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
    mixture = Mixture(args.corpus, args.seed)
    rng = mixture.rng
    wanted = LATE_SHARES if args.late else SHARES
    names, shares = list(wanted), np.array(list(wanted.values()))
    encode: Callable[[list[str]], list[list[int]]] = lambda texts: [
        e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)
    ]
    packer, total, counts = Packer(), 0, Counter()
    while total < args.tokens:
        picks = rng.choice(len(names), size=args.show or 4096, p=shares / shares.sum())
        drafts = [mixture.draft(names[i]) for i in picks]
        fronts = encode([d.instruction or "" for d in drafts])
        bodies = encode([d.text for d in drafts])
        targets = encode([d.target or "" for d in drafts])
        for draft, front, body, target in zip(drafts, fronts, bodies, targets, strict=True):
            ids = finish(draft, front, body, target if draft.target is not None else None, rng)
            if args.show:
                text = [
                    tokenizer.decode([i for i in x if i < VOCABULARY], skip_special_tokens=False)
                    for x in ids
                ]
                print(
                    draft.objective,
                    sum(i >= VOCABULARY for i in ids[0]),
                    "|",
                    text[0],
                    "=>",
                    text[1],
                )
                continue
            packer.add(OBJECTIVES.index(draft.objective), *ids)
            total += len(ids[0]) + len(ids[1])
            counts[draft.objective] += len(ids[0]) + len(ids[1])
        if args.show:
            return
    arrays = to_arrays(packer.done)
    order = rng.permutation(len(packer.done))
    np.savez(args.out, **{k: v[order] for k, v in arrays.items()})
    fill = [(arrays[k] > 0).mean().round(3) for k in ("input_segments", "target_segments")]
    report = {
        "rows": len(order),
        "tokens": total,
        "fill": [float(f) for f in fill],
        "tokens_by_objective": dict(counts),
    }
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
