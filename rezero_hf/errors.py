"""The one exception for input a user can put right, and what to quote in it."""


class UserError(ValueError):
    """Bad input from a user; the message is one line that names the file, field and value, and the way out.

    Scripts print it without a traceback (`scripts` exit with status 2). It is a `ValueError`, so library users who
    catch those need not know it.
    """


def one_line(error: BaseException, most: int | None = 200) -> str:
    """What a library says, for the end of a message of ours: in one line, of `most` characters; None keeps all."""
    return " ".join(str(error).split())[:most]
