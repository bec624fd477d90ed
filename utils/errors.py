"""The one exception a command line turns into a single line and exit code 2."""


class UserError(ValueError):
    """A mistake the user can mend: the message is one line naming the file or key, the value and the remedy."""
