"""huggingface_hub with bounded downloads, publishing in one commit, and errors that say what to do.

A missing repository or file is a FileNotFoundError, denied access a PermissionError, and an invalid answer of the Hub
a ConnectionError. All are OSErrors that name the repository.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    HfApi,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # httpx's or httpx2's, as the version of huggingface_hub has it
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

from ..errors import AdapterError, BadValue, first_line
from ..files import full_disk
from ..version import __version__
from .layout import CARD_NAME


MAIN = "main"
_TRIES = 3
_LOG_IN = "log in with `hf auth login`, set HF_TOKEN, or pass token="
_NOTHING = "Nothing was published; run the same command again."
# The errors that the client raises; the last three for JSON that does not have the form of the Hub's answers.
_FAILURES = (HTTPError, OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError)


class LostAnswer(ConnectionError):
    """The answer to a commit is lost, and the Hub does not say whether the commit arrived."""


def download(
    repo_id: str, filename: str, largest: int, revision: str | None = None, **options: Any
) -> tuple[Path, str]:
    """Download a file of a repository, or take it from the cache; returns its path and its commit.

    It asks for the size first, and downloads at most `largest` bytes. `options` go to `hf_hub_download`. Raises
    FileNotFoundError, PermissionError, or AdapterError for a file that is too large.
    """
    if revision is not None and (revision.startswith("/") or ".." in revision.split("/")):
        raise FileNotFoundError(_no_revision(repo_id, revision))  # it would be a part of a path in the cache

    class Progress(tqdm):
        """Counts received bytes: a body may be longer than announced, and the client checks only at its end."""

        received = 0

        def update(self, n: float | None = 1) -> bool | None:
            self.received += int(n or 0)
            if self.received > largest:
                raise AdapterError(f"{repo_id}: {filename} may have {largest} bytes at most; nothing was kept.")
            return super().update(n)

    with clear_errors(repo_id, revision, cache_dir=options.get("cache_dir")):
        facts = hf_hub_download(repo_id, filename, revision=revision, dry_run=True, **options)
        if facts.file_size is None or facts.file_size > largest:
            raise AdapterError(
                f"{repo_id}: {filename} has {facts.file_size} bytes and may have {largest} at most; "
                "nothing was downloaded."
            )
        if facts.will_download or not os.path.lexists(facts.local_path):
            _check_etag(repo_id, filename, revision, options.get("token"))
        path = hf_hub_download(repo_id, filename, revision=revision, tqdm_class=Progress, **options)
    return Path(path), facts.commit_hash


def _check_etag(repo_id: str, filename: str, revision: str | None, token: Any) -> None:
    """Raise AdapterError for an ETag that is a path: huggingface_hub 2.4 uses the ETag as a file name.

    The client asks for it again when it downloads; if the server's answer has changed, this check does not notice.
    """
    etag = get_hf_file_metadata(hf_hub_url(repo_id, filename, revision=revision), token=token).etag
    if not re.fullmatch(r"[\w+=-][\w.+=-]*", etag or ""):
        raise AdapterError(
            f"{repo_id}: {constants.ENDPOINT} gives {filename} the ETag {etag!r}, which is no hash; "
            "nothing was downloaded."
        )


def drop_cached(path: Path) -> None:
    """Remove a downloaded file and its blob from the Hub's cache, so that the next load downloads it again."""
    blob = Path(os.path.normpath(path.parent / os.readlink(path))) if path.is_symlink() else path
    with suppress(OSError):  # the cache may be read-only
        if blob.parent == path.parents[2] / "blobs":
            blob.unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def cached_commit(repo_id: str, revision: str | None = None, cache_dir: Any = None) -> str | None:
    """The commit of a model whose config was just loaded from the Hub; None for a folder, or if it is unknown.

    It reads only the cache.
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
    """Commit files to a repository, all or none; a missing repository is made.

    An existing README.md is kept unless `overwrite_card`; an existing config.json is always kept. Unchanged files make
    no commit. A failed commit is tried again, except for a pull request, which could then be made twice. Raises
    ValueError for contradictory options, PermissionError for missing rights, and ConnectionError.
    """
    if create_pr and branch not in (None, MAIN):
        raise BadValue("branch", branch, f"{MAIN!r} or None beside create_pr=True, which proposes a change of {MAIN}")
    api = HfApi(token=token, library_name="dtem-hf", library_version=__version__)
    with clear_errors(repo_id, branch, publishing=True):
        repo_id = make_repository(api, repo_id, private, None if create_pr else branch)
        for tries_left in reversed(range(_TRIES)):
            head = api.model_info(repo_id, revision=branch or MAIN)
            there = {entry.rfilename for entry in head.siblings or ()}
            kept = {constants.CONFIG_NAME, *(() if overwrite_card else (CARD_NAME,))} & there
            if CARD_NAME in kept & set(files):
                warnings.warn(
                    f"{repo_id} has a {CARD_NAME}, which is kept; pass overwrite_card=True (--overwrite-card) to "
                    "replace it.",
                    stacklevel=3,
                )
            wanted = {name: data for name, data in files.items() if name not in kept}
            try:
                # With parent_commit, the Hub refuses if another commit came first: the files may have changed.
                return api.create_commit(
                    repo_id,
                    [CommitOperationAdd(name, data) for name, data in wanted.items()],
                    commit_message=commit_message,
                    revision=branch or MAIN,
                    create_pr=create_pr,
                    parent_commit=head.sha,
                )
            except _FAILURES as error:
                status = error.response.status_code if isinstance(error, HfHubHTTPError) else 500
                is_lost = status >= 500 and isinstance(_clear(error, repo_id, branch, True), ConnectionError)
                # If the commit arrived and only its answer is lost, the next try commits nothing.
                if tries_left and (status == 412 or (is_lost and not create_pr)):
                    continue
                if not is_lost:
                    raise
                again = "Run the same command again: it commits nothing twice"
                if create_pr:
                    again = f"Look at {api.endpoint}/{repo_id}/discussions before you try again"
                raise LostAnswer(
                    f"{repo_id}: the upload failed ({first_line(error)}), and {api.endpoint} does not say whether the "
                    f"commit arrived. {again}."
                ) from error
    raise AssertionError("the last try returns or raises")


def make_repository(api: HfApi, repo_id: str, private: bool | None = None, branch: str | None = None) -> str:
    """Make a repository and a branch if they are missing. Returns the repository's full id.

    Raises ValueError if `private` is wanted and the repository is public.
    """
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not api.model_info(repo_id).private:
        raise BadValue(
            "private", private, f"{repo_id} exists and is public; change that in its settings, or name another"
        )
    if branch is not None and branch != MAIN and not branch.startswith("refs/"):
        api.create_branch(repo_id, branch=branch, exist_ok=True)
    return repo_id


@contextmanager
def clear_errors(
    repo_id: str, revision: str | None = None, publishing: bool = False, cache_dir: Any = None
) -> Iterator[None]:
    """Turn the client's errors inside the block into OSErrors that name the repository and say what to do."""
    try:
        yield
    except (BadValue, AdapterError, LostAnswer):
        raise
    except _FAILURES as error:
        cause = error.__cause__
        # The error of a forced download hides the reason in its cause.
        known = cause if type(error) is ValueError and isinstance(cause, LocalEntryNotFoundError) else error
        if code := full_disk(error):
            place = str(cache_dir or constants.HF_HUB_CACHE)
            raise OSError(code, f"{repo_id}: {os.strerror(code)}", place) from error
        raise _clear(known, repo_id, revision, publishing) from error


