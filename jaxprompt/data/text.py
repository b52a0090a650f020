"""Packed pre-training batches from running text and supervised pairs.

Batch k is a pure function of the seed and k. Examples are drawn with replacement, so there is no
position to store, and a resumed run has the same batches.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from jaxprompt.config.errors import UserError, shown
from jaxprompt.config.paths import expanded, is_count
from jaxprompt.config.pretrain import PairSource, PretrainConfig, TextSource
from jaxprompt.data.batches import Batch, Example, pack_batch
from jaxprompt.data.objectives import masked_lm, masks, prefix_lm, span_corruption, span_lengths
from jaxprompt.data.rows import Row, Rows
from jaxprompt.data.sampling import dropout_seeds, random_stream
from jaxprompt.data.sources import check_file, read_rows
from jaxprompt.data.templates import as_text
from jaxprompt.data.token_cache import Ragged, tokenized
from jaxprompt.data.tokenizer import Tokenizer
from jaxprompt.data.virtual_tokens import virtual_ids

BLOCK = 50  # neighbouring documents that are held out together, as one often continues the other
MISSES = 8  # a batch is full when so many examples in succession do not fit


class Stream(NamedTuple):
    """Examples of one source with one objective; ``draw`` makes a random one."""

    name: str  # "span_corruption/brown"
    weight: float  # of its examples among all of its objective
    draw: Callable[[np.random.Generator], Example]


class Streams(NamedTuple):
    """The sources of a run: the part for training, and the held-out part."""

    train: list[Stream]
    held_out: list[Stream]
    texts: dict[str, Ragged]  # held-out documents by source
    tokens: dict[str, int]  # of the training part, by source
    digests: dict[str, str]  # of all ids of a source and of the prompt numbers of its pairs


def read_documents(source: TextSource) -> list[str]:
    """The texts of a source without empty ones; UserError if there are none."""
    if source.source is None and Path(source.train).suffix.lower() == ".txt":
        path = Path(expanded(source.train))
        check_file(path)
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError:
            raise UserError(f"{path} is not UTF-8 text; convert it to UTF-8.") from None
        texts = [line for line in lines if line.strip()]
    else:
        rows = read_rows(source.source, source.train)
        texts = [
            _text(row, source.column, number, source)
            for number, row in enumerate(rows, 1)
            if row.get(source.column, "") is not None  # as an empty cell of a CSV file
        ]
        texts = [text for text in texts if text.strip()]
    if not texts:
        raise UserError(f"Text source {source.name!r} ({source.train}) holds no text.")
    return texts


def check_files(config: PretrainConfig) -> None:
    """Raise UserError if the file of a source does not exist, before any work is done."""
    for source in (*config.text, *config.pairs):
        if source.source is None:
            check_file(Path(expanded(source.train)), f" (source {source.name!r})")


def _text(row: Row, column: str, number: int, source: TextSource | PairSource) -> str:
    """The text in a column of row ``number``; UserError if there is none."""
    where = f"row {number} of {source.train} (source {source.name!r})"
    if not isinstance(row.get(column), str):
        raise UserError(f"R{where[1:]} has no text in {column!r}; it has {shown(sorted(row))}.")
    return as_text(row[column], column, where)


def open_streams(
    config: PretrainConfig,
    tokenizer: Tokenizer,
    vocab_rows: int,
    cache: Path,
    say: Callable[[str], None] = lambda text: None,
) -> Streams:
    """Tokenize all sources, or read their tokens from ``cache``, and split off held-out parts.

    Args:
        vocab_rows: V of the backbone; the ids of virtual tokens start there.
        cache: a folder for the ids of large sources.
        say: is called with the size of each source.

    Raises:
        UserError: a source has too little text, or a row cannot be used.
    """
    streams = Streams([], [], {}, {}, {})
    for source in config.text:
        documents = read_documents(source)
        say(f"{source.name}: {len(documents):,} documents")
        texts = _checked(documents, tokenizer, cache, vocab_rows)
        streams.digests[f"text/{source.name}"] = _digest(*texts)
        parts = _split(texts, config.validation, source.name)
        streams.texts[source.name] = parts[1]
        streams.tokens[source.name] = len(parts[0].ids)
        for objective in ("span_corruption", "prefix_lm", "masked_lm"):
            if objective in config.objectives:
                for target, part in zip(streams[:2], parts, strict=True):
                    draw = _draw_text(part, objective, config, tokenizer)
                    target.append(Stream(f"{objective}/{source.name}", source.weight, draw))
    for source in config.pairs if "pairs" in config.objectives else ():
        rows = read_rows(source.source, source.train)
        say(f"{source.name}: {len(rows):,} pairs")
        prompts = _prompt_numbers(rows, config, source)
        columns = (
            [_text(row, column, number, source) for number, row in enumerate(rows, 1)]
            for column in ("input", "target")
        )
        inputs, outputs = (_checked(texts, tokenizer, cache, vocab_rows) for texts in columns)
        streams.digests[f"pairs/{source.name}"] = _digest(*inputs, *outputs, prompts)
        held = _held_out(len(rows), config.validation, source.name)
        lengths = np.diff(inputs.starts) + np.diff(outputs.starts)
        streams.tokens[source.name] = int(lengths[~held].sum())
        for target, numbers in zip(streams[:2], (~held, held), strict=True):
            draw = _draw_pair(
                inputs,
                outputs,
                prompts,
                np.flatnonzero(numbers),
                config,
                tokenizer,
                vocab_rows,
            )
            target.append(Stream(f"pairs/{source.name}", source.weight, draw))
    return streams


def _checked(texts: list[str], tokenizer: Tokenizer, cache: Path, vocab_rows: int) -> Ragged:
    """The ids of texts; UserError if one is beyond the embedding table."""
    ids = tokenized(texts, tokenizer, cache)
    ids.check(vocab_rows, texts, tokenizer)
    return ids


def _digest(*arrays: np.ndarray) -> str:
    """Hex digits that change with dtype, shape and values of the arrays."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:32]


