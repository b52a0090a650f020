"""Make tests/parity/goldens_promptsource: what PromptSource's own code makes of rows of SuperGLUE.

PromptSource 0.2.3 (Bach et al. 2022, https://github.com/bigscience-workshop/promptsource, Apache
License 2.0) is no longer installed by today's Python, so it is forced:

    pip install jinja2 pyyaml pandas 'setuptools<81'
    pip install --no-deps --ignore-requires-python promptsource==0.2.3
    python scripts/goldens/make_goldens_promptsource.py

The folder has the package's own template files of SuperGLUE, as they are, and ``renders.json``:

    versions              of the packages
    rows/SUBSET           rows in the form of the hub's data sets, written for this test
    renders/SUBSET/NAME   of each row the lists of texts that the template makes: several where it
                          draws, else one
"""

import argparse
import importlib.metadata
import json
import random
import shutil
from pathlib import Path

from promptsource import templates

FOLDER = Path(__file__).parents[2] / "tests" / "parity" / "goldens_promptsource"
SEEDS = 60  # of templates that draw

_PAIR = 'Ann said: "It\'s 5% ||| or more", and left.'
ROWS = {
    "axb": [
        {"sentence1": "The cat sat.", "sentence2": "A cat sat down.", "idx": 0, "label": 0},
        {"sentence1": _PAIR, "sentence2": "She left {{quietly}}.", "idx": 1, "label": 1},
        {"sentence1": "Zo\u00eb ran.", "sentence2": "Zo\u00eb walked.", "idx": 2, "label": -1},
    ],
    "boolq": [
        {"question": "is water wet", "passage": "Water -- Wet is what water is.", "label": 1},
        {"question": "is \"5%\" a half", "passage": _PAIR, "label": 0},
        {"question": "do fish fly", "passage": "Some\nfish glide.", "label": -1},
    ],
    "cb": [
        {"premise": "A: I think it rains.", "hypothesis": "it rains", "label": 2},
        {"premise": _PAIR, "hypothesis": "Ann left.", "label": 0},
        {"premise": "He knew.", "hypothesis": "He did not know.", "label": 1},
        {"premise": "He knew.", "hypothesis": "He slept.", "label": -1},
    ],
    "copa": [
        {"premise": "It rained.", "choice1": "The road got wet.", "choice2": "The Sun rose.",
         "question": "effect", "label": 0},
        {"premise": "I fell.", "choice1": "It was dry.", "choice2": _PAIR, "question": "cause",
         "label": 1},
        {"premise": "The cup broke.", "choice1": "It fell.", "choice2": "It flew.",
         "question": "cause", "label": -1},
        {"premise": "The cup fell.", "choice1": "It broke.", "choice2": "It flew.",
         "question": "effect", "label": -1},
    ],
    "multirc": [
        {"paragraph": "<b>Sent 1: </b>Ann ran.<br>", "question": "Who ran?", "answer": "Ann",
         "label": 1},
        {"paragraph": _PAIR, "question": "Who left?", "answer": "Bob", "label": 0},
        {"paragraph": "Ann ran.", "question": "Who?", "answer": "Eve", "label": -1},
    ],
    "record": [
        {"passage": "Ann met Bob.\n@highlight\nBob was late.", "query": "@placeholder waited.",
         "entities": ["Ann", "Bob"], "answers": ["Ann"]},
        {"passage": _PAIR, "query": "It was @placeholder.", "entities": ["Ann", "A. B."],
         "answers": ["Ann", "A. B."]},
        {"passage": "Ann met Bob.", "query": "@placeholder left.", "entities": ["Ann", "Bob"],
         "answers": []},
    ],
    "wic": [
        {"word": "bank", "sentence1": "The bank of a river.", "sentence2": "The bank lends.",
         "label": 0},
        {"word": "run", "sentence1": _PAIR, "sentence2": "She can run.", "label": 1},
        {"word": "set", "sentence1": "A set.", "sentence2": "Set it.", "label": -1},
    ],
    "wsc.fixed": [
        {"text": "Ann told Eve that she won.", "span1_index": 0, "span2_index": 4,
         "span1_text": "Ann", "span2_text": "she", "label": 1},
        {"text": "The men ate, and They left.", "span1_index": 0, "span2_index": 4,
         "span1_text": "The men", "span2_text": "they", "label": 0},
        {"text": _PAIR, "span1_index": 0, "span2_index": 2, "span1_text": "Ann",
         "span2_text": "It", "label": -1},
    ],
}  # fmt: skip
ROWS["axg"] = [
    {"premise": "The nurse met the man; she sat.", "hypothesis": "The nurse sat.", "label": 0},
    {"premise": _PAIR, "hypothesis": "Ann left.", "label": 1},
    {"premise": "He knew.", "hypothesis": "He slept.", "label": -1},
]
ROWS["rte"] = ROWS["axg"]


def renders(template: templates.Template, row: dict) -> list[list[str]]:
    """All that a template makes of a row."""
    found: list[list[str]] = []
    for seed in range(SEEDS):
        random.seed(seed)
        texts = template.apply(dict(row), truncate=False)
        if texts not in found:
            found.append(texts)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=FOLDER)
    folder = parser.parse_args().output
    made: dict[str, dict] = {}
    for subset, rows in sorted(ROWS.items()):
        own = templates.DatasetTemplates("super_glue", subset)
        each = {t.get_name(): [renders(t, row) for row in rows] for t in own.templates.values()}
        made[subset] = dict(sorted(each.items()))
        place = folder / "super_glue" / subset
        place.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(own.yaml_path, place / "templates.yaml")
    versions = {name: importlib.metadata.version(name) for name in ("promptsource", "jinja2")}
    content = {"versions": versions, "rows": ROWS, "renders": made}
    text = json.dumps(content, indent=0, ensure_ascii=False, sort_keys=True)
    (folder / "renders.json").write_text(text + "\n", encoding="utf-8")
    print(sum(map(len, made.values())), "templates")


if __name__ == "__main__":
    main()
