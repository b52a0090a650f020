"""The data sets that are packaged with the program."""

from jaxprompt.data.tasks.entry import THREE_SPLITS, Entry

TASKS: dict[str, Entry] = {
    # a dictionary definition -> the kind of thing that it defines (WordNet)
    "supersense": THREE_SPLITS | {
        "source": "builtin:supersense",
        "template": "{gloss}",
        "labels": ["object", "person", "animal", "plant", "food", "place"],
        "max_input_length": 64,
    },
    # a mail -> ham or spam (SpamAssassin public corpus)
    "spam": THREE_SPLITS | {
        "source": "builtin:spam",
        "template": "subject: {subject} text: {text}",
        "labels": ["ham", "spam"],
        "metrics": ["accuracy", "macro_f1"],
        "max_input_length": 192,
    },
}  # fmt: skip
