"""Objectives: nothing of a text is lost, lengths are those announced, shares those asked for."""

from collections import Counter

import numpy as np
import pytest

from jaxprompt.data.objectives import masked_lm, masks, prefix_lm, span_corruption, span_lengths

EOS = 1
SENTINELS = np.arange(1999, 1899, -1)  # T5's order: the first has the highest id
NOISE = {"noise_density": 0.15, "mean_span": 3.0}
SETTINGS = [(0.15, 3.0), (0.15, 1.0), (0.5, 3.0), (0.5, 1.0), (0.9, 8.0), (0.01, 20.0), (0.99, 2.0)]


def text(size, dtype=np.int32):
    return np.arange(100, 100 + size, dtype=dtype)


def corrupt(size, seed=0, sentinels=SENTINELS, **noise):
    rng = np.random.default_rng(seed)
    return span_corruption(text(size), rng, sentinels=sentinels, eos=EOS, **NOISE | noise)


def spans(example, sentinels=SENTINELS):
    """The target cut at its sentinels: {sentinel: what it stands for}, in order."""
    assert example.inputs[-1] == example.targets[-1] == EOS
    found = {}
    for id in example.targets[:-1].tolist():
        if id in sentinels:
            assert id not in found
            found[id] = []
        else:
            found[list(found)[-1]].append(id)
    return found


def restored(example, sentinels=SENTINELS):
    """The text again: every sentinel of the input replaced by its span."""
    hidden = spans(example, sentinels)
    return [i for id in example.inputs[:-1].tolist() for i in hidden.get(id, [id])]


@pytest.mark.parametrize("density, mean_span", SETTINGS)
@pytest.mark.parametrize("size", [2, 3, 4, 5, 17, 200])
def test_spans_put_back_in_their_places_give_the_text(size, density, mean_span):
    for seed in range(20):
        example = corrupt(size, seed, noise_density=density, mean_span=mean_span)
        assert restored(example) == text(size).tolist()
        in_inputs = [id for id in example.inputs.tolist() if id in SENTINELS]
        hidden = spans(example)
        assert in_inputs == list(hidden) == SENTINELS[: len(hidden)].tolist()
        assert all(hidden.values())  # no sentinel stands for nothing
        assert example.inputs[0] == 100  # the text never starts with a span
        assert not set(example.inputs[:-1]) & {i for span in hidden.values() for i in span}


@pytest.mark.parametrize("density, mean_span", SETTINGS)
def test_the_announced_lengths_are_those_that_come_out(density, mean_span):
    noise = {"noise_density": density, "mean_span": mean_span}
    many = np.arange(10_000, 9_000, -1)
    announced = [span_lengths(size, **noise) for size in range(2, 600)]
    for size in range(2, 600, 7):
        example = corrupt(size, size, sentinels=many, **noise)
        assert (len(example.inputs), len(example.targets)) == announced[size - 2], size
    # whoever knows the largest text that fits a row knows that all smaller ones do
    assert (np.diff(np.array(announced), axis=0) >= 0).all()


def test_shares_are_those_of_the_paper():
    # Raffel et al. 2020: 15% of the tokens, spans of 3 on average
    shares, lengths, hidden = [], [], np.zeros(512)
    for seed in range(400):
        found = list(spans(corrupt(512, seed)).values())
        shares.append(sum(map(len, found)) / 512)
        lengths.append(np.mean([len(span) for span in found]))
        hidden[np.concatenate(found) - 100] += 1 / 400
    assert np.mean(shares) == pytest.approx(0.15, abs=1e-3)
    assert np.mean(lengths) == pytest.approx(3.0, abs=0.05)
    # places: the whole text is hidden about equally often, but for its first id
    assert hidden[0] == 0
    quarters = hidden[1:509].reshape(4, -1).mean(axis=1)
    np.testing.assert_allclose(quarters, 0.15, atol=0.015)


