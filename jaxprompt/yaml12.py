"""YAML with the scalars of version 1.2, which PyYAML (1.1) reads otherwise."""

import re
from typing import Any

import yaml

Error = yaml.YAMLError


class _Yaml12(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars: ``yes``, ``1:30``, dates are words, ``3e-4`` a number."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            problem = f"key {twice[0]!r} is given twice"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes words which only YAML 1.2 reads as numbers."""


_YAML_1_1 = tuple(f":{kind}" for kind in ("bool", "int", "float", "timestamp", "value", "merge"))
_Yaml12.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if not pair[0].endswith(_YAML_1_1)]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    for _class in (_Yaml12, _Dumper):
        _regexp = re.compile(f"^(?:{_pattern})$")
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _regexp, list(_first))


def _integer(loader: _Yaml12, node: yaml.ScalarNode) -> int:
    return int(node.value, 0 if node.value[:2] in ("0o", "0x") else 10)


_Yaml12.add_constructor("tag:yaml.org,2002:int", _integer)


def load(text: str) -> Any:
    """Parse without executing anything; raises ``Error``, ValueError or RecursionError."""
    return yaml.load(text, Loader=_Yaml12)


def dump(values: Any) -> str:
    """Text that ``load`` (and a 1.1 reader) reads back to equal values, keys in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
