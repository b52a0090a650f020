"""The schema of a run: YAML plus ``key=value`` overrides. Every configuration error is born here."""


class UserError(ValueError):
    """A mistake that the user can mend: one sentence with the value, what is allowed and the fix.

    The command line prints it without a traceback and exits with code 2.
    """
