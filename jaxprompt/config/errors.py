"""What a user is told: one sentence with the value, what is allowed and the fix."""

import itertools
import reprlib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake that the user can mend: one sentence with the value, what is allowed and the fix.

    The command line prints it without a traceback and exits with code 2. Of a sentence that some
    value has made endless, the middle is left out.
    """

    def __init__(self, message: str = ""):
        if len(message) > 2500:
            message = f"{message[:2000]} ... {message[-400:]}"
        super().__init__(message)


class _Bounded(reprlib.Repr):
    """``repr`` of a few items on a few levels, however large a value is; keys in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxlong, self.maxother = 4, 160, 60, 160
        self.maxtuple = self.maxlist = self.maxdict = self.maxset = 20

    def repr_dict(self, x: dict[object, object], level: int) -> str:
        if level <= 0 and x:
            return "{...}"
        items = [
            f"{self.repr1(key, level - 1)}: {self.repr1(value, level - 1)}"
            for key, value in itertools.islice(x.items(), self.maxdict)
        ]
        return "{" + ", ".join(items + ["..."] * (len(x) > self.maxdict)) + "}"


_BOUNDED = _Bounded()


def shown(value: object) -> str:
    """``repr(value)`` for an error message, cut to some hundreds of characters.

    The work is bounded too: of a value that would print a billion words only a few are visited.

    >>> shown({"b": [1, 2], "a": "x"})
    "{'b': [1, 2], 'a': 'x'}"
    """
    try:
        text = _BOUNDED.repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 400 else f"{text[:200]} ... {text[-40:]}"


def listed(names: Iterable[object], max_names: int = 30) -> str:
    """Names for an error message, separated by commas; of many the first ones and their number.

    >>> listed(["a", "b"]), listed("abcd", max_names=2)
    ('a, b', 'a, b, ... (4 in all)')
    """
    every = [str(name) for name in names]
    some = [name if len(name) <= 80 else f"{name[:60]}..." for name in every[:max_names]]
    return ", ".join(some) + (f", ... ({len(every)} in all)" if len(every) > max_names else "")
