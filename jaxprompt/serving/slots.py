"""The bank of slots on the device: a cache of versions whose shape never changes.

Every leaf of the bank has K slots. A version that a batch needs is written into a slot, in place,
and the least recently used one makes room. Slot 0 is the backbone as it is: all zeros.

The shape of a slot is made at the start, from the prompts that are known then: the longest of them,
and the union of what they change in the layers. What a version does not have is zeros there, which
change nothing (``methods.layers.joined`` does the same), and a shorter prefix is masked. So a batch
of any versions is one program, and a new version compiles nothing.

Only one thread may use ``place``, ``pin`` and ``injection``. The device does its work in the order
in which it was given, so a slot may be overwritten while a batch that reads it is still computed.
"""

import collections
import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxprompt.config.errors import UserError
from jaxprompt.config.values import Values
from jaxprompt.data.batches import AnyArray
from jaxprompt.inference.engine import count_compilation
from jaxprompt.methods.layers import from_tensors, joined, to_tensors
from jaxprompt.methods.tuned import Prompt
from jaxprompt.models.injection import Injection, Layers
from jaxprompt.serving.version import Version

WRITES = (1, 4, 16)  # slots that are written at once; fewer are filled up by repetition
DEFAULT_LENGTH = 100  # virtual tokens of a slot if no prompt is known that has any


class SlotShape(NamedTuple):
    """What one slot can hold."""

    length: int  # P, virtual tokens at most
    width: int  # D
    dtype: str  # that the model embeds in
    # of changes of the layers, by name (``methods.layers.to_tensors``): shape without slots
    layers: Mapping[str, tuple[int, ...]]
    settings: dict[str, Values]  # of adapters, by path

    @property
    def bytes(self) -> int:
        """Of device memory for one slot."""
        sizes = [math.prod(shape) * _dtype(name).itemsize for name, shape in self.layers.items()]
        return self.length * self.width * jnp.dtype(self.dtype).itemsize + sum(sizes)


def slot_shape(
    prompts: Sequence[Prompt], width: int, dtype: str = "float32", max_prompt_length: int = 0
) -> SlotShape:
    """The shape that holds each of the prompts.

    Args:
        prompts: that are known at the start, fitted to the backbone.
        width: d_model of the backbone.
        dtype: of the model's activations (``Runtime.activations``).
        max_prompt_length: virtual tokens of a slot, or more where a prompt has more; 0: as many as
            the longest prompt has.

    Raises:
        UserError: two adapters cannot be in one bank, or an adapter's backbone is not known.
    """
    longest = max((len(prompt.vectors) for prompt in prompts), default=0)
    kinds: dict[tuple, Layers] = {}  # layers of each shape once: there may be thousands of prompts
    for prompt in prompts:
        if prompt.layers is not None:
            tensors, settings = to_tensors(prompt.layers)
            shapes = tuple(sorted((name, np.shape(tensor)) for name, tensor in tensors.items()))
            kinds[shapes, repr(settings)] = prompt.layers
    tensors, settings = to_tensors(_union(list(kinds.values())) or {})
    shapes = {name: tuple(tensor.shape[1:]) for name, tensor in tensors.items()}
    length = max(longest, max_prompt_length) or DEFAULT_LENGTH
    return SlotShape(length, width, dtype, shapes, settings)


def _union(layers: Sequence[Layers]) -> Layers | None:
    """Shapes of the layers of all, and of a member that changes none."""
    one = lambda leaf: jax.ShapeDtypeStruct((1, *np.shape(leaf)), np.asarray(leaf).dtype)
    members = [Injection(layers=jax.tree.map(one, each)) for each in layers]
    return jax.eval_shape(lambda *each: joined([*each, Injection()]), *members).layers


def _dtype(name: str) -> np.dtype:
    """Layers are kept in float32: each use rounds them as the model does, after the gather."""
    return np.dtype(bool if name.endswith("prefix/used") else np.float32)


