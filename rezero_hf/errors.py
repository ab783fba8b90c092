"""The one exception for input a user can put right."""


class UserError(ValueError):
    """Bad input from a user; the message is one line that names the file, field and value, and the way out.

    Scripts print it without a traceback (`scripts` exit with status 2). It is a `ValueError`, so library users who
    catch those need not know it.
    """