def _clear(error: BaseException, repo_id: str, revision: str | None, publishing: bool) -> OSError:
    site, at = constants.ENDPOINT, f"{repo_id} (revision {revision or MAIN})"
    after = _NOTHING if publishing else "Try again."
    said = first_line(error.__cause__ or error)
    if isinstance(error, HFValidationError):
        return FileNotFoundError(f"{repo_id!r} is neither a folder here nor a Hub id (user/repo): {first_line(error)}")
    if isinstance(error, GatedRepoError):
        return PermissionError(f"{repo_id} is gated: ask for access at {site}/{repo_id}, and {_LOG_IN}.")
    if isinstance(error, RepositoryNotFoundError):
        return FileNotFoundError(
            f"there is no repository {repo_id} on {site} that you may see, and no folder of that name here. Check the "
            f"name; if the repository is private, {_LOG_IN}."
        )
    if isinstance(error, RevisionNotFoundError):
        if publishing and revision and not revision.startswith("refs/"):
            return ConnectionError(f"{repo_id}: {site} made no branch {revision!r}, and gave no error. {after}")
        return FileNotFoundError(_no_revision(repo_id, revision))
    if isinstance(error, RemoteEntryNotFoundError):
        name = os.path.basename(error.response.url.path)
        return FileNotFoundError(f"there is no {name} in {at}, so it is no merge adapter; look at {site}/{repo_id}.")
    if isinstance(error, LocalEntryNotFoundError):
        return _not_cached(error, repo_id, at)
    if isinstance(error, HfHubHTTPError):
        return _refused(error, repo_id, publishing)
    if isinstance(error, (HTTPError, ConnectionError, RuntimeError, TimeoutError)):
        return ConnectionError(f"{repo_id}: the connection to {site} failed ({said}). {after}")
    if isinstance(error, OSError) or type(error) is ValueError:  # the client's message is clear
        return OSError(f"{repo_id}: {' '.join(str(error).split())}{f' {_NOTHING}' if publishing else ''}")
    return ConnectionError(f"{repo_id}: {site} gave an answer that is not the Hub's ({said}). {after}")


def _no_revision(repo_id: str, revision: str | None) -> str:
    return f"{repo_id} has no revision {revision!r}: name a branch, a tag, or a commit of it."


def _refused(error: HfHubHTTPError, repo_id: str, publishing: bool) -> OSError:
    status, said = error.response.status_code, error.server_message or first_line(error)
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
    after = f" {_NOTHING}" if publishing else ""
    return ConnectionError(f"{repo_id}: the Hub answered {status} ({said}); try again later.{after}")


def _not_cached(error: LocalEntryNotFoundError, repo_id: str, at: str) -> OSError:
    """The error for a file that is neither in the cache nor could be downloaded."""
    cause, site, at = error.__cause__, constants.ENDPOINT, f"there is no folder {repo_id} here, and on the Hub {at}"
    if cause is None or constants.is_offline_mode():
        return FileNotFoundError(
            f"{at} is not in the cache, and the Hub was not asked (offline): load it once with a connection."
        )
    if isinstance(cause, HfHubHTTPError) and cause.response.status_code < 500:
        return _refused(cause, repo_id, publishing=False)
    what = "gave an answer that is not the Hub's" if isinstance(cause, FileMetadataError) else "cannot be reached"
    return FileNotFoundError(f"{at} is not in the cache, and {site} {what} ({first_line(cause)}).")
