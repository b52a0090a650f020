"""Tables of scripts/backbones/mixture.py: label names, shares, wordings of the instructions."""

# Field marks of the dictionary -> label. Marks that are missing here are not used.
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
# Text of the corpus -> kind of writing.
SOURCES = {
    "anarchism": "politics", "bible_kjv": "scripture", "brown": "press", "janeaustenr": "novel",
    "crawl-common": "quotation", "endless-sky-data": "space story", "fortunes": "saying",
    "mh-book": "mail manual", "debian_descriptions": "software", "debian-handbook": "handbook",
    "jargon-text": "slang", "gnome-user-docs": "help page", "cfi-en": "film essay",
}  # fmt: skip
# How often a passage comes from each text, in proportion.
PROSE = {
    "anarchism": 5, "bible_kjv": 3, "brown": 8, "janeaustenr": 4, "crawl-common": 1,
    "endless-sky-data": 1.5, "fortunes": 2, "mh-book": 1, "debian_descriptions": 4,
    "debian-handbook": 0.6, "jargon-text": 0.7, "gnome-user-docs": 0.3, "cfi-en": 0.4,
}  # fmt: skip
# Of examples. Large where the answer is read from the input or chosen among options: that is what
# soft prompts are asked for, while world knowledge does not fit a small model.
SHARES = {
    "headword": 0.10, "definition": 0.02, "genus": 0.14, "field": 0.08, "topic": 0.025,
    "part": 0.015, "source": 0.035, "options": 0.15, "yes_no": 0.045, "renamed": 0.10,
    "unscramble": 0.01, "occurs": 0.06, "micro": 0.22,
}  # fmt: skip
LISTS_LABELS = ("options", "yes_no", "renamed", "occurs")  # impossible without the words
BARE = ("headword", "definition")  # can be guessed from the text alone
WORDINGS = {
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
ASK_YES_NO = ["{q} Is it {c}?", "Is this {c}? Answer yes or no.", "{c}, yes or no?"]
RENAMING = ["{c} = {w}", "{c}: {w}", "say {w} for {c}", "if {c} then {w}"]
# Answers of binary micro tasks: (it is so, it is not).
ANSWERS = [
    ("yes", "no"),
    ("true", "false"),
    ("right", "wrong"),
    ("a", "b"),
    ("1", "0"),
    ("one", "two"),
    ("this", "other"),
]
# Words that a definition opens with without saying what kind of thing it is about.
NOT_GENUS = set(
    "one any kind sort species genus act state quality name part same person form that "
    "found out off belonging use thing young back right longer other".split()
)
