"""hf:OWNER/NAME: a package as a repository of the hub, sent in one commit.

    its state seen -> the card checked -> made, private -> one commit upon the state seen -> hashes compared

A commit lands as a whole or not at all. Where the answer to it was lost, the next try finds its files there, and is
done. The token is the environment's (HF_TOKEN) or the hub's own login, and is never read here.
"""

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_ft.errors import ConfigError, MismatchError, ResourceError, SecurityError
from lora_ft.io import durable
from lora_ft.publishing import sums
from lora_ft.publishing.hub_errors import explained, patiently

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_CARD = "README.md"


@dataclass(frozen=True)
class _State:
    """A repository at a commit: who sees it, and each file's hash, sha256 of large files, git's sha1 of others."""

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
            raise ConfigError(
                f"to=hf:{text} must be OWNER/NAME: your name on the hub, or an organization's, comes first"
            )
        return cls(text)

    def __str__(self) -> str:
        return f"hf:{self.repository}"

    def check(self, public: bool) -> str:
        with explained(str(self)):
            api = _api()
            user = patiently(api.whoami)
            if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
                raise ResourceError(
                    f"the token of {user.get('name')} may only read: make one that writes, at "
                    f"{api.endpoint}/settings/tokens"
                )
            state = patiently(lambda: self._state(api))
            where = f"{api.endpoint}/{self.repository}"
            if state is None:
                return f"{where} (new, {'PUBLIC' if public else 'private'})"
            self._check_visibility(state, public)
            others = sorted(state.files.keys() - patiently(lambda: self._earlier(api, state)))
            stay = f"; what else is there stays: {', '.join(others)}" if others else ""
            return f"{where} (existing, {'private' if state.private else 'PUBLIC'}, at {state.commit[:8]}{stay})"

    def send(self, folder: Path, message: str, public: bool) -> str:
        with explained(str(self)):
            api = _api()
            state = patiently(lambda: self._state(api))
            if state:
                self._check_visibility(state, public)
            if not state or _differing(folder, state):
                patiently(lambda: _check_card(folder))
            if not state:
                state = patiently(lambda: self._create(api, public))
            commit = patiently(lambda: self._commit(api, folder, message, state))
            return f"{self}@{commit}"

    def fetch(self, folder: Path, revision: str | None) -> None:
        with explained(str(self)), durable.staged_folder(folder) as staging:
            api = _api()
            commit = revision or patiently(lambda: api.model_info(self.repository).sha)

            def download(names: list[str]) -> None:
                api.snapshot_download(self.repository, revision=commit, local_dir=staging, allow_patterns=names)

            patiently(lambda: download([sums.SUMS]))
            patiently(lambda: download([sums.SUMS, *sums.read(staging)]))
            durable.remove_folder(staging / ".cache")  # the client's notes of where the files came from
            sums.check(staging)

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
                f"{self} exists and is public: say public=true if all may see this adapter, or name another repository"
            )
        if state.private and public:
            raise ConfigError(
                f"{self} exists and is private, and public=true is for new repositories: "
                "leave it out, or change the repository's settings on the hub"
            )

    def _earlier(self, api: "HfApi", state: _State) -> set[str]:
        """Names of the files that an earlier package put there; none where there is no package."""
        if not sums.is_package(set(state.files)):
            return set()
        path = api.hf_hub_download(self.repository, sums.SUMS, revision=state.commit)
        return {sums.SUMS, *sums.parse(Path(path).read_text("utf-8", "replace"), f"{self}/{sums.SUMS}")}

    def _create(self, api: "HfApi", public: bool) -> _State:
        # Where the answer to a first try was lost, the repository is there: who sees it is looked at again.
        api.create_repo(self.repository, private=not public, exist_ok=True)
        state = self._state(api)
        if not state:
            raise ResourceError(f"{self} was created, and is not to be found: publish again")
        self._check_visibility(state, public)
        return state

    def _commit(self, api: "HfApi", folder: Path, message: str, seen: _State) -> str:
        """The commit whose files are the folder's: the last, where they are, or a new one, which the hub takes only
        upon the commit `seen`: nobody's work in between is written over."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        now = self._state(api) or seen
        if not _differing(folder, now):
            return now.commit
        names = sums.names(folder)
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
            raise MismatchError(f"{self}@{made.oid} holds other bytes than were sent: {', '.join(wrong)}")
        return made.oid


def _api() -> "HfApi":
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    if not sys.stderr.isatty():
        disable_progress_bars()
    return HfApi()


def _check_card(folder: Path) -> None:
    """Ask the hub whether it takes the model card, before anything is made there; ConfigError with its reasons."""
    from huggingface_hub import ModelCard

    if (folder / _CARD).is_file():
        try:
            ModelCard.load(folder / _CARD, ignore_metadata_errors=True).validate()
        except ValueError as error:  # the body of its answer
            reasons = [str(reason.get("message")) for reason in json.loads(str(error)).get("errors", [])]
            raise ConfigError(f"the hub refuses the model card: {'; '.join(reasons)}") from None


def _differing(folder: Path, state: _State) -> list[str]:
    """Files of the folder that are not there, or with other bytes."""
    return [name for name in sorted(sums.names(folder)) if not _is(folder / name, state.files.get(name))]


def _is(path: Path, known: str | None) -> bool:
    if known is None:
        return False
    if len(known) == len(hashlib.sha256().hexdigest()):
        return sums.sha256(path) == known
    data = path.read_bytes()  # git's own hash; the hub keeps only small files so
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == known
