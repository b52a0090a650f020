"""YAML with the scalars of version 1.2, which PyYAML (1.1) reads otherwise.

What is read is plain data: text, numbers, true, false, null, lists and mappings. Tags for anything
else are errors, and so are documents that are large or become large when their aliases are
written out.

Why not ruamel.yaml, which is YAML 1.2 by default (tried with 0.19.1, typ="safe", pure): it takes
dates, 1_000, 0b1, merge keys, !!binary and !!set for values; lists as keys and endless aliases are
read; a malformed tag is a KeyError; 40 of the 800 texts of test_config.py do not survive its dump;
and our configs take 16 ms each instead of 7. All of that would have to be closed in code as long as
this file.
"""

import re
from collections.abc import Hashable

import yaml

from jaxprompt.config.values import Value

Error = yaml.YAMLError

# characters of a document: ten times what any config needs, and a few seconds to read
LONGEST = 2**18
# values in a document, those behind an alias counted each time that the alias is used
LARGEST = 100_000
DEEPEST = 100

_TAG = "tag:yaml.org,2002:"
_BOOL = r"true|True|TRUE|false|False|FALSE"
_INT = r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"
_FLOAT = (
    r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_NULL = r"~|null|Null|NULL|"


class _Yaml12(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars: ``yes``, ``1:30``, dates are words, ``3e-4`` a number."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """YAML 1.2 has no merge keys: ``<<`` is a word."""

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Hashable, Value]:
        if not isinstance(node, yaml.MappingNode):
            raise _wrong(node, "a mapping")
        mapping: dict[Hashable, Value] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                problem = "a list or mapping cannot be a key"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            if key in mapping:
                problem = f"key {str(key)[:80]!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            mapping[key] = self.construct_object(value_node, deep=deep)
        return mapping


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes words which only YAML 1.2 reads as numbers."""


def _wrong(node: yaml.Node, wanted: str) -> yaml.constructor.ConstructorError:
    given = "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
    if isinstance(node, yaml.ScalarNode):
        given = repr(node.value[:40])
    problem = f"{given} is tagged as {wanted} and is none"
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _scalar(node: yaml.Node, pattern: str, wanted: str) -> str:
    """The text of a scalar that the pattern allows; implicit scalars always are."""
    if not isinstance(node, yaml.ScalarNode) or not re.fullmatch(pattern, node.value):
        raise _wrong(node, wanted)
    return node.value


def _null(_: _Yaml12, node: yaml.Node) -> None:
    _scalar(node, _NULL, "null")


def _bool(_: _Yaml12, node: yaml.Node) -> bool:
    return _scalar(node, _BOOL, "true or false").lower() == "true"


def _int(_: _Yaml12, node: yaml.Node) -> int:
    text = _scalar(node, _INT, "a whole number")
    if len(text) > 1000:
        problem = f"a number of {len(text)} digits is too large"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    return int(text, 0 if text[:2] in ("0o", "0x") else 10)


def _float(_: _Yaml12, node: yaml.Node) -> float:
    text = _scalar(node, f"{_FLOAT}|{_INT}", "a number").lower()
    if text[:2] in ("0o", "0x"):
        return float(int(text, 0))
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


_Yaml12.yaml_constructors = {
    kind: yaml.SafeLoader.yaml_constructors[kind]
    for kind in (f"{_TAG}str", f"{_TAG}seq", f"{_TAG}map", None)
} | {f"{_TAG}{name}": make for name, make in
     (("null", _null), ("bool", _bool), ("int", _int), ("float", _float))}  # fmt: skip

_YAML_1_1 = tuple(f":{kind}" for kind in ("bool", "int", "float", "timestamp", "value", "merge"))
_Yaml12.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if not pair[0].endswith(_YAML_1_1)]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, _pattern, _first in (
    ("bool", _BOOL, "tTfF"),
    ("int", _INT, "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
):
    for _class in (_Yaml12, _Dumper):
        _regexp = re.compile(rf"^(?:{_pattern})\Z")
        _class.add_implicit_resolver(f"{_TAG}{_name}", _regexp, list(_first))


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """Text with line breaks of Unicode is quoted with escapes: readers take them for blanks."""
    style = '"' if re.search("[\x85\u2028\u2029\ufeff\r]", text) else None
    return dumper.represent_scalar(f"{_TAG}str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def load(text: str) -> Value:
    """Parse without executing anything.

    Raises:
        Error: the text is not YAML, or holds what is no plain data.
        ValueError: it is too long, too deep, or its aliases make it too large.
        RecursionError: it is far too deep.
    """
    if len(text) > LONGEST:
        raise ValueError(f"it has {len(text)} characters, and {LONGEST} are allowed")
    try:
        return _unshared(yaml.load(text, Loader=_Yaml12), [LARGEST])
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise Error(f"a value does not fit its tag ({type(error).__name__}: {error})") from None


def load_flow(text: str) -> Value:
    """What ``text`` means where it begins with a bracket, a brace or a quote.

    ``{text}`` is None's mapping to YAML and a template to everybody else: a mapping none of whose
    keys has a value is its own text.
    """
    node = yaml.compose(text, Loader=_Yaml12)
    bare = isinstance(node, yaml.MappingNode) and all(
        isinstance(value, yaml.ScalarNode) and value.value == "" and value.style is None
        for _, value in node.value
    )
    return text if bare and node.value else load(text)


def scalar(text: str) -> Value:
    """A lone plain scalar: null, a truth value, a number, or else the text as it is."""
    loader, kept = _Yaml12(""), text.strip(" ")
    if text and not kept:
        return text
    for pattern, make in ((_NULL, _null), (_BOOL, _bool), (_INT, _int), (_FLOAT, _float)):
        if re.fullmatch(pattern, kept):
            return make(loader, yaml.ScalarNode("", kept))
    return text


def _unshared(value: Value, left: list[int], depth: int = 0) -> Value:
    """A copy in which nothing stands twice, so that a change to one place is a change to one.

    left: how many more values there may be; aliases of aliases make billions of a few lines.
    """
    left[0] -= 1
    if left[0] < 0:
        raise ValueError(f"it holds more than {LARGEST} values, those of its aliases included")
    if depth > DEEPEST:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels")
    if isinstance(value, dict):
        return {key: _unshared(inner, left, depth + 1) for key, inner in value.items()}
    if isinstance(value, list):
        return [_unshared(inner, left, depth + 1) for inner in value]
    return value


def dump(values: Value) -> str:
    """Text that ``load`` (and a 1.1 reader) reads back to equal values, keys in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
