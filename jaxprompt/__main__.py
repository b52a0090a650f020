"""The command ``jaxprompt``, also as ``python -m jaxprompt``: ``cli.main`` in huge pages."""

from jaxprompt.runtime.memory import start_again_with_huge_pages


def main() -> None:
    """Start again before anything is imported that takes time, then run the command."""
    start_again_with_huge_pages()
    from jaxprompt.cli.app import main as run

    run()


if __name__ == "__main__":
    main()
