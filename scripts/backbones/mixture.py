"""Draw the supervised part of the built-in backbone's pre-training mixture from the corpus.

Objectives: dictionary definition <-> headword, masked or plain genus word of a definition, field,
part of speech, topic and source labels (open, among listed options, yes/no, or renamed to
arbitrary words), unscrambling, "which word occurs". The instruction is worded in several ways,
padded with stray words, left away, or replaced by virtual tokens: every objective, and each of
many random "micro tasks" (some classes of one labelling, one class against the rest, or a
yes/no question about two texts), owns a prompt in a bank that is thrown away after pre-training.
It makes the backbone used to being told what to do by vectors in front of its input, which is all
that a soft prompt can do.

Writes into OUT: `pairs.jsonl` (rows `{"input", "target", "prompt" or none}`, the pairs source of
`jaxprompt pretrain`), `definitions.txt` ("headword: definition" a line, a text source for span
corruption) and `mixture.json` (rows of each objective, number of prompts, seed). All is a pure
function of the corpus and the seed.

    python scripts/backbones/mixture.py --corpus corpus --out mix \
        [--rows 600000] [--seed 0] [--show 3]
"""

import argparse
import itertools
import json
import re
from bisect import bisect
from collections import Counter
from pathlib import Path
from random import Random
from typing import NamedTuple

import mixture_tables as tables

BODY, DEFINITION = 38, 16  # words of a text that are kept, and of a definition to be written
MICRO_TASKS = 128
PROMPTS = {
    name: k for k, name in enumerate(n for n in tables.SHARES if n != "micro")
}  # micro tasks next
QUESTIONS = ("contains", "match", "same")  # micro tasks about two texts


class Draft(NamedTuple):
    """An example before it is decided what stands in front of its text."""

    prompt: int
    instruction: str | None  # None: virtual tokens are the only way to know
    text: str
    target: str


class Micro(NamedTuple):
    """A micro task: what to answer for each class of a labelling.

    rest: answer for all classes that are not in ``labels``, if there is one.
    question: instead ask it about two texts, with answers ``labels["yes"]`` and ``labels["no"]``.
    """

    kind: str
    labels: dict[str, str]
    rest: str | None = None
    question: str | None = None


def tidy_definition(text: str) -> str:
    """A definition without marks: language, acronym, author, rarity, field (a giveaway)."""
    text = re.sub(r"\([A-Z][A-Za-z&. ]{0,14}\.\)|^Hence[:,] ", "", text)
    text = re.sub(r"^[ .]*(pl|F|N?L|LL|It|Sp|G|OF|Ar|Pg|D|R|OE|Ir)\.? +(?=[A-Z(])", "", text)
    text = re.sub(r"^[ ,.:]*(\([^)]*\)[ ,.;:]*)*", "", text)
    return " ".join(re.sub(r"\s+R$|\s--[A-Z][\w. ]*$", "", text).split())


def tidy_prose(text: str) -> str:
    """Running text without the marks of its package, which would give its source away."""
    text = text.replace("``", '"').replace("''", '"')
    text = re.sub(r" ([.,;:?!])(?= |$)", r"\1", text)  # one package separates punctuation
    return re.sub(r"\s+", " ", re.sub(r"%+", " ", text)).strip()


def tidy_passages(text: str, name: str) -> list[str]:
    """The passages of one line; collections of quotations separate theirs by percent signs."""
    parts = text.split(" % ") if name == "fortunes" else text.split("%%%%")
    return [p for p in map(tidy_prose, parts) if p.count(" ") > 5]


def first_sentence(definition: str, rng: Random) -> str:
    """A definition as people print them: mostly its first sentence, without capital and dot."""
    if rng.random() < 0.8:
        definition = re.split(r'(?<=[a-z)]{2})(?<! esp)(?<! etc)\. (?=["A-Z])|;? -- ', definition)[
            0
        ]
    if rng.random() < 0.3:
        definition = definition.split(";")[0]
    if rng.random() < 0.6:
        definition = definition[:1].lower() + definition[1:].rstrip(" .;")
    return cut(definition)


def cut(text: str, words: int = BODY) -> str:
    return " ".join(text.split()[:words])


def snippet(text: str, rng: Random) -> str:
    """10 to BODY words from anywhere in a text."""
    words = text.split()
    size = rng.randint(10, BODY)
    start = rng.randrange(max(1, len(words) - size + 1))
    return " ".join(words[start : start + size])


