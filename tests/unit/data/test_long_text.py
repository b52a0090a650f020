"""Of a very long text only a start is tokenized, and no id that is kept changes."""

import random

import pytest
from helpers_data import llama_tokenizer, make_tokenizer, t5_tokenizer
from helpers_gguf import make_gguf

from jaxprompt.config.schema import TaskConfig
from jaxprompt.data.examples import tokenize
from jaxprompt.data.long_text import LONG
from jaxprompt.data.tokenizer import load_tokenizer
from jaxprompt.data.virtual_tokens import VirtualTokens

SIZE = 5 * LONG


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    new = tmp_path_factory.mktemp
    return {
        "t5": load_tokenizer(t5_tokenizer(new("t5"))),
        "words": load_tokenizer(make_tokenizer(new("words"))),
        "llama": load_tokenizer(llama_tokenizer(new("llama")), one_sequence=True),
        "gguf": load_tokenizer(gguf(new("gguf") / "tiny.gguf"), one_sequence=True),
    }


def gguf(path):
    make_gguf(path)
    return path


def mixed(parts, blank=" "):
    rng = random.Random(0)
    return blank.join(rng.choices(parts.split("|"), k=SIZE // 3))


TEXTS = {
    "words": mixed("the|bread|is|good?|it's|12.5%|</s>|<extra_id_0>|<extra_id_0>.|é|слово|日本"),
    "numbers": mixed("1|22|333"),
    "one word": mixed("th|e|bread|is|good|1|2|/", ""),
    "one letter": "a" * SIZE,
    "unknown": "{" * SIZE,
    "lines": mixed("the|bread  is|good", "\n"),
    "accents": mixed("e\u0301|\u0301|a|\u200d|\u3000|日", ""),
    "a word behind others": "is it " * 10 + mixed("th|e|bread", ""),
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("name", ["t5", "words", "llama", "gguf"])
def test_the_start_of_a_long_text_has_the_ids_of_the_whole(tokenizers, name, text):
    tokenizer = tokenizers[name]
    whole = tokenizer.encode(text)
    for count in (1, 100, 3000):
        found = tokenizer.encode_start(text, count)
        assert found[: count + 1] == whole[: count + 1]


@pytest.mark.parametrize(
    "name, texts",
    [
        ("t5", ["words", "numbers", "one word", "one letter"]),
        ("words", ["words", "numbers"]),
        ("llama", ["words", "numbers"]),
        ("gguf", ["words", "numbers"]),
    ],
)
def test_the_rest_of_a_long_text_is_not_tokenized(tokenizers, name, texts):
    for text in texts:
        assert len(tokenizers[name].start_of(TEXTS[text], 100)) < 2 * LONG
    short = "it is " * 100
    assert tokenizers[name].start_of(short, 1) is short


def test_a_row_of_ten_megabytes_is_cut_as_any_other(tokenizers, monkeypatch):
    task = TaskConfig(name="t", template="it {a} is", max_input_length=32)
    rows = [{"a": "the bread is good " * 600_000}, {"a": "the bread is good " * 40}]
    read = []
    tokenizer, encode_all = tokenizers["t5"], tokenizers["t5"].encode_all
    counted = lambda texts, **more: read.extend(texts) or encode_all(texts, **more)
    monkeypatch.setattr(tokenizer, "encode_all", counted)
    heard = []
    found = tokenize(
        task, rows, tokenizer, VirtualTokens(500, 2), need_targets=False, note=heard.append
    )
    assert found[0].inputs.tolist() == found[1].inputs.tolist()
    assert heard[0].cut == 2 and max(map(len, read)) < 2 * LONG
