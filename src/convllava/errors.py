"""The one kind of error that is the user's to mend."""


class InputError(ValueError):
    """Bad input from outside: one line that says what, where and how to mend it.

    The command line prints the message alone and exits with code 2; Python callers catch it as a `ValueError`.
    """
