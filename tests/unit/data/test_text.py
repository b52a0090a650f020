"""Batches from text: pure functions of seed and step, nothing of the held-out part ever drawn."""

import itertools
import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import write_rows
from helpers_text import pretrain_config, word_tokenizer

from jaxprompt.config.errors import UserError
from jaxprompt.config.pretrain import TextSource
from jaxprompt.data import text
from jaxprompt.data.batches import Example
from jaxprompt.data.sampling import random_stream
from jaxprompt.data.text import (
    Stream,
    open_streams,
    packed_batch,
    packed_batches,
    read_documents,
    stream_shares,
)
from jaxprompt.data.tokenizer import load_tokenizer

DOCUMENTS, PAIRS, WORDS = 200, 60, 8  # a document has WORDS words of its own and no others
VOCABULARY = 2200  # rows of the embedding table: virtual ids start there
FIRST = 3  # id of the first word


def document(number):
    # of different lengths: some words are said twice
    words = [f"d{number}w{i}" for i in range(WORDS)]
    return [*words, *words[: number % 5]]


def owner(id):
    """The document (or DOCUMENTS + the pair) that a word's id belongs to."""
    return (int(id) - FIRST) // WORDS


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Files, tokenizer and values of a config with every objective."""
    folder = tmp_path_factory.mktemp("world")
    words = [f"d{n}w{i}" for n in range(DOCUMENTS + PAIRS) for i in range(WORDS)]
    tokenizer = load_tokenizer(word_tokenizer(folder / "tokenizer", words, sentinels=60))
    (folder / "text.txt").write_text("\n".join(" ".join(document(n)) for n in range(DOCUMENTS)))
    pairs = [
        {"input": " ".join(document(n)[:5]), "target": " ".join(document(n)[5:8])}
        | ({} if n % 4 == 3 else {"prompt": n % 4})
        for n in range(DOCUMENTS, DOCUMENTS + PAIRS)
    ]
    write_rows(folder / "pairs.jsonl", pairs)
    values = {
        "start": "elsewhere",
        "text": [{"name": "book", "train": str(folder / "text.txt")}],
        "pairs": [{"name": "quiz", "train": str(folder / "pairs.jsonl")}],
        "objectives": {"span_corruption": 2, "prefix_lm": 1, "pairs": 1},
        "input_length": 48,
        "target_length": 24,
        "text_length": [8, 30],
        "validation": 0.1,
        "virtual": {"count": 3, "lengths": [4, 7]},
        "train": {"batch_size": 4},
        "output": "out",
    }
    assert tokenizer.size < VOCABULARY
    return SimpleNamespace(
        folder=folder, tokenizer=tokenizer, values=values, config=pretrain_config(values),
        cache=folder / "tokens", pairs=pairs, vocabulary=VOCABULARY,
    )  # fmt: skip


@pytest.fixture(scope="module")
def streams(world):
    return open_streams(world.config, world.tokenizer, world.vocabulary, world.cache)


def assert_equal(one, two):
    for name, a, b in zip(one._fields, one, two, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


def batches(config, streams, count, start=0):
    return list(itertools.islice(packed_batches(config, streams.train, start), count))


def segments(batch):
    """The examples of a batch: (inputs, targets, loss weights)."""
    for ids, marks, targets, target_marks, _, weights, _ in zip(*batch[:7], strict=True):
        for number in range(1, marks.max() + 1):
            here, there = marks == number, target_marks == number
            yield ids[here], targets[there], weights[there]


def open_with(world, **changes):
    config = pretrain_config(world.values, **changes)
    return config, open_streams(config, world.tokenizer, world.vocabulary, world.cache)


# -- order -----------------------------------------------------------------------------------------


def test_batches_are_the_same_wherever_a_run_starts(world, streams):
    whole = batches(world.config, streams, 9)
    for start in (1, 5, 8):
        for one, two in zip(batches(world.config, streams, 2, start), whole[start:], strict=False):
            assert_equal(one, two)
    for one, two in itertools.combinations(whole, 2):
        assert (one.inputs != two.inputs).any()


def test_seeds_make_other_batches(world, streams):
    seeds = [pretrain_config(world.values, train={"seed": seed}) for seed in (0, 1, 0)]
    one, other, again = (batches(config, streams, 1)[0] for config in seeds)
    assert_equal(one, again)
    assert (one.inputs != other.inputs).any()


def test_far_steps_are_as_good_as_near_ones(world, streams):
    batch = batches(world.config, streams, 1, start=2**31 - 3)[0]
    assert (batch.segments > 0).any()


# -- shape -----------------------------------------------------------------------------------------


def test_every_example_is_whole_and_in_one_stretch(world, streams):
    eos, used = world.tokenizer.eos_id, []
    for batch in batches(world.config, streams, 20):
        assert batch.inputs.shape == (4, 48) and batch.targets.shape == (4, 24)
        used.append((batch.segments > 0).mean())
        for marks in (batch.segments, batch.target_segments):
            for row in marks:
                filled = row[: np.count_nonzero(row)]
                assert filled[0] == 1 and set(np.diff(filled)) <= {0, 1}  # then padding alone
        assert (batch.segments.max(1) == batch.target_segments.max(1)).all()
        assert (batch.inputs[batch.segments == 0] == 0).all()
        assert ((batch.weights > 0) == (batch.target_segments > 0)).all()
        assert batch.member.tolist() == [0] * len(batch.targets)
        for inputs, targets, _ in segments(batch):
            assert inputs[-1] == targets[-1] == eos
            assert (inputs[:-1] != eos).all() and (targets[:-1] != eos).all()
    assert np.mean(used) > 0.75


@pytest.mark.parametrize("objective", ["span_corruption", "prefix_lm"])
@pytest.mark.parametrize("rows", [(5, 48), (48, 48), (6, 7), (12, 5), (512, 114)])
@pytest.mark.parametrize("density, mean_span", [(0.15, 3.0), (0.5, 1.0), (0.9, 2.0)])
def test_every_draw_fits_a_row_of_any_size(world, objective, rows, density, mean_span):
    settings = dict(zip(("input_length", "target_length"), rows, strict=True), pairs=[],
                    objectives={objective: 1}, text_length=None, virtual=None,
                    noise_density=density, mean_span=mean_span)  # fmt: skip
    try:
        _, streams = open_with(world, **settings)
    except UserError as error:
        assert "too short" in str(error) and min(rows) < 8
        return
    rng, longest = np.random.default_rng(0), np.zeros(2, int)
    for _ in range(50):
        example = streams.train[0].draw(rng)
        longest = np.maximum(longest, [len(example.inputs), len(example.targets)])
    assert (longest <= rows).all()
    if objective == "span_corruption":
        # one of the two is full: no room is wasted
        assert (longest >= np.array(rows) - 2).any()


# -- what is held out ------------------------------------------------------------------------------


def documents_drawn(streams, objective, draws=600):
    (stream,) = [s for s in streams if s.name.startswith(objective)]
    rng, drawn = np.random.default_rng(1), Counter()
    for _ in range(draws):
        example = stream.draw(rng)
        ids = np.concatenate([example.inputs, example.targets])
        words = ids[(ids >= FIRST) & (ids < FIRST + (DOCUMENTS + PAIRS) * WORDS)]
        drawn.update({owner(id) for id in words})
    return set(drawn)


@pytest.mark.parametrize("objective", ["span_corruption", "prefix_lm", "pairs"])
def test_no_document_is_drawn_for_training_and_for_validation(streams, objective):
    training = documents_drawn(streams.train, objective)
    held_out = documents_drawn(streams.held_out, objective)
    first, count = (DOCUMENTS, PAIRS) if objective == "pairs" else (0, DOCUMENTS)
    assert not training & held_out
    assert training | held_out == set(range(first, first + count))  # and none is lost
    assert len(held_out) == pytest.approx(0.1 * count, rel=0.35)


def test_all_objectives_hold_out_the_same_documents(streams):
    spans, prefixes = (documents_drawn(streams.held_out, o) for o in ("span", "prefix"))
    assert spans == prefixes == {owner(id) for id in streams.texts["book"].ids}
    assert streams.tokens["book"] == sum(
        len(document(n)) for n in range(DOCUMENTS) if n not in spans
    )
    training = documents_drawn(streams.train, "pairs")
    assert streams.tokens["quiz"] == len(training) * WORDS


@pytest.mark.parametrize("share", [0.01, 0.05, 0.1, 0.3, 0.49])
@pytest.mark.parametrize("count", [2, 3, 60, 1000, 20_000])
def test_the_held_out_share_is_about_what_was_asked(share, count):
    held = text._held_out(count, share, "book")
    assert 0 < held.sum() < count
    if count * share >= 10:
        assert held.mean() == pytest.approx(share, rel=0.5)
    # in blocks: neighbours often continue each other
    starts = np.count_nonzero(np.diff(held.astype(int)) == 1)
    assert count < 20_000 or held.sum() / max(starts, 1) >= text.BLOCK


def test_stretches_cross_borders_but_skip_nothing(world, streams):
    """A drawn text is a stretch of the training documents end to end; half start a document."""
    (stream,) = [s for s in streams.train if s.name.startswith("prefix")]
    held = {owner(id) for id in streams.texts["book"].ids}
    kept = [document(n) for n in range(DOCUMENTS) if n not in held]
    flat = world.tokenizer.encode(" ".join(word for words in kept for word in words))
    starts = {0, *np.cumsum([len(words) for words in kept]).tolist()}
    row, rng, begins = bytes_of(flat), np.random.default_rng(0), 0
    for _ in range(400):
        example = stream.draw(rng)
        ids = [*example.inputs[:-1], *example.targets[:-1]]
        assert bytes_of(ids) in row and 8 <= len(ids) <= 30
        begins += any(flat[s : s + len(ids)] == ids for s in starts)
    # half by intention, and of the others one in ten by chance
    assert begins / 400 == pytest.approx(0.55, abs=0.08)


def bytes_of(ids):
    return b"".join(int(id).to_bytes(4, "big") for id in ids)


# -- shares and weights ----------------------------------------------------------------------------


def test_shares_of_objectives_and_of_sources_within_them(world):
    config = pretrain_config(world.values, objectives={"span_corruption": 3, "pairs": 1})
    names = {"span_corruption/a": 1.0, "span_corruption/b": 5.0, "pairs/c": 7.0}
    # equal lengths, so that none is dropped more often than another
    streams = [
        Stream(name, weight, lambda rng, n=n: Example(np.full(5, 10 + n), np.full(2, 10 + n)))
        for n, (name, weight) in enumerate(names.items())
    ]
    shares = stream_shares(config, streams)
    np.testing.assert_allclose(shares, [0.75 / 6, 0.75 * 5 / 6, 0.25])
    seen = Counter()
    for step in range(60):
        batch = packed_batch(config, streams, shares, random_stream(0, step))
        seen.update(int(targets[0]) - 10 for _, targets, _ in segments(batch))
    total = sum(seen.values())
    assert total > 1500
    np.testing.assert_allclose([seen[n] / total for n in range(3)], shares, atol=0.035)


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_a_target_of_n_tokens_counts_as_n_to_the_1_minus_balance(world, streams, balance):
    config = pretrain_config(world.values, balance=balance)
    sizes = set()
    for batch in batches(config, streams, 4):
        assert batch.weights.dtype == np.float32
        assert (batch.weights[batch.target_segments == 0] == 0).all()
        for _, targets, weights in segments(batch):
            assert len(set(weights.tolist())) == 1
            assert weights.sum() == pytest.approx(len(targets) ** (1 - balance), rel=1e-5)
            sizes.add(len(targets))
    assert len(sizes) > 3


# -- pairs and virtual tokens ----------------------------------------------------------------------


def test_pairs_carry_the_virtual_tokens_of_their_prompt(world, streams):
    (stream,) = [s for s in streams.train if s.name == "pairs/quiz"]
    rng, lengths, longest = np.random.default_rng(0), Counter(), 7
    for _ in range(400):
        example = stream.draw(rng)
        virtual = example.inputs[example.inputs >= world.vocabulary] - world.vocabulary
        words = example.inputs[example.inputs < world.vocabulary]
        row = world.pairs[owner(words[0]) - DOCUMENTS]
        assert world.tokenizer.decode(words) == row["input"] and words[-1] == 1
        assert world.tokenizer.decode(example.targets) == row["target"]
        if "prompt" in row:
            lengths[len(virtual)] += 1
            start = row["prompt"] * longest
            assert virtual.tolist() == list(range(start, start + len(virtual)))
            assert (example.inputs[: len(virtual)] >= world.vocabulary).all()  # in front
        else:
            assert not len(virtual)
        assert virtual.max(initial=0) < 3 * longest  # rows of the bank
    assert set(lengths) == {4, 7} and min(lengths.values()) > 100


def test_pairs_are_cut_to_fit_a_row(world):
    short = {"input_length": 10, "target_length": 3, "objectives": {"pairs": 1}}
    _, streams = open_with(world, **short)
    rng = np.random.default_rng(0)
    for _ in range(100):
        example = streams.train[0].draw(rng)
        assert len(example.inputs) <= 10 and len(example.targets) == 3
        assert example.inputs[-1] == example.targets[-1] == 1
        assert (example.inputs < world.vocabulary).sum() >= 3  # text and EOS


def test_prompt_numbers_of_a_csv_file_are_numbers(world, tmp_path):
    (tmp_path / "p.csv").write_text(
        "input,target,prompt\n" + "d200w0,d200w1,2\nd201w0,d201w1,\n" * 5
    )
    pairs = [{"name": "quiz", "train": str(tmp_path / "p.csv")}]
    _, streams = open_with(world, pairs=pairs)
    (stream,) = [s for s in streams.train if s.name == "pairs/quiz"]
    rng, found = np.random.default_rng(0), set()
    for _ in range(50):
        inputs = stream.draw(rng).inputs
        found.add((int(inputs[0]) - world.vocabulary, owner(inputs[-2]) - DOCUMENTS))
    assert {pair for pair in found if pair[0] >= 0} == {(14, 0)}
    assert any(pair[0] < 0 and pair[1] == 1 for pair in found)


@pytest.mark.parametrize(
    "prompt, words",
    [
        (3, "Row 2 of .* has prompt 3, and virtual.count allows 0 to 2"),
        (-1, "has prompt -1"),
        (1.0, "has prompt 1.0"),
        (True, "has prompt True"),
        ("first", "has prompt 'first'"),
    ],
)
def test_prompt_numbers_that_are_none(world, tmp_path, prompt, words):
    rows = [{"input": "a", "target": "b", "prompt": p} for p in (0, prompt)]
    pairs = [{"name": "quiz", "train": str(write_rows(tmp_path / "p.jsonl", rows))}]
    with pytest.raises(UserError, match=words):
        open_with(world, pairs=pairs)


# -- reading ---------------------------------------------------------------------------------------


def test_a_document_a_line_or_a_row(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone ﬁ\r\n\r\n  \r\ntwo\u2028three\n".encode())
    assert read_documents(TextSource(name="a", train=str(tmp_path / "a.txt"))) == [
        "one ﬁ",
        "two\u2028three",
    ]
    write_rows(tmp_path / "a.jsonl", [{"body": "x\ny"}, {"body": " "}, {"body": "z"}])
    source = TextSource(name="a", train=str(tmp_path / "a.jsonl"), column="body")
    assert read_documents(source) == ["x\ny", "z"]


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.txt", "", "Text source 'a' .*a.txt. holds no text"),
        ("a.txt", "\n \n\t\n", "holds no text"),
        ("a.txt", b"\xff\xfeb", "a.txt is not UTF-8 text"),
        ("a.jsonl", '{"text": " "}\n', "holds no text"),
        ("a.jsonl", '{"text": "x"}\n{"txt": "x"}\n', "Row 2 of .*a.jsonl .*no text in 'text'; it"),
        ("a.jsonl", '{"text": 3}\n', "Row 1 of .*no text in 'text'"),
        ("a.jsonl", '{"text": "\\ud800"}\n{"text": "x"}\n', "is not Unicode"),
        ("a.txt", "d0w0 d0w1 d0w2 d0w3 d0w4", "'a' has 1 document; at least 2 are needed"),
        ("a.txt", "d0w0 d0w1\nd0w2 d0w3", "'a' has too little text; at least 4 tokens"),
        ("a.doc", "x", "must end in"),
    ],
)
def test_text_that_cannot_be_used(world, tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=words) as error:
        open_with(world, text=[{"name": "a", "train": str(tmp_path / name)}])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "objective, changes",
    [
        ("span_corruption", {"input_length": 3}),
        ("span_corruption", {"target_length": 2}),
        ("span_corruption", {"target_length": 1}),
        ("prefix_lm", {"input_length": 4}),
        ("prefix_lm", {"target_length": 1}),
    ],
)
def test_rows_too_short_for_an_objective(world, objective, changes):
    changes |= {"objectives": {objective: 1}, "virtual": None, "pairs": []}
    with pytest.raises(UserError, match=f"are too short for {objective}; raise input_length or"):
        open_with(world, **changes)


def test_span_corruption_needs_sentinels(world, tmp_path):
    plain = load_tokenizer(word_tokenizer(tmp_path / "t", ["x", "y"], sentinels=0))
    with pytest.raises(UserError, match="needs sentinels"):
        open_streams(world.config, plain, world.vocabulary, tmp_path / "tokens")


def test_nothing_is_left_where_tokenizing_fails(world, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "\ud800"}) + "\n")
    config = pretrain_config(world.values, text=[{"name": "a", "train": str(tmp_path / "a.jsonl")}])
    with pytest.raises(UserError):
        open_streams(config, world.tokenizer, world.vocabulary, tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()


def test_documents_that_are_null_are_left_out_and_odd_ones_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text("text,n\na,1\n,2\nb,3\n")
    assert read_documents(TextSource(name="a", train="a.csv")) == ["a", "b"]
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{"text": "\\ud800"}\n')
    with pytest.raises(UserError, match="half of a surrogate pair in row 2 of b.jsonl"):
        read_documents(TextSource(name="a", train="b.jsonl"))
    with pytest.raises(UserError, match="There is no file 'no.txt' in .*paths start from"):
        read_documents(TextSource(name="a", train="no.txt"))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.txt").write_text("x\u2028y\r\n\r\nz\x85\n")
    source = TextSource(name="a", train="~/c.txt")
    assert source.train == str(tmp_path / "c.txt")
    assert read_documents(source) == ["x\u2028y", "z\x85"]
