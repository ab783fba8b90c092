"""A folder to a Hub repository: one commit, tried again while that can help, and never twice.

What is on the Hub always loads: weights, code, tokenizer and card go in the same commit, and files of an earlier push
that the new one does not have leave in it too.
"""

import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, ModelInfo, get_session
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import parse_ratelimit_headers

from .errors import HUB_FAILURES, UserError
from .export import EXPORTED, FIGURES
from .hub import USER_SECTION, user_section
from .licences import DEFAULT, license_in, relicensed
from .runs import read_record


# Answers after which the same request may succeed: the server is busy, or somebody else has committed meanwhile.
PASSING = {408, 409, 412, 425, 429, 500, 502, 503, 504}
# Left by an earlier push when the new one lacks them: weights, figures, checkpoints, what an export has one name for.
# Any other file may be somebody's, and so may the text of a card.
NAMES = [*FIGURES, *(name for name in EXPORTED if "*" not in name and name != "README.md")]
STALE = re.compile(rf"model(-\d+-of-\d+)?\.safetensors|{'|'.join(map(re.escape, NAMES))}|checkpoint-(?P<step>\d+)/.+")
# Seconds without a byte after which a connection counts as lost. The client's own default is never.
READ_TIMEOUT, ACCESS_TIMEOUT = 300.0, 30.0
# Seconds before the second attempt; doubled every time up to the last one. The Hub allows 128 commits an hour.
FIRST_WAIT, LONGEST_WAIT = 2.0, 300.0


class PushError(UserError):
    """The Hub could not be reached, or refused; trying again now would not help."""


@dataclass(frozen=True)
class Repository:
    """Where to push.

    Args:
        name: `ORG/NAME`, or `NAME` under the account that is logged in.
        revision: a branch, made when missing; None is `main`.
        private: of a repository that does not exist yet; None is the account's default.
        token: None (default) is the one of `hf auth login` or `HF_TOKEN`.
    """

    name: str
    revision: str | None = None
    private: bool | None = None
    token: str | None = None

    @property
    def branch(self) -> str:
        return self.revision or "main"

    def __str__(self) -> str:
        return self.name + (f"@{self.revision}" if self.revision else "")

    def prepare(self, api: HfApi) -> str:
        """Make repository and branch if they are missing; returns the full name."""
        name = api.create_repo(self.name, private=self.private, token=self.token, exist_ok=True).repo_id
        if self.revision:
            api.create_branch(name, branch=self.revision, token=self.token, exist_ok=True)
        return name


@dataclass(frozen=True)
class Pushed:
    """What a push came to: the commit that holds the folder, how often it was tried, and the seconds it took."""

    commit: str
    attempts: int
    seconds: float


def push_folder(
    folder: str | Path,
    repository: Repository,
    message: str,
    *,
    keep: Callable[[int], bool] = lambda step: False,
    patience: float = 1800.0,
    tell: Callable[[str], None] = lambda line: None,
    api: HfApi | None = None,
) -> Pushed:
    """Upload a folder in one commit.

    Repeating it is harmless: files that are there already are not uploaded again, and if all are, nothing is committed.
    So an answer that was lost on the way cannot lead to a second commit. Of the card on the Hub the user's section is
    kept. Other people's files there stay; those that only an earlier push can have left go.

    Args:
        folder: what to upload, all of it. It should verify (`verify_folder`); it is not checked here.
        repository: where to.
        message: of the commit.
        keep: whether a training checkpoint in the repository, by its step, stays although the folder lacks it. Default:
            none does.
        patience: seconds during which failures that may pass are tried again.
        tell: called with a line before each wait, and for files that go.
        api: the client; default, one made here.

    Returns:
        The commit.

    Raises:
        PushError: no access, no such place, the Hub refuses the files, a file is gone, or `patience` is over.
        UserError: the card on the Hub is somebody's own, or its user's section is another than the folder's.
    """
    folder, api = Path(folder), api or HfApi(library_name="rezero_hf")
    get_session().timeout = READ_TIMEOUT
    # Once: a folder that loses files on the way must not become a commit that deletes them.
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    if not files:
        raise PushError(f"{repository}: {folder} holds nothing to push")
    started, attempts, delay = time.monotonic(), 0, FIRST_WAIT
    while True:
        attempts += 1
        try:
            commit = _commit(files, repository, message, keep, tell, api)
            return Pushed(commit, attempts, round(time.monotonic() - started, 3))
        except HUB_FAILURES as error:
            why = _one_line(error)
            if not _may_pass(error):
                raise PushError(f"{repository}: {why}") from error
            pause = _asked_to_wait(error) or delay * random.uniform(0.75, 1.25)
            if time.monotonic() - started + pause > patience:
                raise PushError(f"{repository}: gave up after {attempts} attempt(s): {why}") from error
            tell(f"push to {repository}: {why}; trying again in {pause:.0f} s")
            time.sleep(pause)
            delay = min(2 * delay, LONGEST_WAIT)


