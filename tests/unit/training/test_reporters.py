"""Who is told how a run goes on, where nobody said."""

import sys

from jaxprompt.training.metric_log import NullReporter
from jaxprompt.training.reporters import ProgressBar, automatic


def test_a_terminal_sees_a_bar_and_a_file_nothing(monkeypatch, capsys):
    with automatic(None, 5) as silent:
        assert isinstance(silent, NullReporter)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with automatic(None, 5) as bar:
        assert isinstance(bar, ProgressBar)
        bar.say("loading")
        bar.step(5, {"loss": 0.25})
    err = capsys.readouterr().err
    assert "loading" in err and "5/5" in err and "loss=0.25" in err


def test_a_reporter_that_is_given_is_used():
    mine = NullReporter()
    with automatic(mine, 5) as told:
        assert told is mine
