"""The one exception for what a user can put right."""


class UserError(ValueError):
    """Something the user gave is wrong; the message is one line that names the thing and the fix.

    The command line prints it without a traceback and exits with code 2.
    """
