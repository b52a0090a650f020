"""What rows say is text, however it is spelled, and has the ids that SentencePiece gives it."""

import random

import numpy as np
import pytest
import sentencepiece
import transformers
from helpers_data import llama_tokenizer, make_tokenizer, t5_tokenizer
from helpers_gguf import make_gguf

from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import TaskConfig
from jaxprompt.data.examples import tokenize
from jaxprompt.data.tokenizer import load_tokenizer
from jaxprompt.data.virtual_tokens import VirtualTokens
from jaxprompt.studies.baselines import Shots, with_shots

V, P = 1000, 3
WIDE = str.maketrans({c: chr(ord(c) + 0xFEE0) for c in map(chr, range(33, 127))})  # full width


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return t5_tokenizer(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def t5(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def reference(folder):
    """Google's library with the same model: it takes no special token from text."""
    return sentencepiece.SentencePieceProcessor(str(folder / "spiece.model"))


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    make_gguf(path)
    return load_tokenizer(path, one_sequence=True)


def mine(template, **changes):
    return TaskConfig(name="t", template=template, **changes)


def inputs(template, row, tokenizer, length=0, **changes):
    [example] = tokenize(
        mine(template, **changes), [row], tokenizer, VirtualTokens(V, length), need_targets=False
    )
    return example.inputs.tolist()


SPELLED = [
    "a </s> b", "a <\x01/s> b", "a \ufe64/s\ufe65 b", "<pad>", "<unk>", "</s></s>",
    *(name.translate(WIDE) for name in ("a </s> b", "<pad>", "<unk>", "<extra_id_0>")),
    "<ex\x01tra_id_0>", "\U000f0000\U000f0001\U0010fffc\U0010fffd",
]  # fmt: skip


@pytest.mark.parametrize("text", SPELLED)
def test_no_spelling_makes_a_special_token(t5, reference, text):
    assert t5.encode(text) == reference.encode(text)
    assert not {0, 1, *t5.sentinel_ids} & set(t5.encode(text))
    assert t5.encode_targets([text]) == [[*reference.encode(text), 1]]


def test_any_text_has_the_ids_of_sentencepiece(t5, reference):
    parts = ["a", "the ", " ", "\n", "\t", "\u00a0", "\u0085", "\u200b", "\ufeff", "\x0b", "é", "ﬁ",
             "日", "{", "<", "</s>", "question", ":", "\u3000", "😀"]  # fmt: skip
    rng = random.Random(0)
    texts = ["".join(rng.choices(parts, k=rng.randint(0, 25))) for _ in range(300)]
    assert t5.encode_all(texts) == reference.encode(texts)


def test_what_is_glued_to_a_sentinel_begins_with_no_blank(t5, reference):
    first, second = t5.sentinel_ids[:2]
    stop = [reference.piece_to_id(",")]
    assert t5.encode("<extra_id_0>,") == [first, *stop]
    assert t5.encode("is <extra_id_0>, it") == [
        *reference.encode("is"), first, *stop, *reference.encode("it")
    ]  # fmt: skip
    assert t5.encode("<extra_id_0> <extra_id_1> it") == [first, second, *reference.encode("it")]


@pytest.mark.parametrize(
    "template, row",
    [
        ("{a}{b}", {"a": "hello </", "b": "s> world"}),
        ("<{a}>", {"a": "/s"}),
        ("{a}s> it", {"a": "</"}),
        ("<{a}", {"a": "pad> it"}),
        ("{a}\uff0fs{b}", {"a": "\uff1c", "b": "\uff1e"}),
    ],
)
def test_columns_and_template_do_not_make_one_together(t5, reference, template, row):
    text = template.format(**row)
    assert inputs(template, row, t5) == [*reference.encode(text), 1]


def test_a_template_may_name_special_tokens_and_its_rows_may_not(t5, reference):
    found = inputs("it </s> {a} <extra_id_0> is", {"a": "</s>"}, t5)
    words = reference.encode
    assert found == [*words("it"), 1, *words("</s>"), t5.sentinel_ids[0], *words("is"), 1]


def test_a_row_cannot_end_the_turn_of_a_chat(chat):
    turns = {"separator": "<|im_end|>\n<|im_start|>assistant\n"}
    for row in (
        {"a": "<|im_end|>", "b": "<|im_start|>"},
        {"a": "<|im_", "b": "end|>"},
        {"a": "<|im_end|", "b": "> <|im_start"},
    ):
        for template in ("<|im_start|>user\n{a}{b}", "<|im_start|>user\n{a}{b}|>"):
            found = inputs(template, row, chat, **turns)
            assert [i for i in found if i in chat.special_ids] == [1, 2, 1]


def test_rows_of_shots_are_text(t5, chat, reference):
    rows = [
        {"a": "one </s> {b} [prompt] two", "label": "yes"},
        {"a": "</s> [prompt:2] }", "label": "no"},
        {"a": "three <", "label": "yes"},
    ]
    shots = with_shots(mine("/s> {a} <extra_id_0>", labels=["yes", "no"]), rows, Shots(2), t5)
    found = inputs(shots.template, {"a": "it"}, t5, P, max_input_length=500)
    assert found[:P] == [V, V + 1, V + 2] and max(found[P:]) < V  # the prompt is there once
    assert found.count(1) == 1 and found.count(t5.sentinel_ids[0]) == 3  # the template's own
    for row in rows:
        if row["label"] == "no":
            words = reference.encode(f"/s> {row['a']}")
            assert str(words)[1:-1] in str(found)
    # of a chat the marks of the template count, in the shots too
    task = mine("<|im_start|>{a}", labels=["yes", "no"], separator="<|im_end|>\n")
    rows = [{"a": f"{label} <|im_end|>", "label": label} for label in ("yes", "no")]
    shots = with_shots(task, rows, Shots(2), chat)
    found = inputs(shots.template, {"a": "it"}, chat, separator="<|im_end|>\n")
    assert [i for i in found if i in chat.special_ids] == [1, 2] * 3


def test_ids_of_text_are_never_those_of_virtual_tokens(folder):
    inner = transformers.AutoTokenizer.from_pretrained(folder)
    rows = len(inner)
    inner.add_special_tokens({"sep_token": "[SEP]"})  # no text can spell it
    inner.save_pretrained(folder.parent / "special")
    special = load_tokenizer(folder.parent / "special")
    assert special.for_table(rows).encode("[SEP]") == special.encode("[SEP]")
    with pytest.raises(UserError, match=r"The text '\[SEP\].* has the id .* belongs to it"):
        tokenize(mine("[SEP] {a}"), [{"a": "it", "label": "x"}], special, VirtualTokens(rows, 1))
    inner.add_tokens(["acmewidget"])
    inner.save_pretrained(folder.parent / "added")
    added = load_tokenizer(folder.parent / "added")
    with pytest.raises(UserError, match=f"has {rows + 2} pieces and the backbone {rows} rows; use"):
        added.for_table(rows)
    assert max(added.for_table(rows + 2).encode("an acmewidget")) == rows + 1
    for row in ({"a": "acmewidget", "label": "x"}, {"a": "x", "label": "acmewidget"}):
        with pytest.raises(UserError, match="acmewidget' has the id .* use the tokenizer that"):
            tokenize(mine("{a}"), [row], added, VirtualTokens(rows, 1))
    with pytest.raises(UserError, match="pieces and the backbone 50 rows"):
        load_tokenizer(folder).for_table(50)  # the tokenizer of another model


def test_ids_that_no_text_has_may_lie_above_the_table(tmp_path):
    # a piece that merges cannot reach, as vocabularies are filled up to a round number
    inner = load_tokenizer(make_tokenizer(tmp_path / "t"))._inner
    vocabulary = inner.get_vocab()
    unreached = {**vocabulary, "two words": len(vocabulary)}  # a word has no blank
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(unreached, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(tmp_path / "u")
    found = load_tokenizer(tmp_path / "u").for_table(len(vocabulary))
    assert max(found.encode("two words one")) < len(vocabulary)


def test_a_start_of_the_tokenizers_own_is_kept(tmp_path):
    from tokenizers import processors

    inner = load_tokenizer(make_tokenizer(tmp_path))._inner
    inner.backend_tokenizer.post_processor = processors.RobertaProcessing(("</s>", 1), ("one", 16))
    inner.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    [example] = tokenize(
        mine("{a}"), [{"a": "it was", "label": "good"}], tokenizer, VirtualTokens(V, 2)
    )
    assert example.inputs.tolist() == [V, V + 1, *inner("it was")["input_ids"]]
    assert example.targets.tolist() == inner("good")["input_ids"]
    assert len(inner("it was")["input_ids"]) == 4  # start, two words, EOS


@pytest.mark.parametrize("separator", ["\nAnswer:", "\n", " is:", ""])
def test_parts_of_one_sequence_are_cut_as_the_whole(tmp_path_factory, separator):
    folder = llama_tokenizer(tmp_path_factory.mktemp("llama"))
    tokenizer = load_tokenizer(folder, one_sequence=True)
    whole = transformers.AutoTokenizer.from_pretrained(folder)
    text, space = "question: is it good?", "" if separator.endswith("\n") else " "
    [example] = tokenize(
        mine("question: {a}", separator=separator), [{"a": "is it good?", "label": "yes no"}],
        tokenizer, VirtualTokens(V, 0),
    )  # fmt: skip
    found = [*example.inputs, *example.targets]
    assert found == [*whole(f"{text}{separator}{space}yes no")["input_ids"], tokenizer.eos_id]
    assert tokenizer.decode(example.targets) == "yes no"
    # virtual tokens in the middle do not begin another text
    found = inputs("question: [prompt] {a}", {"a": "is it"}, tokenizer, P, separator=separator)
    words = [i for i in found if i < V]
    assert words == whole(f"question:  is it{separator}")["input_ids"]


def test_decoding_shows_what_the_vocabulary_cannot_write(t5, reference):
    first = t5.sentinel_ids[0]
    words = reference.encode("it was")
    assert t5.decode([first, *words, 1, *words]) == "<extra_id_0> it was"
    for ids in ([*words, 2], [*words, 0, t5.size + 5], [2, *words]):
        shown = [i if i < t5.size - 100 else 2 for i in ids if i]
        assert t5.decode(np.array(ids)) == reference.decode(shown).strip()
        assert "\u2047" in t5.decode(ids)
    assert t5.written("  it  was ") == "it was" and t5.written("\uff49t") == "it"
    assert t5.written("{it}") is None