def check_access(repository: Repository, api: HfApi | None = None) -> str | None:
    """Find out before hours of training whether a push could work; makes the repository if it is missing.

    Returns:
        None, or why the Hub cannot be asked just now (which may pass).

    Raises:
        PushError: nobody is logged in, the token may not write there, or the name is none.
        UserError: the card there is somebody's own.
    """
    api = api or HfApi(library_name="rezero_hf")
    # Other processes of the run wait for this.
    get_session().timeout = ACCESS_TIMEOUT
    try:
        name = repository.prepare(api)
        api.auth_check(name, token=repository.token, write=True)
        head = api.repo_info(name, revision=repository.branch, token=repository.token)
        _card_on_the_hub(name, head, api, repository.token)
    except HFValidationError as error:
        raise PushError(f"{repository}: {_one_line(error)}") from error
    except HUB_FAILURES as error:
        if _may_pass(error):
            return _one_line(error)
        raise PushError(
            f"{repository}: {_one_line(error)}; log in with `hf auth login` as somebody who may write there"
        ) from error
    return None


def _commit(
    files: dict[str, Path],
    repository: Repository,
    message: str,
    keep: Callable[[int], bool],
    tell: Callable[[str], None],
    api: HfApi,
) -> str:
    name, token = repository.prepare(api), repository.token
    head = api.repo_info(name, revision=repository.branch, token=token)
    there = {file.rfilename for file in head.siblings or ()}
    # New operations every time: used ones have forgotten to ask what the Hub has.
    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    for path_in_repo, path in files.items():
        content = path
        if path_in_repo == "README.md":
            old, card = _card_on_the_hub(name, head, api, token), path.read_text(encoding="utf-8")
            card = _with_section(card, user_section(old) or "", name)
            content = _with_license(card, old, read_record(path.with_name("run.json"))).encode()
        operations.append(CommitOperationAdd(path_in_repo, content))
    left = [found for file in sorted(there - files.keys()) if (found := STALE.fullmatch(file))]
    stale = [found.string for found in left if found["step"] is None or not keep(int(found["step"]))]
    if stale:
        tell(f"push to {repository}: removes {', '.join(stale)}")
    operations += [CommitOperationDelete(file) for file in stale]
    # The commit builds on what was just looked at; one that somebody made meanwhile is answered with 412.
    commit = api.create_commit(
        name, operations, commit_message=message, revision=repository.branch, parent_commit=head.sha, token=token
    )
    return commit.oid


def _card_on_the_hub(name: str, head: ModelInfo, api: HfApi, token: str | None) -> str:
    """The card there, which is one of this package's or metadata alone; empty where there is none."""
    if "README.md" not in {file.rfilename for file in head.siblings or ()}:
        return ""
    old = Path(api.hf_hub_download(name, "README.md", revision=head.sha, token=token)).read_text(encoding="utf-8")
    if user_section(old) is None and ModelCard(old, ignore_metadata_errors=True).text.strip():
        raise UserError(
            f"{name}: the README.md there is not one of this package's, and would be lost; put the lines "
            f"{USER_SECTION[0]!r} and {USER_SECTION[1]!r} around what to keep, or delete it"
        )
    return old


def _with_section(card: str, section: str, name: str) -> str:
    """The card with the section from the Hub, unless it has the only one."""
    own = user_section(card)
    if own is None or not section or own == section:
        return card
    if own:
        raise UserError(
            f"{name}: the user's section of the README.md there is another than the one here; make them the same"
        )
    begin, end = USER_SECTION
    return f"{card[: card.index(begin) + len(begin)]}\n\n{section}\n\n{card[card.index(end) :]}"


def _with_license(card: str, old: str, run: dict[str, Any]) -> str:
    """The card with the licence from the Hub, where nobody has said another than a new model's."""
    there = license_in(old)
    said = run.get("license") or license_in(card) != DEFAULT
    return card if said or not there else relicensed(card, there)


def _may_pass(error: Exception) -> bool:
    error = _reason(error)
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in PASSING and not isinstance(error, RepositoryNotFoundError)
    # A gateway before the Hub answers in HTML, and what Xet stumbles over is a bare RuntimeError. What else is a
    # ValueError or an OSError is a bad name, or a file here.
    passing = isinstance(error, HTTPError | JSONDecodeError | ConnectionError | TimeoutError | RuntimeError)
    return passing and not isinstance(error, OfflineModeIsEnabled)


def _reason(error: Exception) -> Exception:
    """What is behind the errors that the client wraps others in."""
    while isinstance(error, RuntimeError | LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _asked_to_wait(error: Exception) -> float | None:
    """The seconds until the Hub wants to be asked again, of either header in which it says so."""
    error = _reason(error)
    headers = error.response.headers if isinstance(error, HfHubHTTPError) else {}
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds) + 1
    value = headers.get("retry-after", "")
    return float(value) if value.isdigit() else None


def _one_line(error: Exception) -> str:
    error = _reason(error)
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
