"""The Hub's client with bounds on what it downloads, one commit for what it publishes, and errors that say what to do.

Where something is not there FileNotFoundError is raised, where it may not be had PermissionError, and ConnectionError
where the Hub cannot be reached while something is published. All are OSErrors that name the repository.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # httpx's or httpx2's, as the version of huggingface_hub has it
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import AdapterError, BadValue
from ..version import __version__
from .layout import CARD_NAME


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


def drop_cached(path: Path) -> None:
    """Remove a downloaded file, and the blob that it links to, from the Hub's cache; the next download replaces it."""
    blob = Path(os.path.normpath(path.parent / os.readlink(path))) if path.is_symlink() else path
    with suppress(OSError):  # a cache that may not be written to keeps it
        if blob.parent == path.parents[2] / "blobs":
            blob.unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def cached_commit(repo_id: str, revision: str | None = None, cache_dir: Any = None) -> str | None:
    """The commit of which a model's config was just loaded from the Hub; None for a folder, or where it is not known.

    The Hub is not asked.
    """
    if revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
        return str(revision)
    if os.path.isdir(repo_id):
        return None
    try:
        path = try_to_load_from_cache(repo_id, constants.CONFIG_NAME, cache_dir=cache_dir, revision=revision)
    except HFValidationError:
        return None
    return Path(path).parent.name if isinstance(path, str) else None


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

    A README.md that is there is kept unless `overwrite_card`, and the config.json of a model always; what has not
    changed makes no commit. Raises ValueError for options that contradict each other, PermissionError where the token
    may not do it, ConnectionError.
    """
    if create_pr and branch not in (None, MAIN):
        raise BadValue("branch", branch, f"{MAIN!r} or None beside create_pr=True, which proposes a change of {MAIN}")
    api = HfApi(token=token, library_name="dtem-hf", library_version=__version__)
    with clear_errors(repo_id, branch, publishing=True):
        repo_id = prepare(api, repo_id, private, None if create_pr else branch)
        for tries_left in reversed(range(_TRIES_AGAINST_OTHERS)):
            head = api.model_info(repo_id, revision=branch or MAIN)
            there = {entry.rfilename for entry in head.siblings or ()}
            kept = {constants.CONFIG_NAME, *(() if overwrite_card else (CARD_NAME,))} & there
            if CARD_NAME in kept & set(files):
                warnings.warn(
                    f"{repo_id} has a {CARD_NAME}, which is kept; pass overwrite_card=True (--overwrite-card) to "
                    "replace it.",
                    stacklevel=3,
                )
            try:
                # Refused by the Hub if somebody else was faster: what was just seen to be there may have changed.
                return api.create_commit(
                    repo_id,
                    [CommitOperationAdd(name, data) for name, data in files.items() if name not in kept],
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
        raise BadValue(
            "private", private, f"{repo_id} is there and public; change that in its settings, or name another"
        )
    if branch is not None and branch != MAIN and not branch.startswith("refs/"):
        api.create_branch(repo_id, branch=branch, exist_ok=True)
    return repo_id


@contextmanager
def clear_errors(repo_id: str, revision: str | None = None, publishing: bool = False) -> Iterator[None]:
    """Turn what the client raises inside the block into an OSError that names the repository and what to do."""
    try:
        yield
    except (HTTPError, OSError, RuntimeError, HFValidationError) as error:
        raise _clear(error, repo_id, revision, publishing) from error
    except ValueError as error:
        # A forced download that failed says no more than that.
        if not isinstance(error.__cause__, (HTTPError, OSError)):
            raise
        raise _clear(error.__cause__, repo_id, revision, publishing) from error


def _clear(error: Exception, repo_id: str, revision: str | None, publishing: bool) -> OSError:
    site, at = constants.ENDPOINT, f"{repo_id} (revision {revision or MAIN})"
    if isinstance(error, HFValidationError):
        return FileNotFoundError(
            f"{repo_id!r} is neither a folder here nor a Hub id (user/repo): {_first_line(error)}"
        )
    if isinstance(error, GatedRepoError):
        return PermissionError(f"{repo_id} is gated: ask for access at {site}/{repo_id}, and {_LOG_IN}.")
    if isinstance(error, RepositoryNotFoundError):
        return FileNotFoundError(
            f"there is no repository {repo_id} on {site} that you may see, and no folder of that name here. Check the "
            f"name; if the repository is private, {_LOG_IN}."
        )
    if isinstance(error, RevisionNotFoundError):
        return FileNotFoundError(f"{repo_id} has no revision {revision!r}: name a branch, a tag, or a commit of it.")
    if isinstance(error, RemoteEntryNotFoundError):
        name = os.path.basename(error.response.url.path)
        return FileNotFoundError(f"there is no {name} in {at}, so it is no merge adapter; look at {site}/{repo_id}.")
    if isinstance(error, LocalEntryNotFoundError):
        return FileNotFoundError(_not_cached(at, error))
    if isinstance(error, HfHubHTTPError):
        return _refused(error, repo_id, publishing)
    if isinstance(error, (HTTPError, ConnectionError, RuntimeError, TimeoutError)):
        after = "Nothing was published; the same command again goes on." if publishing else "Try again."
        return ConnectionError(
            f"{repo_id}: the connection to {site} failed ({_first_line(error.__cause__ or error)}). {after}"
        )
    return error if isinstance(error, OSError) else OSError(str(error))


def _refused(error: HfHubHTTPError, repo_id: str, publishing: bool) -> OSError:
    status, said = error.response.status_code, error.server_message or _first_line(error)
    if status == 401:
        known = "does not accept your token" if "Invalid credentials" in said else "wants a token"
        return PermissionError(f"{constants.ENDPOINT} {known} for {repo_id}: {_LOG_IN}.")
    if status == 403:
        other = " Use a token that may, or create_pr=True (--create-pr) to propose a change." if publishing else ""
        return PermissionError(f"your token may not {'write to' if publishing else 'read'} {repo_id}: {said}.{other}")
    if status == 412:
        return ConnectionError(f"{repo_id} is being changed by others all the time; try again.")
    if status < 500 and status not in (408, 429):
        return OSError(f"{repo_id}: the Hub refused: {said}")
    return ConnectionError(f"{repo_id}: the Hub answered {status} ({said}); try again later.")


def _not_cached(at: str, error: LocalEntryNotFoundError) -> str:
    """The client found nothing in its cache: nobody asked the Hub, or it gave no answer."""
    if error.__cause__ is None or constants.is_offline_mode():
        return f"{at} is not in the cache, and the Hub was not asked (offline): load it once with a connection."
    return f"{at} is not in the cache, and {constants.ENDPOINT} cannot be reached ({_first_line(error.__cause__)})."


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