def content_words(text: str) -> list[str]:
    return re.findall(r"\b[a-z]{4,}\b", text)


def hide(text: str, word: str) -> str:
    return re.sub(rf"\b{re.escape(word)}(e?s)?\b", "thing", text)


def genus(definition: str) -> str | None:
    """The head noun of "A(n|ny) ... NOUN of|which|that|...", where the pattern is plain to see."""
    match = re.match(
        r"(?:An?|The|Any|Any one of several(?: species of)?|One of the|Some)((?: [a-z-]+,?){1,4}?)"
        r"(?= (?:of|which|that|with|in|on|for|used|having|who|made|by|to|from|resembling|or)\b"
        r"|[;.]|, )",
        definition,
    )
    word = match[1].split()[-1].strip(",") if match else ""
    plain = len(word) > 2 and word not in tables.NOT_GENUS and word[-2:] not in ("ed", "ly")
    return word if plain else None


class Classes:
    """Texts by class; ``draw`` takes a class with probability proportional to its size ** 0.6."""

    def __init__(self, texts: dict[str, list[str]], least: int = 1):
        self.texts = {name: t for name, t in texts.items() if len(t) >= least}
        self.names = list(self.texts)
        self.edges = list(itertools.accumulate(len(t) ** 0.6 for t in self.texts.values()))

    def draw(self, rng: Random) -> str:
        at = bisect(self.edges, rng.random() * self.edges[-1])
        return self.names[min(at, len(self.names) - 1)]

    def draw_other(self, rng: Random, than) -> str:
        """A class that is not in ``than``."""
        while (name := self.draw(rng)) in than:
            pass
        return name