def _prompt_numbers(
    rows: Rows, config: PretrainConfig, source: PairSource
) -> Int[np.ndarray, " n"]:
    """The number of each pair's virtual prompt, -1 for none."""
    numbers = [_number(row.get("prompt")) for row in rows]
    count = config.virtual.count if config.virtual else 0
    for at, number in enumerate(numbers, 1):
        if number is not None and not (type(number) is int and 0 <= number < count):
            raise UserError(
                f"Row {at} of {source.train} has prompt {shown(number)}, and virtual.count allows "
                f"{f'0 to {count - 1}' if count else 'none'}; set virtual.count."
            )
    return np.array([-1 if number is None else number for number in numbers], np.int32)


def _number(value: object) -> object:
    """The whole number that a value of a CSV file or another file stands for; None if empty."""
    if isinstance(value, str):  # a CSV cell
        return int(value) if is_count(value) else value or None
    return value


def _held_out(count: int, share: float, name: str) -> Bool[np.ndarray, " n"]:
    """A mask of the documents that are held out: evenly spaced blocks, about ``share`` of all."""
    block = min(BLOCK, max(1, int(count * share)))
    every = max(2, round(1 / share))
    held = (np.arange(count) // block) % every == every // 2
    if not held.any():
        held[-1:] = True  # fewer than half a period of documents
    if held.all():
        raise UserError(f"Source {name!r} has {count} document; at least 2 are needed.")
    return held


def _split(texts: Ragged, share: float, name: str) -> tuple[Ragged, Ragged]:
    """Training and held-out documents."""
    held = _held_out(len(texts), share, name)
    lengths = np.diff(texts.starts)
    tokens = np.repeat(held, lengths)
    parts = [
        Ragged(texts.ids[keep], np.concatenate([[0], np.cumsum(lengths[documents])]))
        for keep, documents in ((~tokens, ~held), (tokens, held))
    ]
    for part in parts:
        if len(part.ids) < 4:
            raise UserError(f"Source {name!r} has too little text; at least 4 tokens are needed.")
    return parts[0], parts[1]


def _draw_text(
    texts: Ragged, objective: str, config: PretrainConfig, tokenizer: Tokenizer
) -> Callable[[np.random.Generator], Example]:
    """A function that cuts a random stretch out of ``texts`` and applies the objective to it.

    A stretch may cross the end of a document. Half of the stretches start with a document, and the
    others anywhere.
    """
    room, target_length = config.input_length, config.target_length
    noise = {"noise_density": config.noise_density, "mean_span": config.mean_span}
    if objective == "span_corruption":
        fits = lambda n: all(
            a <= b for a, b in zip(span_lengths(n, **noise), (room, target_length), strict=True)
        )
    elif objective == "masked_lm":
        ends = len(tokenizer.start_ids) + 1
        fits = lambda n: n + ends <= room and masks(n, config.noise_density) <= target_length
    else:
        fits = lambda n: n <= room - 1 and target_length >= 2
    largest = max((n for n in range(2, room + target_length) if fits(n)), default=0)
    if largest < 4:
        raise UserError(
            f"Rows of {room} input and {target_length} target tokens are too short for "
            f"{objective}; raise input_length or target_length."
        )
    low, high = config.text_length or (largest, largest)
    low, high = min(low, largest), min(high, largest)
    sentinels = np.array(tokenizer.sentinel_ids, texts.ids.dtype)
    if objective == "span_corruption" and not len(sentinels):
        raise UserError("Span corruption needs sentinels (<extra_id_0>, ...) in the tokenizer.")

    apply: dict[str, Callable[[np.ndarray, np.random.Generator], Example]] = {
        "span_corruption": functools.partial(
            span_corruption, sentinels=sentinels, eos=tokenizer.eos_id, **noise
        ),
        "prefix_lm": functools.partial(
            prefix_lm, eos=tokenizer.eos_id, longest_target=target_length
        ),
        "masked_lm": functools.partial(
            masked_lm,
            mask=tokenizer.mask_id or 0,
            around=(np.array(tokenizer.start_ids, np.int32), np.array([tokenizer.eos_id])),
            noise_density=config.noise_density,
        ),
    }

    def draw(rng: np.random.Generator) -> Example:
        size = min(int(rng.integers(low, high + 1)), len(texts.ids))
        anywhere = int(rng.integers(len(texts.ids)))
        if rng.random() < 0.5:
            anywhere = int(texts.starts[np.searchsorted(texts.starts, anywhere, "right") - 1])
        start = min(anywhere, len(texts.ids) - size)
        return apply[objective](texts.ids[start : start + size], rng)

    return draw


def _draw_pair(
    inputs: Ragged,
    targets: Ragged,
    prompts: Int[np.ndarray, " n"],
    numbers: Int[np.ndarray, " m"],
    config: PretrainConfig,
    tokenizer: Tokenizer,
    vocab_rows: int,
) -> Callable[[np.random.Generator], Example]:
    """A function that draws one of the pairs ``numbers``.

    Its input has virtual tokens, the text and EOS, and is cut to fit a row.
    """
    lengths = config.virtual.lengths if config.virtual else [0]
    longest = max(lengths)

    def draw(rng: np.random.Generator) -> Example:
        number = int(numbers[rng.integers(len(numbers))])
        front = np.zeros(0, np.int32)
        if prompts[number] >= 0:
            size = lengths[rng.integers(len(lengths))]
            front = virtual_ids(vocab_rows, longest, int(prompts[number]))[:size]
        text = inputs.at(number)[: config.input_length - 1 - len(front)]
        end = np.array([tokenizer.eos_id], np.int32)
        return Example(
            np.concatenate([front, text, end]),
            np.concatenate([targets.at(number)[: config.target_length - 1], end]),
        )

    return draw


def packed_batch(
    config: PretrainConfig,
    streams: Sequence[Stream],
    shares: Sequence[float],
    rng: np.random.Generator,
) -> Batch:
    """A batch of rows that are filled with examples of random streams.

    An example goes into the first row that has room for it. Examples that fit no row are dropped.
    After ``MISSES`` of them in succession the batch is done, so long examples are slightly too
    rare.

    Args:
        shares: the probability of each stream.
    """
    rows: list[list[Example]] = [[] for _ in range(config.train.batch_size)]
    room = np.tile([config.input_length, config.target_length], (len(rows), 1))
    cumulative = np.cumsum(shares)
    misses = 0
    while misses < MISSES:
        number = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], "right"))
        example = streams[min(number, len(streams) - 1)].draw(rng)
        need = len(example.inputs), len(example.targets)
        fitting = np.flatnonzero((room >= need).all(axis=1))
        if not len(fitting):
            misses += 1
            continue
        misses = 0
        rows[fitting[0]].append(example)
        room[fitting[0]] -= need
    batch = pack_batch(rows, input_length=config.input_length, target_length=config.target_length)
    batch = batch._replace(dropout_seed=dropout_seeds(rng, len(rows)))
    if config.balance == 0:
        return batch
    weights = np.zeros_like(batch.weights)
    for at, row in enumerate(rows):
        sizes = np.array([len(example.targets) for example in row])
        weights[at, : sizes.sum()] = np.repeat(sizes**-config.balance, sizes)
    return batch._replace(weights=weights)


def stream_shares(config: PretrainConfig, streams: Sequence[Stream]) -> list[float]:
    """The probability of each stream: the share of its objective times its weight in it."""
    total = sum(config.objectives.values())
    within: dict[str, float] = {}
    for stream in streams:
        kind = stream.name.partition("/")[0]
        within[kind] = within.get(kind, 0) + stream.weight
    return [
        config.objectives[kind] / total * stream.weight / within[kind]  # pyright: ignore[reportArgumentType]
        for stream in streams
        for kind in [stream.name.partition("/")[0]]
    ]


def packed_batches(
    config: PretrainConfig, streams: Sequence[Stream], start: int = 0
) -> Iterator[Batch]:
    """Batches ``start``, ``start + 1``, ... without end, made ahead of time by grain's threads."""
    import grain

    shares = stream_shares(config, streams)
    steps = grain.MapDataset.range(2**31 - 1 - start).map(
        lambda step: packed_batch(
            config, streams, shares, random_stream(config.train.seed, start + int(step))
        )
    )
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    return iter(steps.to_iter_dataset(options))