class SlotBank:
    """K slots on the device, and which version is in which."""

    def __init__(self, shape: SlotShape, slots: int):
        """An empty bank.

        Args:
            shape: of a slot.
            slots: K, with slot 0.

        Raises:
            UserError: there is no slot for a prompt.
        """
        if slots < 2:
            raise UserError(f"The number of slots is {slots}; give 2 or more: one is the backbone.")
        self.shape, self.slots = shape, slots
        self.evictions = 0  # versions that made room for others
        self._of_version: collections.OrderedDict[Version, int] = collections.OrderedDict()
        self._free = list(range(slots - 1, 0, -1))
        self._pinned: set[Version] = set()
        self._injection = _empty(shape, slots)
        self._write = {count: _compiled_write(self._injection, shape, count) for count in WRITES}

    @property
    def injection(self) -> Injection:
        """The bank as it is now. The next ``place`` may reuse its memory: hold no other name."""
        return self._injection

    @property
    def room(self) -> int:
        """How many versions a batch may have at most."""
        return self.slots - 1 - len(self._pinned)

    @property
    def used(self) -> int:
        """How many slots hold a version. Any thread may ask."""
        return len(self._of_version)

    def holds(self, version: Version) -> bool:
        """Whether a version is in a slot."""
        return version in self._of_version

    def pin(self, version: Version, pinned: bool = True) -> None:
        """Keep a version in its slot from the next ``place`` on, or let it go.

        Raises:
            UserError: no slot would be left for others.
        """
        if not pinned:
            self._pinned.discard(version)
        elif version not in self._pinned:
            if self.room < 2:
                raise UserError(
                    f"All but one of {self.slots} slots are pinned; unpin a prompt, or start the "
                    "server with more --slots."
                )
            self._pinned.add(version)

    def check_fits(self, version: Version) -> None:
        """Raise a UserError unless a slot can hold the version. Any thread may call it."""
        prompt, shape = version.prompt, self.shape
        length, width = prompt.vectors.shape
        if width != shape.width:
            raise UserError(
                f"Prompt {version.name!r} has vectors of {width} numbers and the backbone has "
                f"d_model {shape.width}; use the backbone that it was tuned on."
            )
        if length > shape.length:
            raise UserError(
                f"Prompt {version.name!r} has {length} virtual tokens and a slot holds "
                f"{shape.length}; start the server with --max-prompt-length {length}."
            )
        if prompt.layers is not None:
            _check_layers(version.name, prompt.layers, shape)

    def place(self, versions: Sequence[Version | None]) -> list[int]:
        """The slot of each version, which it is written into where it is not there yet.

        Args:
            versions: of which no more than ``room`` differ; None for the bare backbone.

        Raises:
            ValueError: more differ.
        """
        wanted = dict.fromkeys(version for version in versions if version is not None)
        for version in wanted:
            if version in self._of_version:
                self._of_version.move_to_end(version)
        missing = [version for version in wanted if version not in self._of_version]
        for version in missing:
            self._of_version[version] = self._free_slot(wanted)
        for start in range(0, len(missing), WRITES[-1]):
            self._fill(missing[start : start + WRITES[-1]])
        return [0 if version is None else self._of_version[version] for version in versions]

    def drop(self, version: Version) -> None:
        """Free the slot of a version that no request will name again."""
        self._pinned.discard(version)
        slot = self._of_version.pop(version, None)
        if slot is not None:
            self._free.append(slot)

    def _free_slot(self, wanted: Mapping[Version, None]) -> int:
        if self._free:
            return self._free.pop()
        for version, slot in self._of_version.items():  # the least recently used first
            if version not in wanted and version not in self._pinned:
                del self._of_version[version]
                self.evictions += 1
                return slot
        raise ValueError(f"A batch has more different prompts than {self.room} free slots.")

    def _fill(self, versions: Sequence[Version]) -> None:
        count = next(count for count in WRITES if count >= len(versions))
        padded = [*versions, *[versions[-1]] * (count - len(versions))]
        slots = np.array([self._of_version[version] for version in padded], np.int32)
        members = _members([version.prompt for version in padded], self.shape)
        self._injection = self._write[count](self._injection, slots, members)


def _check_layers(name: str, layers: Layers, shape: SlotShape) -> None:
    tensors, settings = to_tensors(layers)
    at_start = "name it, or one of its kind, where the server is started: that makes room for it"
    for tensor_name, tensor in tensors.items():
        held, size = shape.layers.get(tensor_name), np.shape(tensor)
        if held is None:
            raise UserError(
                f"Prompt {name!r} changes {tensor_name!r}, for which slots have no room; {at_start}"
                "."
            )
        if len(held) != len(size) or any(a > b for a, b in zip(size, held, strict=True)):
            raise UserError(
                f"Prompt {name!r} has {list(size)} numbers at {tensor_name!r} and a slot holds "
                f"{list(held)}; {at_start}."
            )
    for path, values in settings.items():
        if shape.settings.get(path) != values:
            raise UserError(
                f"Prompt {name!r} has an adapter with {values} at {path!r} and slots have "
                f"{shape.settings.get(path)}; serve it from a server of its own."
            )


def _members(prompts: Sequence[Prompt], shape: SlotShape) -> Injection:
    """The prompts as NumPy leaves [W, ...] of the shape of slots."""
    vectors = np.zeros((len(prompts), shape.length, shape.width), shape.dtype)
    for row, prompt in zip(vectors, prompts, strict=True):
        row[: len(prompt.vectors)] = prompt.vectors
    if not shape.layers:
        return Injection(cast(jax.Array, vectors))
    tensors = [{} if prompt.layers is None else to_tensors(prompt.layers)[0] for prompt in prompts]
    stacked = {
        name: np.stack([_padded(name, size, each) for each in tensors])
        for name, size in shape.layers.items()
    }
    return Injection(cast(jax.Array, vectors), from_tensors(stacked, shape.settings))


def _padded(name: str, size: tuple[int, ...], tensors: Mapping[str, AnyArray]) -> np.ndarray:
    """One tensor of a prompt, with zeros up to the size of a slot's."""
    result = np.zeros(size, _dtype(name))
    tensor = tensors.get(name)
    if name.endswith("prefix/used") and tensor is None:
        key = tensors.get(name.removesuffix("used") + "key")
        tensor = None if key is None else np.ones(np.shape(key)[:2], bool)
    if tensor is None:
        return result
    part = tuple(map(slice, np.shape(tensor)))
    if "prefix" in name.split("/"):  # shorter prefixes end the places
        part = (part[0], slice(size[1] - np.shape(tensor)[1], None), *part[2:])
    result[part] = tensor
    return result


def _empty(shape: SlotShape, slots: int) -> Injection:
    bank = jnp.zeros((slots, shape.length, shape.width), shape.dtype)
    if not shape.layers:
        return Injection(bank)
    leaves = {name: jnp.zeros((slots, *size), _dtype(name)) for name, size in shape.layers.items()}
    return Injection(bank, from_tensors(leaves, shape.settings))


@functools.partial(jax.jit, donate_argnums=0)
def _write(bank: Injection, slots: jax.Array, members: Injection) -> Injection:
    count_compilation(_write)
    put = lambda leaf, new: leaf.at[slots].set(new, mode="promise_in_bounds")
    return jax.tree.map(put, bank, members)


def _compiled_write(bank: Injection, shape: SlotShape, count: int):
    nothing = Prompt(np.zeros((0, shape.width), np.float32), {})
    members = _members([nothing] * count, shape)
    return _write.lower(bank, np.zeros(count, np.int32), members).compile()
