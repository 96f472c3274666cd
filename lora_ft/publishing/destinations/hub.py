"""hf:OWNER/NAME: a package as a repository of the Hugging Face hub, sent in one commit.

    read its state -> check the card -> create it, private -> one commit on top of that state -> compare hashes

A commit lands as a whole or not at all. If the answer to it was lost, the next attempt finds its files there and is
done. The token comes from the environment (HF_TOKEN) or the hub's own login; this module never reads it.
"""

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_ft.errors import ConfigError, MismatchError, ResourceError, SecurityError
from lora_ft.io import durable
from lora_ft.publishing import checksums
from lora_ft.publishing.destinations.hub_errors import explained, retried

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_CARD = "README.md"


@dataclass(frozen=True)
class _State:
    """A repository at a commit. The hash of a file is a sha256 for large files, git's sha1 for others."""

    commit: str
    private: bool
    files: dict[str, str]


@dataclass(frozen=True)
class Hub:
    """A model repository of the hub."""

    repository: str

    @classmethod
    def parse(cls, text: str) -> "Hub":
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

        try:
            validate_repo_id(text)
        except HFValidationError as error:
            raise ConfigError(f"to=hf:{text}: {error}") from None
        if text.count("/") != 1:
            raise ConfigError(f"to=hf:{text} must be OWNER/NAME; OWNER is your name on the hub, or an organization's")
        return cls(text)

    def __str__(self) -> str:
        return f"hf:{self.repository}"

    def check(self, public: bool) -> str:
        with explained(str(self)):
            api = _api()
            user = retried(api.whoami)
            if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
                raise ResourceError(
                    f"the token of {user.get('name')} can only read: create one that can write, at "
                    f"{api.endpoint}/settings/tokens"
                )
            state = retried(lambda: self._state(api))
            where = f"{api.endpoint}/{self.repository}"
            if state is None:
                return f"{where} (new, {'PUBLIC' if public else 'private'})"
            self._check_visibility(state, public)
            others = sorted(state.files.keys() - retried(lambda: self._earlier(api, state)))
            kept = f"; other files there are kept: {', '.join(others)}" if others else ""
            return f"{where} (existing, {'private' if state.private else 'PUBLIC'}, at {state.commit[:8]}{kept})"

    def send(self, folder: Path, message: str, public: bool) -> str:
        with explained(str(self)):
            api = _api()
            state = retried(lambda: self._state(api))
            if state:
                self._check_visibility(state, public)
            if not state or _differing(folder, state):
                retried(lambda: _check_card(folder))
            if not state:
                state = retried(lambda: self._create(api, public))
            commit = retried(lambda: self._commit(api, folder, message, state))
            return f"{self}@{commit}"

    def fetch(self, folder: Path, revision: str | None) -> None:
        with explained(str(self)), durable.staged_folder(folder) as staging:
            api = _api()
            commit = revision or retried(lambda: api.model_info(self.repository).sha)

            def download(names: list[str]) -> None:
                api.snapshot_download(self.repository, revision=commit, local_dir=staging, allow_patterns=names)

            retried(lambda: download([checksums.FILE]))
            retried(lambda: download([checksums.FILE, *checksums.read(staging)]))
            durable.remove_folder(staging / ".cache")  # bookkeeping of the client
            checksums.check(staging)

    def _state(self, api: "HfApi", commit: str | None = None) -> _State | None:
        from huggingface_hub.errors import RepositoryNotFoundError
        from huggingface_hub.hf_api import RepoFile

        try:
            info = api.model_info(self.repository, revision=commit)
        except RepositoryNotFoundError:
            return None
        tree = api.list_repo_tree(self.repository, recursive=True, revision=info.sha)
        files = {f.path: f.lfs.sha256 if f.lfs else f.blob_id for f in tree if isinstance(f, RepoFile)}
        return _State(str(info.sha), bool(info.private), {k: v for k, v in files.items() if k != ".gitattributes"})

    def _check_visibility(self, state: _State, public: bool) -> None:
        if not state.private and not public:
            raise SecurityError(
                f"{self} exists and is public: add public=true if everybody may see this adapter, "
                "or name another repository"
            )
        if state.private and public:
            raise ConfigError(
                f"{self} exists and is private, and public=true applies to new repositories: "
                "leave it out, or change the repository's settings on the hub"
            )

    def _earlier(self, api: "HfApi", state: _State) -> set[str]:
        """Return the names of the files that an earlier package put there."""
        if not checksums.is_package(set(state.files)):
            return set()
        path = api.hf_hub_download(self.repository, checksums.FILE, revision=state.commit)
        return {checksums.FILE, *checksums.parse(Path(path).read_text("utf-8", "replace"), f"{self}/{checksums.FILE}")}

    def _create(self, api: "HfApi", public: bool) -> _State:
        # If the answer to a first attempt was lost, the repository exists: check its visibility again.
        api.create_repo(self.repository, private=not public, exist_ok=True)
        state = self._state(api)
        if not state:
            raise ResourceError(f"{self} was created and cannot be found: publish again")
        self._check_visibility(state, public)
        return state

    def _commit(self, api: "HfApi", folder: Path, message: str, seen: _State) -> str:
        """Return the commit that holds the folder's files: the last one if it does, else a new one.

        The hub accepts the new one only on top of the commit `seen`, so nobody's work in between is overwritten.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        now = self._state(api) or seen
        if not _differing(folder, now):
            return now.commit
        names = checksums.file_names(folder)
        stale = (self._earlier(api, now) & now.files.keys()) - names
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(name, folder / name) for name in sorted(names)),
            *(CommitOperationDelete(name) for name in sorted(stale)),
        ]
        made = api.create_commit(
            self.repository, operations, commit_message=message, revision="main", parent_commit=seen.commit
        )
        after = self._state(api, made.oid)
        if wrong := _differing(folder, after) if after else [*names]:
            raise MismatchError(f"{self}@{made.oid} does not hold the bytes that were sent: {', '.join(wrong)}")
        return made.oid


def _api() -> "HfApi":
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    if not sys.stderr.isatty():
        disable_progress_bars()
    return HfApi()


def _check_card(folder: Path) -> None:
    """Let the hub validate the model card before anything is created; ConfigError with its reasons."""
    from huggingface_hub import ModelCard

    if (folder / _CARD).is_file():
        try:
            ModelCard.load(folder / _CARD, ignore_metadata_errors=True).validate()
        except ValueError as error:  # the text is the body of the answer
            reasons = [str(reason.get("message")) for reason in json.loads(str(error)).get("errors", [])]
            raise ConfigError(f"the hub refuses the model card: {'; '.join(reasons)}") from None


def _differing(folder: Path, state: _State) -> list[str]:
    """Return the files of the folder that the repository lacks or holds with other bytes."""
    return [
        name for name in sorted(checksums.file_names(folder)) if not _has_hash(folder / name, state.files.get(name))
    ]


def _has_hash(path: Path, known: str | None) -> bool:
    if known is None:
        return False
    if len(known) == len(hashlib.sha256().hexdigest()):
        return checksums.sha256(path) == known
    data = path.read_bytes()  # git's own hash; the hub uses it for small files only
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == known
