"""Damage of bytes, of JSON trees and of texts: what the fuzzer does to files that were good."""

import copy
import json
import random
import sys
from typing import Any

# values that a careless program, another program or an attacker writes where something else is due
ODD_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 7, 2**31, 2**63, 10**12, 10**30, 10**5000, 0.5, -0.0, 1e-300,
    1e308, float("nan"), float("inf"), float("-inf"), "", " ", "a", "5", "nan", "null", "\0",
    "\ud800", "\x85", "\u2028", "\uff1c/s\uff1e", "</s>", "~", "~nosuch/x", "../../outside", "..",
    "/", "²", "{text", "{text}", "{}", "[prompt]", "[prompt:" + "9" * 5000 + "] {text}",
    "a" * 100_000, "rte", "builtin-small", "builtin:nosuch", "folder:~nosuch", "hf:", "tfds:", [],
    [1], ["a", "a"], [[]], [None], {}, {"a": 1}, {"": {}}, {"text": ["x"], "answer_start": [3]},
]  # fmt: skip


def odd_value(rng: random.Random) -> Any:
    """One of the odd values, or a deep or a wide tree."""
    if rng.random() < 0.05:
        deep: Any = []
        for _ in range(rng.choice([50, 2000, 50_000])):
            deep = [deep]
        return deep
    if rng.random() < 0.03:
        return list(range(rng.choice([100, 20_000])))
    return rng.choice(ODD_VALUES)


def places(tree: Any, path: tuple = ()) -> list[tuple]:
    """The paths of all values in a tree of mappings and lists, the tree itself left out."""
    found = []
    if isinstance(tree, dict | list) and len(path) < 20:
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            found += [(*path, key), *places(value, (*path, key))]
    return found


def damage_tree(rng: random.Random, tree: Any) -> Any:
    """A copy with one to three values replaced, removed, doubled in size or under another name."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        paths = places(tree)
        if not paths:
            return odd_value(rng)
        *parents, last = rng.choice(paths)
        holder = tree
        for key in parents:
            holder = holder[key]
        how = rng.random()
        value = holder[last]
        if how < 0.6:
            holder[last] = odd_value(rng)
        elif how < 0.75:
            del holder[last]
        elif how < 0.85 and isinstance(holder, dict):
            holder[rng.choice(["", "x", str(last) + "s", "__metadata__", "a.b"])] = value
        elif type(value) is int:
            holder[last] = rng.choice([-value, value + 1, value * 2, value * 10**6, value / 2])
        elif isinstance(value, str):
            changed = [value * 2, value[:-1], value.upper(), f" {value}", f"{value}\n"]
            holder[last] = rng.choice(changed)
        elif isinstance(value, list):
            holder[last] = value * rng.choice([0, 2, 3])
    return tree


def tree_bytes(tree: Any) -> bytes:
    """JSON of a tree, with what JSON has no spelling for as Python spells it."""
    digits = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(tree).encode("utf-8", "surrogatepass")
    except RecursionError:
        return b"[" * 100_000
    finally:
        sys.set_int_max_str_digits(digits)


def damage_bytes(rng: random.Random, data: bytes) -> bytes:
    """A copy with bytes flipped, cut off, removed, doubled, inserted or overwritten."""
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        at = rng.randrange(len(data) + 1)
        size = rng.choice([1, 1, 2, 8, 100])
        piece = data[at : at + size]
        # where the piece that is replaced begins and ends, and what comes in its place
        start, end, new = rng.choice(
            [
                (at, at + 1, rng.randbytes(1)),
                (at, len(data), b""),
                (at, at + size, b""),
                (at, at, piece),
                (at, at, rng.randbytes(size)),
                (at, at + size, bytes(len(piece))),
                (at, at + size, b"\xff" * len(piece)),
                (0, 0, rng.choice([b"\xef\xbb\xbf", b"\xff\xfe"])),
            ]
        )
        data = data[:start] + new + data[end:]
    return data
