"""JSON from files that nobody vouches for."""

import pytest

from jaxprompt.config.errors import UserError
from jaxprompt.runtime.json_file import parse_json, read_json


@pytest.mark.parametrize("text, problem", [
    ('{"a": 1, "b": {"c": 2, "c": 3}}', "names the key 'c' twice"),
    ("[" * 100_000, "nests too deep"),
    ('{"a": }', "is not valid JSON"),
    (b"\xff\xfe\xff", "is not valid JSON"),
])  # fmt: skip
def test_what_is_wrong_with_a_text_is_said_with_the_name_of_the_file(text, problem):
    with pytest.raises(UserError, match=f"x.json .*{problem}"):
        parse_json(text, "x.json")


def test_a_file_holds_an_object(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"a": [1, null]}')
    assert read_json(path) == {"a": [1, None]}
    path.write_text("[1]")
    with pytest.raises(UserError, match="holds no JSON object"):
        read_json(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_json(tmp_path / "other.json")
