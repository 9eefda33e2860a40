"""From what the user typed to a folder: a path as it is, or a download from the hub."""

from __future__ import annotations

import os
from pathlib import Path

from llada_jax.checkpoint.errors import CheckpointError

_DOWNLOAD = (
    "*.json",
    "*.safetensors",
    "*.jinja",
    "*.model",
    "vocab.txt",
    "merges.txt",
    "configuration_*.py",  # copied along by convert, never run here
    "modeling_*.py",
)


def resolve_model(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """Finds the folder of a model, downloading it if ``name`` is a hub id.

    Args:
      name: an existing folder, or a hub id such as ``"inclusionAI/LLaDA2.1-mini"``.
      revision: branch, tag or commit on the hub; the main branch by default.
      cache_dir: where downloads are kept; huggingface_hub's own cache by default.

    Raises:
      CheckpointError: if the folder does not exist, ``huggingface_hub`` is not installed, the hub
        cannot be reached, or the repository or revision is unknown or closed.
    """
    path, text = Path(name).expanduser(), os.fspath(name)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{text} is a file; give the folder that holds it")
    if isinstance(name, os.PathLike) or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise CheckpointError(f"folder {text} does not exist")
    if text.count("/") != 1:
        raise CheckpointError(
            f"there is no folder {text!r} here, and it is not a hub id either; give a folder, or "
            "an id such as 'inclusionAI/LLaDA2.1-mini'"
        )
    return _download(text, revision, cache_dir)


def _download(name: str, revision: str | None, cache_dir: str | os.PathLike[str] | None) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise CheckpointError(
            f'downloading {name} needs huggingface_hub: pip install "llada-jax[hub]"; or give a '
            "folder that holds the model"
        ) from error
    try:
        folder = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            allow_patterns=list(_DOWNLOAD),
        )
    except errors.GatedRepoError as error:  # before RepositoryNotFoundError, its base class
        raise CheckpointError(
            f"{name} is gated: accept its terms at https://huggingface.co/{name}, then log in with "
            "`hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"{name} has no revision {revision!r}; give a branch, tag or commit that its page "
            "lists, or leave revision out"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"the hub has no model {name}, or it is private: check the spelling; for a private one "
            "log in with `hf auth login` or set HF_TOKEN; a local folder must exist"
        ) from error
    except errors.HFValidationError as error:
        raise CheckpointError(
            f"{name!r} is neither an existing folder nor a valid hub id ({error})"
        ) from error
    except Exception as error:
        if not _is_offline(error, errors):
            raise CheckpointError(
                f"downloading {name} failed ({type(error).__name__}: {error}); run it again, it "
                "continues where it stopped"
            ) from error
        where = f" at revision {revision}" if revision else ""
        raise CheckpointError(
            f"the hub cannot be reached, and {name}{where} is not complete in the local cache: "
            "connect (HF_HUB_OFFLINE must not be set; HF_ENDPOINT names a mirror), or download it "
            f"elsewhere with `hf download {name}` and give that folder"
        ) from error
    return Path(folder)


def _is_offline(error: Exception, errors) -> bool:
    """Whether this is a lack of connection, in any of the HTTP libraries that may be below."""
    if isinstance(
        error,
        (
            errors.LocalEntryNotFoundError,
            errors.OfflineModeIsEnabled,
            ConnectionError,
            TimeoutError,
        ),
    ):
        return True
    if isinstance(error, errors.HfHubHTTPError):
        return False  # the hub did answer
    library = type(error).__module__.split(".")[0]
    return library in ("requests", "httpx", "httpx2", "httpcore", "httpcore2", "urllib3")
