"""A tokenizer that a run trains: T5's order of rows, whole texts back, too little text told."""

import json

import numpy as np
import pytest

from jaxprompt.config.errors import UserError
from jaxprompt.config.pretrain import TokenizerConfig
from jaxprompt.data.tokenizer import copy_tokenizer, load_tokenizer
from jaxprompt.data.tokenizer_training import train_tokenizer, train_wordpiece
from jaxprompt.models.checkpoints.hf_encoder import read_mask_id

SETTINGS = TokenizerConfig(vocabulary=300, sentinels=12)


def sentences(count=300, words=400):
    rng = np.random.default_rng(0)
    letters = list("abcdefghijklmnop")
    lexicon = ["".join(rng.choice(letters, rng.integers(2, 7))) for _ in range(words)]
    return [" ".join(rng.choice(lexicon, 12)).capitalize() + "." for _ in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train_tokenizer(iter(sentences()), SETTINGS, folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


def test_rows_are_in_t5s_order(tokenizer):
    assert tokenizer.size == 300
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.special_ids) == (0, 1, [0, 1, 2])
    assert [tokenizer.piece(id) for id in (0, 1, 2)] == ["<pad>", "</s>", "<unk>"]
    assert tokenizer.sentinel_ids == list(range(299, 287, -1))
    assert tokenizer.piece(299) == "<extra_id_0>" and tokenizer.piece(288) == "<extra_id_11>"
    assert not any("extra_id" in tokenizer.piece(id) for id in range(288))
    assert len({tokenizer.piece(id) for id in range(300)}) == 300


def test_texts_come_back(tokenizer):
    for text in [*sentences(20), "two  spaces", "#$%^&", "A B c", "1+2=3"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not set(ids) & {*tokenizer.special_ids, *tokenizer.sentinel_ids}
    # what NFKC and one line a text make of it
    assert tokenizer.decode(tokenizer.encode("ab\ncd\tﬁ")) == "ab cd fi"
    assert 2 in tokenizer.encode("日")  # unknown
    known = sum(len(tokenizer.encode(text)) for text in sentences(50))
    assert known < 0.6 * sum(map(len, sentences(50)))  # pieces, not letters


def test_sentinels_and_eos_are_single_ids(tokenizer, folder):
    ids = tokenizer.encode("abc <extra_id_0> abc <extra_id_11>")
    assert [id for id in ids if id >= 288] == [299, 288]
    assert tokenizer.encode("abc") == ids[: len(tokenizer.encode("abc"))]
    raw = json.loads((folder / "tokenizer.json").read_text())
    assert raw["post_processor"]["single"][-1]["SpecialToken"]["id"] == "</s>"
    assert 1 not in tokenizer.encode("a</s>b")


def test_a_copy_beside_weights_is_the_same_tokenizer(tokenizer, folder, tmp_path):
    copy_tokenizer(folder, tmp_path)
    assert load_tokenizer(tmp_path).fingerprint() == tokenizer.fingerprint()
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.fingerprint() == tokenizer.fingerprint()
    assert again.sentinel_ids == tokenizer.sentinel_ids


@pytest.mark.parametrize("texts", [[], ["a"], [" ", "\n"], ["hello world"] * 3])
def test_too_little_text(texts, tmp_path):
    with pytest.raises(UserError, match="The text yields .* pieces.* asks for 288.*more text"):
        train_tokenizer(iter(texts), SETTINGS, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_size_that_is_advised_works(tmp_path):
    with pytest.raises(UserError, match="set it to") as error:
        train_tokenizer(sentences(), TokenizerConfig(vocabulary=20_000, sentinels=5), tmp_path)
    size = int(str(error.value).partition("set it to ")[2].split()[0])
    train_tokenizer(sentences(), TokenizerConfig(vocabulary=size, sentinels=5), tmp_path)
    assert load_tokenizer(tmp_path).size == size


@pytest.mark.parametrize(
    "texts, settings, words",
    [
        (["x"], {"vocabulary": 200}, "vocabulary is 200, of which 100 are sentinels; leave at le"),
        (["x"], {"vocabulary": 50}, "leave at least 128 rows"),
        (["".join(map(chr, range(0x4E00, 0x5000)))] * 9, {"vocabulary": 300}, "vocabulary 300 .*"),
        ([*sentences(), "a \ud800 b"], {"vocabulary": 400}, "'a .ud800 b' is not Unicode"),
    ],
)
def test_what_no_tokenizer_can_be_made_of(texts, settings, words, tmp_path):
    with pytest.raises(UserError, match=words) as error:
        train_tokenizer(iter(texts), TokenizerConfig(**settings), tmp_path)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_the_readers_own_mistakes_pass_through(tmp_path):
    def texts():
        yield "abc"
        raise UserError("There is no such file.")

    with pytest.raises(UserError, match="^There is no such file.$"):
        train_tokenizer(texts(), SETTINGS, tmp_path)


def test_a_wordpiece_tokenizer_is_an_uncased_berts(tmp_path):
    train_wordpiece(iter(sentences()), SETTINGS, tmp_path)
    words = load_tokenizer(tmp_path, masked=True)
    assert words.size == 300
    assert [words.piece(id) for id in range(5)] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert (words.pad_id, words.eos_id, words.mask_id, words.start_ids) == (0, 3, 4, [2])
    text = sentences()[0]
    assert words.decode(words.encode(text)).replace(" ", "") == text.lower().replace(" ", "")
    assert read_mask_id(tmp_path) == 4
    with pytest.raises(UserError, match=r"The text yields \d+ pieces, .* asks for 30000"):
        train_wordpiece(iter(sentences()), TokenizerConfig(vocabulary=30000), tmp_path)
