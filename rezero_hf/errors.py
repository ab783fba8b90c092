"""The one exception for input a user can put right, and what to quote in it."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import HTTPError


# What the Hub's client raises when the network, the Hub, a name or a card is at fault; httpx's errors, which it lets
# pass, are no OSErrors. A failed upload of a large file is a RuntimeError with one of the others as its cause.
HUB_FAILURES = (OSError, HTTPError, ValueError, RuntimeError)


class UserError(ValueError):
    """Bad input from a user; the message is one line that names the file, field and value, and the way out.

    Scripts print it without a traceback (`scripts` exit with status 2). It is a `ValueError`, so library users who
    catch those need not know it.
    """


@contextmanager
def refused(where: str) -> Iterator[None]:
    """Turn what a library says inside of words that do not go together into the line `where: why`.

    Raises:
        UserError: instead of what a library raises of words; one from inside passes as it is.
    """
    try:
        yield
    except UserError:
        raise
    except (ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{where}: {one_line(error, None)}") from error


def one_line(error: BaseException, most: int | None = 200) -> str:
    """What a library says, for the end of a message of ours: in one line, of `most` characters; None keeps all."""
    return " ".join(str(error).split())[:most]
