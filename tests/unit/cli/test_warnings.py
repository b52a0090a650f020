"""How the command line prints warnings."""

from jaxprompt.cli.errors import show_warning


def test_a_renamed_key_is_a_line_without_a_place_in_the_code(capsys):
    show_warning(FutureWarning("rename it"), FutureWarning, "a.py", 3)
    show_warning(UserWarning("odd"), UserWarning, "a.py", 3)
    assert capsys.readouterr().err == "warning: rename it\nwarning: a.py:3: UserWarning: odd\n"