class Mixture:
    """All texts, and one method for each family of objectives that drafts a random example."""

    def __init__(self, corpus: Path, seed: int):
        self.rng = Random(f"examples {seed}")
        lines = lambda name: (corpus / "text" / f"{name}.txt").read_text("utf-8").splitlines()
        self.prose = {
            n: [passage for line in lines(n) for passage in tidy_passages(line, n)]
            for n in tables.PROSE
        }
        self.definitions: list[tuple[str, str]] = []
        self.read_dictionaries(corpus)
        counts = Counter(
            word
            for name in ("brown", "janeaustenr")
            for passage in self.prose[name][:6000]
            for word in re.findall(r"\b[a-z]{3,8}\b", passage)
        )
        self.words = [word for word, _ in counts.most_common(3000)[150:]]
        fixed = Random(f"micro tasks {seed}")  # they do not depend on how many rows are drawn
        self.micro = [self.new_micro(fixed) for _ in range(MICRO_TASKS)]

    def read_dictionaries(self, corpus: Path) -> None:
        rows = [
            json.loads(line)
            for name in ("gcide", "foldoc")
            for line in (corpus / f"{name}.jsonl").read_text("utf-8").splitlines()
        ]
        nouns = {row["headword"].lower() for row in rows if row.get("part") == "noun"}
        groups: dict[str, dict[str, list[str]]] = {}
        for row in rows:
            headword, text = row["headword"], tidy_definition(row["definition"])
            # Left out: references to other entries, the dictionaries' words about themselves.
            if re.match(r"[Ss]ame as |See |of [A-Z]", text) or len(text) < 8:
                continue
            if not headword[:1].isalpha() or "%" in headword:
                continue
            self.definitions.append((headword, text))
            part, noun = row.get("part"), genus(text)
            labels = {
                "field": tables.FIELDS.get(row.get("field")),
                "part": None if part == "preposition" else part,
                "topic": row.get("topic"),
                "genus": noun if part and noun in nouns else None,
            }
            for kind, label in labels.items():
                if label:
                    groups.setdefault(kind, {}).setdefault(label, []).append(text)
        self.all_genus = Classes(groups["genus"])
        least = {"field": 40, "part": 1, "topic": 40, "genus": 25}
        self.labelled = {k: Classes(texts, least[k]) for k, texts in groups.items()}
        self.labelled["source"] = Classes({tables.SOURCES[n]: t for n, t in self.prose.items()})

    def new_micro(self, rng: Random) -> Micro:
        """Half tell classes apart, most others one class from the rest, some ask a question."""
        form = rng.random()
        arbitrary = rng.sample(self.words, 7)
        yes, no = rng.choice(tables.ANSWERS) if rng.random() < 0.6 else arbitrary[:2]
        yes, no = (no, yes) if rng.random() < 0.25 else (yes, no)  # some are negated
        if form < 0.15:
            kind = rng.choice(("field", "genus", "source", "topic"))
            return Micro(kind, {"yes": yes, "no": no}, question=rng.choice(QUESTIONS))
        kinds = {"field": 2, "genus": 3, "source": 2, "topic": 1, "part": 1}
        (kind,) = rng.choices(list(kinds), list(kinds.values()))
        texts = self.labelled[kind].texts
        names = sorted(texts, key=lambda n: -len(texts[n]))[:80]  # enough of each to be learned
        if form < 0.5:
            count = 1 if kind == "part" else rng.choice((1, 1, 1, 2, 3))
            return Micro(kind, dict.fromkeys(rng.sample(names, count), yes), no)
        chosen = rng.sample(names, min(rng.randint(2, 7), len(names)))
        renamed = arbitrary if rng.random() < 0.5 else chosen
        return Micro(kind, dict(zip(chosen, renamed, strict=False)))

    def passage(self) -> str:
        (name,) = self.rng.choices(list(tables.PROSE), list(tables.PROSE.values()))
        return snippet(self.rng.choice(self.prose[name]), self.rng)

    def text_of(self, kind: str, name: str) -> str:
        """A text of a class; half of those that name their genus have it hidden."""
        text = self.rng.choice(self.labelled[kind].texts[name])
        if kind == "source":
            return snippet(text, self.rng)
        text = first_sentence(text, self.rng)
        return hide(text, name) if kind == "genus" and self.rng.random() < 0.5 else text

    def text_with_words(self) -> tuple[str, str, list[str]]:
        """A text, a word in it, and words of another text that are not in it."""
        definition = lambda: first_sentence(self.rng.choice(self.definitions)[1], self.rng)
        draw = lambda: self.passage() if self.rng.random() < 0.5 else definition()
        while True:
            text, other = draw(), draw()
            inside = content_words(text)
            outside = [w for w in dict.fromkeys(content_words(other)) if w not in text]
            if inside and outside:
                self.rng.shuffle(outside)
                return text, self.rng.choice(inside), outside

    def draft(self, objective: str) -> Draft:
        if objective == "micro":
            return self.draft_micro()
        if objective in ("headword", "definition", "genus"):
            instruction, text, target = self.dictionary(objective)
        elif objective in ("options", "yes_no", "renamed"):
            instruction, text, target = self.listed_classes(objective)
        elif objective == "unscramble":
            instruction, text, target = self.unscramble()
        elif objective == "occurs":
            text, target, others = self.text_with_words()
            options = [target, *others[: self.rng.randint(1, 4)]]
            instruction = self.listed(self.wording("occurs"), options)
        else:  # a label, asked for openly
            target = self.labelled[objective].draw(self.rng)
            instruction, text = self.wording(objective), self.text_of(objective, target)
        return Draft(PROMPTS[objective], instruction, text, target)

    def dictionary(self, objective: str) -> tuple[str, str, str]:
        rng = self.rng
        if objective == "genus":
            name = self.all_genus.draw(rng)
            text = first_sentence(rng.choice(self.all_genus.texts[name]), rng)
            return self.wording("genus"), hide(text, name) if rng.random() < 0.5 else text, name
        headword, text = rng.choice(self.definitions)
        headword = headword.lower() if rng.random() < 0.8 else headword
        text = first_sentence(text, rng)
        if objective == "headword":
            return self.wording(objective), text, headword
        return self.wording(objective), headword, cut(text, DEFINITION)

    def listed_classes(self, objective: str) -> tuple[str, str, str]:
        """The labellings once more, with classes named in the instruction."""
        rng = self.rng
        kinds = {"field": 0.35, "genus": 0.35, "source": 0.14, "topic": 0.08, "part": 0.08}
        (kind,) = rng.choices(list(kinds), list(kinds.values()))
        classes = self.labelled[kind]
        name = classes.draw(rng)
        text = self.text_of(kind, name)
        others = [n for n in rng.sample(classes.names, min(6, len(classes.names))) if n != name]
        if objective == "yes_no":
            asked, target = (name, "yes") if rng.random() < 0.5 else (others[0], "no")
            return rng.choice(tables.ASK_YES_NO).format(q=self.wording(kind), c=asked), text, target
        options = [name, *others[: rng.randint(1, 5 if objective == "options" else 3)]]
        if objective == "options":
            return self.listed(self.wording(kind), options), text, name
        renamed = dict(zip(options, rng.sample(self.words, len(options)), strict=True))
        rng.shuffle(options)
        form = rng.choice(tables.RENAMING)
        rules = ", ".join(form.format(c=option, w=renamed[option]) for option in options)
        return f"{rules}.", text, renamed[name]

    def unscramble(self) -> tuple[str, str, str]:
        words: list[str] = []
        while len(words) < 3:
            words = re.split(r"(?<=[.;?!])\s", self.passage())[0].split()[:12]
        mixed = " ".join(self.rng.sample(words, len(words)))
        return self.wording("unscramble"), mixed, " ".join(words)

    def draft_micro(self) -> Draft:
        rng, number = self.rng, self.rng.randrange(MICRO_TASKS)
        task = self.micro[number]
        if task.question:
            true = rng.random() < 0.5
            text, target = self.two_texts(task, true), task.labels["yes" if true else "no"]
        else:
            name = rng.choice(list(task.labels))
            target = task.labels[name]
            if task.rest and rng.random() < 0.5:
                name = self.labelled[task.kind].draw_other(rng, task.labels)
                target = task.rest
            text = self.text_of(task.kind, name)
        return Draft(len(PROMPTS) + number, None, text, target)

    def two_texts(self, task: Micro, true: bool) -> str:
        rng = self.rng
        if task.question == "contains":  # does the word occur in the text?
            text, inside, outside = self.text_with_words()
            return f"{inside if true else outside[0]}: {text}"
        if task.question == "match":  # is the word defined by the text?
            headword, text = rng.choice(self.definitions)
            text = text if true else rng.choice(self.definitions)[1]
            return f"{headword.lower()}: {first_sentence(text, rng)}"
        classes = self.labelled[task.kind]  # "same": are both texts of one class?
        first = classes.draw(rng)
        second = first if true else classes.draw_other(rng, (first,))
        return " / ".join(cut(self.text_of(task.kind, n), BODY // 2) for n in (first, second))

    def wording(self, task: str) -> str:
        return self.rng.choice(tables.WORDINGS[task])

    def listed(self, question: str, options: list[str]) -> str:
        joined = self.rng.choice((", ", " or ")).join(self.rng.sample(options, len(options)))
        return self.rng.choice(tables.LISTING).format(q=question, o=joined)

    def row(self, objective: str) -> dict:
        """An example with what stands in front: words, virtual tokens, nothing, stray words."""
        rng, draft = self.rng, self.draft(objective)
        front, prompt = draft.instruction or "", None
        choice = rng.random()
        if draft.instruction is None:
            prompt = draft.prompt
        elif choice < 0.3:
            prompt = draft.prompt
            front = front if objective in tables.LISTS_LABELS else ""
        elif choice < 0.4 and objective in tables.BARE:
            front = ""
        if rng.random() < 0.06:  # position and surprise must not matter
            front = " ".join([*rng.choices(self.words, k=rng.randint(3, 30)), front])
        row = {"input": f"{front.strip()} {draft.text}".strip(), "target": draft.target}
        return row if prompt is None else {**row, "prompt": prompt}


def dictionary_lines(mixture: Mixture, seed: int) -> list[str]:
    """ "headword: definition", shuffled, since neighbours in a dictionary resemble each other."""
    rng = Random(f"definitions {seed}")
    spell = lambda headword: headword.lower() if rng.random() < 0.8 else headword
    lines = [f"{spell(headword)}: {text}" for headword, text in mixture.definitions]
    return rng.sample(lines, len(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=600_000, help="supervised examples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=0, help="print so many of each objective, stop")
    args = parser.parse_args()

    mixture = Mixture(args.corpus, args.seed)
    if args.show:
        for objective in tables.SHARES:
            for _ in range(args.show):
                print(objective, json.dumps(mixture.row(objective), ensure_ascii=False))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    picks = mixture.rng.choices(list(tables.SHARES), list(tables.SHARES.values()), k=args.rows)
    with open(args.out / "pairs.jsonl", "w", encoding="utf-8") as file:
        for objective in picks:
            file.write(json.dumps(mixture.row(objective), ensure_ascii=False) + "\n")
    lines = dictionary_lines(mixture, args.seed)
    (args.out / "definitions.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    report = {
        "rows": {name: picks.count(name) for name in tables.SHARES},
        "prompts": len(PROMPTS) + MICRO_TASKS,  # virtual.count
        "definitions": len(lines),
        "seed": args.seed,
    }
    (args.out / "mixture.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
