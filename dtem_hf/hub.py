"""The Hub's client with bounds on what it downloads, one commit for what it publishes, and errors that say what to do.

Where something is not there FileNotFoundError is raised, where it may not be had PermissionError, and ConnectionError
where the Hub cannot be reached while something is published. All are OSErrors that name the repository.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # type: ignore[attr-defined]  # httpx's or httpx2's, as the version of huggingface_hub has it
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from . import __version__
from .card import CARD_NAME
from .errors import AdapterError, BadValue


MAIN = "main"
_TRIES_AGAINST_OTHERS = 3
_LOG_IN = "log in with `hf auth login`, set HF_TOKEN, or pass token="


def download(
    repo_id: str, filename: str, largest: int, revision: str | None = None, **options: Any
) -> tuple[Path, str]:
    """A file of a repository, from the Hub or its cache, and the commit it is of.

    Its size is asked for first, and more than `largest` bytes are not downloaded. `options` are `hf_hub_download`'s.
    Raises FileNotFoundError, PermissionError, or AdapterError for a file that is too large.
    """
    with clear_errors(repo_id, revision):
        facts = hf_hub_download(repo_id, filename, revision=revision, dry_run=True, **options)
        if facts.file_size is None or facts.file_size > largest:
            raise AdapterError(
                f"{repo_id}: {filename} has {facts.file_size} bytes and should have {largest} at most; "
                "nothing was downloaded."
            )
        path = hf_hub_download(repo_id, filename, revision=revision, **options)
    return Path(path), facts.commit_hash


def publish(
    repo_id: str,
    files: Mapping[str, bytes],
    commit_message: str,
    *,
    private: bool | None = None,
    branch: str | None = None,
    create_pr: bool = False,
    overwrite_card: bool = False,
    token: str | bool | None = None,
) -> CommitInfo:
    """Put files into a repository (made if needed) in one commit, so that all of them arrive or none.

    A README.md that is there is kept unless `overwrite_card`; what has not changed makes no commit. Raises ValueError
    for options that contradict each other, PermissionError where the token may not do it, ConnectionError.
    """
    if create_pr and branch not in (None, MAIN):
        raise BadValue("branch", branch, f"{MAIN!r} or None beside create_pr=True, which proposes a change of {MAIN}")
    api = HfApi(token=token, library_name="dtem-hf", library_version=__version__)
    with clear_errors(repo_id, branch, publishing=True):
        repo_id = prepare(api, repo_id, private, None if create_pr else branch)
        for tries_left in reversed(range(_TRIES_AGAINST_OTHERS)):
            head = api.model_info(repo_id, revision=branch or MAIN)
            there = {entry.rfilename for entry in head.siblings or ()}
            wanted = {name: data for name, data in files.items() if name != CARD_NAME or overwrite_card}
            if CARD_NAME in files and CARD_NAME not in there:
                wanted[CARD_NAME] = files[CARD_NAME]
            elif CARD_NAME in files and not overwrite_card:
                warnings.warn(
                    f"{repo_id} has a {CARD_NAME}, which is kept; pass overwrite_card=True (--overwrite-card) to "
                    "replace it.",
                    stacklevel=3,
                )
            try:
                # Refused by the Hub if somebody else was faster: what was just seen to be there may have changed.
                return api.create_commit(
                    repo_id,
                    [CommitOperationAdd(name, data) for name, data in wanted.items()],
                    commit_message=commit_message,
                    revision=branch or MAIN,
                    create_pr=create_pr,
                    parent_commit=head.sha,
                )
            except HfHubHTTPError as error:
                if error.response.status_code != 412 or not tries_left:
                    raise
    raise AssertionError("the last try returns or raises")


def prepare(api: HfApi, repo_id: str, private: bool | None = None, branch: str | None = None) -> str:
    """Make a repository and a branch where they are not there yet. Returns the repository's full id.

    Raises ValueError where the repository is public and `private` is wanted.
    """
    if "/" not in repo_id:
        repo_id = f"{api.whoami()['name']}/{repo_id}"
    try:
        found = api.model_info(repo_id)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        found = api.model_info(repo_id)
    if private and not found.private:
        raise BadValue("private", private, f"{repo_id} is there and public; change that in its settings, or name another")
    if branch not in (None, MAIN) and not branch.startswith("refs/"):  # type: ignore[union-attr]
        api.create_branch(repo_id, branch=branch, exist_ok=True)  # type: ignore[arg-type]
    return repo_id


@contextmanager
def clear_errors(repo_id: str, revision: str | None = None, publishing: bool = False) -> Iterator[None]:
    """Turn what the client raises inside the block into an OSError that names the repository and what to do."""
    try:
        yield
    except HFValidationError as error:
        raise FileNotFoundError(
            f"{repo_id!r} is neither a folder here nor a Hub id (user/repo): {_first_line(error)}"
        ) from error
    except GatedRepoError as error:
        raise PermissionError(
            f"{repo_id} is gated: ask for access at {constants.ENDPOINT}/{repo_id}, and {_LOG_IN}."
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"there is no repository {repo_id} on {constants.ENDPOINT} that you may see, and no folder of that name "
            f"here. Check the name; if the repository is private, {_LOG_IN}."
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{repo_id} has no revision {revision!r}: name a branch, a tag, or a commit of it."
        ) from error
    except RemoteEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{repo_id} (revision {revision or MAIN}) is no merge adapter, or lacks a part: {_first_line(error)} "
            f"There is no {_file_of(error)} in it."
        ) from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(_not_cached(repo_id, revision, error)) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            message = f"{constants.ENDPOINT} does not accept your token for {repo_id}: {_LOG_IN} of a valid one."
        elif status == 403:
            message = f"your token may not {'write to' if publishing else 'read'} {repo_id}: {error.server_message}."
            message += " Take a token with write access to it, or create_pr=True." if publishing else ""
        elif status == 412:
            raise ConnectionError(f"{repo_id} is being changed by others all the time; try again.") from error
        elif status < 500 and status not in (408, 429):
            raise OSError(f"{repo_id}: the Hub refused: {error.server_message or _first_line(error)}") from error
        else:
            raise ConnectionError(f"{repo_id}: the Hub answered {_first_line(error)} Try again later.") from error
        raise PermissionError(message) from error
    except (HTTPError, ConnectionError, RuntimeError, TimeoutError) as error:
        reason = _first_line(error.__cause__ or error)
        raise ConnectionError(
            f"{repo_id}: the connection to {constants.ENDPOINT} failed ({reason}). "
            + ("Nothing was published; try again." if publishing else "Try again.")
        ) from error


def _not_cached(repo_id: str, revision: str | None, error: LocalEntryNotFoundError) -> str:
    """The client found nothing in its cache: nobody asked the Hub, or it gave no answer."""
    what = f"{repo_id} (revision {revision or MAIN})"
    if error.__cause__ is None or constants.is_offline_mode():
        return f"{what} is not in the cache, and the Hub was not asked (offline): load it once with a connection."
    return f"{what} is not in the cache, and {constants.ENDPOINT} cannot be reached ({_first_line(error.__cause__)})."


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _file_of(error: HfHubHTTPError) -> str:
    return os.path.basename(str(error.response.url).split("?")[0])
