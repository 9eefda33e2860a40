"""Names, folders and what can go wrong on the way to the hub (there is no network here)."""

import sys
from unittest import mock

import huggingface_hub
import pytest
from huggingface_hub import errors

from llada_jax.checkpoint import CheckpointError, resolve_model

NAME = "inclusionAI/LLaDA2.1-mini"


def hub_raises(monkeypatch, error):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", mock.Mock(side_effect=error))


def make(kind, message="boom"):
    """An exception of ``kind`` without the HTTP response that its constructor may want."""
    error = kind.__new__(kind)
    error.args = (message,)
    return error


@pytest.fixture
def no_hub(monkeypatch):
    hub_raises(monkeypatch, AssertionError("the hub was asked"))


def test_a_folder_is_itself(tmp_path, no_hub):
    assert resolve_model(tmp_path) == tmp_path
    assert resolve_model(str(tmp_path)) == tmp_path


def test_a_folder_that_looks_like_a_hub_id(tmp_path, no_hub, monkeypatch):
    (tmp_path / NAME).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model(NAME).resolve() == tmp_path / NAME


def test_home_is_expanded(tmp_path, no_hub, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~") == tmp_path


@pytest.mark.parametrize("name", ["./mini", "/no/such/mini", "../a/b", "~/nope", "a/b/c", "a/b/"])
def test_a_path_that_does_not_exist(no_hub, name):
    with pytest.raises(CheckpointError, match=r"^folder .* does not exist"):
        resolve_model(name)


def test_a_path_object_is_never_a_hub_id(no_hub, tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve_model(tmp_path / "x")


def test_a_file(tmp_path, no_hub):
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        resolve_model(tmp_path / "model.safetensors")


def test_neither_folder_nor_id(no_hub):
    with pytest.raises(CheckpointError, match="not a hub id either"):
        resolve_model("mini")


def test_download(monkeypatch, tmp_path):
    fake = mock.Mock(return_value=str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    assert resolve_model(NAME, revision="v1", cache_dir="cache") == tmp_path
    (name,), options = fake.call_args
    assert (name, options["revision"], str(options["cache_dir"])) == (NAME, "v1", "cache")
    assert "*.safetensors" in options["allow_patterns"]
    assert not {"*", "*.bin", "*.py"} & set(options["allow_patterns"])


OFFLINE = "cannot be reached"
CASES = [
    (make(errors.GatedRepoError), "is gated: accept its terms"),
    (make(errors.RepositoryNotFoundError), "the hub has no model"),
    (make(errors.RevisionNotFoundError), "has no revision 'v9'"),
    (make(errors.HFValidationError), "nor a valid hub id"),
    (make(errors.LocalEntryNotFoundError), OFFLINE),
    (make(errors.OfflineModeIsEnabled), OFFLINE),
    (ConnectionError("no route"), OFFLINE),
    (TimeoutError("slow"), OFFLINE),
    (type("ConnectError", (Exception,), {"__module__": "httpx"})("dns"), OFFLINE),
    (make(errors.HfHubHTTPError, "500"), "failed .*run it again"),
    (OSError(28, "No space left on device"), "failed .*No space left"),
]


@pytest.mark.parametrize(("error", "message"), CASES, ids=lambda x: type(x).__name__)
def test_failures_are_told_apart(monkeypatch, error, message):
    hub_raises(monkeypatch, error)
    with pytest.raises(CheckpointError, match=message) as caught:
        resolve_model(NAME, revision="v9")
    assert NAME in str(caught.value)
    others = {m for _, m in CASES if m != message and not m.startswith("failed")}
    assert not any(other in str(caught.value) for other in others)


def test_really_offline(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=OFFLINE):
        resolve_model(NAME, cache_dir=tmp_path)


def test_missing_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r'pip install "llada-jax\[hub\]"'):
        resolve_model(NAME)