def test_all_ways_to_cut_are_equally_likely():
    """8 ids, of which 4 are hidden in 2 spans: 3 compositions of either, 9 patterns in all."""
    rng = np.random.default_rng(0)
    seen = Counter()
    for _ in range(1800):
        example = span_corruption(
            text(8), rng, sentinels=SENTINELS, eos=EOS, noise_density=0.5, mean_span=2.0
        )
        seen[tuple(example.inputs.tolist())] += 1
    assert len(seen) == 9
    assert all(150 < count < 250 for count in seen.values()), seen


def test_a_text_is_corrupted_in_as_few_spans_as_there_are_sentinels():
    for count in (1, 2, 5):
        example = corrupt(200, sentinels=SENTINELS[:count])
        assert len(spans(example)) == count
        assert restored(example) == text(200).tolist()
        assert sum(map(len, spans(example).values())) == 30
        announced = span_lengths(200, **NOISE)
        assert len(example.inputs) <= announced[0] and len(example.targets) <= announced[1]


def test_two_ids_are_enough():
    example = corrupt(2)
    assert example.inputs.tolist() == [100, 1999, EOS] and example.targets.tolist() == [
        1999,
        101,
        EOS,
    ]


def test_a_long_text():
    sentinels = np.arange(10**6, 10**6 - 10**4, -1)
    rng = np.random.default_rng(0)
    example = span_corruption(text(50_000) + 10**7, rng, sentinels=sentinels, eos=EOS, **NOISE)
    assert (len(example.inputs), len(example.targets)) == span_lengths(50_000, **NOISE)


def test_draws_depend_on_the_random_numbers_alone():
    one, again, other = corrupt(100, 3), corrupt(100, 3), corrupt(100, 4)
    np.testing.assert_array_equal(one.inputs, again.inputs)
    np.testing.assert_array_equal(one.targets, again.targets)
    assert one.inputs.tolist() != other.inputs.tolist()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_ids_keep_their_type(dtype):
    rng = np.random.default_rng(0)
    ids = text(30, dtype)
    example = span_corruption(ids, rng, sentinels=SENTINELS.astype(dtype), eos=EOS, **NOISE)
    assert example.inputs.dtype == example.targets.dtype == dtype
    assert prefix_lm(ids, rng, eos=EOS, longest_target=9).inputs.dtype == dtype


@pytest.mark.parametrize("size, longest", [(2, 2), (2, 100), (3, 2), (40, 10), (40, 41), (40, 400)])
def test_prefix_and_rest_are_the_text(size, longest):
    rng = np.random.default_rng(0)
    rests = Counter()
    for _ in range(2000):
        example = prefix_lm(text(size), rng, eos=EOS, longest_target=longest)
        assert example.inputs[-1] == example.targets[-1] == EOS
        assert [*example.inputs[:-1], *example.targets[:-1]] == text(size).tolist()
        assert 2 <= len(example.inputs) and 2 <= len(example.targets) <= longest
        rests[len(example.targets) - 1] += 1
    # every cut that fits is made, all equally often
    largest = min(size - 1, longest - 1)
    assert set(rests) == set(range(1, largest + 1))
    assert max(rests.values()) < 2 * 2000 / largest


@pytest.mark.parametrize(("size", "density"), [(1, 0.15), (40, 0.15), (40, 0.4)])
def test_masks_of_a_masked_lm_hide_what_its_target_has(size, density):
    rng, around = np.random.default_rng(0), (np.array([2]), np.array([3]))
    example = masked_lm(text(size), rng, mask=4, around=around, noise_density=density)
    inner = example.inputs[1:-1]
    assert example.inputs[[0, -1]].tolist() == [2, 3]
    assert len(example.targets) == masks(size, density) == (inner == 4).sum()
    inner = np.where(inner == 4, 0, inner)
    inner[inner == 0] = example.targets
    assert np.array_equal(inner, text(size))
