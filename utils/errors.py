"""The exception that a command line turns into one line and exit code 2."""


class UserError(ValueError):
    """A mistake that the user can correct. The message is one line with the file or key, the value and the remedy."""
