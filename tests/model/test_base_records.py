"""Artefacts remember how their base was loaded, and travel over the hub."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch
from contracts.architectures import batch, build, forward
from contracts.helpers import wrapped
from tiny import tiny_folder

import reftune
from reftune.config.recipe import AdapterSpec, ModelSpec
from reftune.errors import AdapterError
from reftune.model import build as building
from reftune.model.build import apply_adapter, default_device, load_base
from reftune.model.checkpoint import load_adapter, save_adapter
from reftune.model.face import ReftConfig, get_peft_model
from reftune.model.record import base_record, fingerprint, is_hub_name

pytestmark = pytest.mark.quick
CONFIG, SIDECAR = "adapter_config.json", "reftune.json"


@pytest.fixture
def base(tmp_path):
    return tiny_folder(tmp_path / "base")


def adapter(spec, folder, method="loreft"):
    model, _ = load_base(spec)
    adapted = apply_adapter(model, AdapterSpec(method=method, options={"rank": 2}), 0)
    return save_adapter(adapted, folder)


def change(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(("method", "file"), [("loreft", CONFIG), ("lora", SIDECAR)])
def test_the_base_is_loaded_as_it_was(base, tmp_path, monkeypatch, method, file):
    spec = ModelSpec(str(base), revision="v2", dtype="bfloat16", trust_remote_code=True)
    folder = adapter(spec, tmp_path / "adapter", method)
    record = json.loads((folder / file).read_text())["base_model"]
    assert record == {
        "name": str(base), "revision": "v2", "dtype": "bfloat16", "quantize": "none",
        "head": "causal", "fingerprint": fingerprint(load_base(spec)[0]),
    }  # fmt: skip
    assert (folder / SIDECAR).exists() == (method == "lora")
    asked = []
    monkeypatch.setattr(
        building, "load_base", lambda spec, *a, **k: asked.append((spec, k)) or load_base(spec)
    )
    loaded, _ = load_adapter(folder, device="cpu")
    assert next(loaded.parameters()).dtype == torch.bfloat16
    assert asked == [(ModelSpec(str(base), revision="v2", dtype="bfloat16"), {"device": "cpu"})]
    load_adapter(folder, trust_remote_code=True)
    assert asked[1][0].trust_remote_code is True
    change(folder / file, base_model={**record, "quantize": "int4"})
    with pytest.raises(AdapterError, match=r"not available: .*quantize is .int4|not available"):
        load_adapter(folder)
    assert asked[2][0].quantize == "int4"


def test_a_record_of_another_base_gives_no_revision(base, tmp_path, monkeypatch):
    folder = adapter(ModelSpec(str(base), revision="v2"), tmp_path / "adapter")
    moved = shutil.copytree(base, tmp_path / "moved")
    change(folder / CONFIG, base_model_name_or_path=str(moved))
    asked = []
    monkeypatch.setattr(
        building, "load_base", lambda spec, *a, **k: asked.append(spec) or load_base(spec)
    )
    load_adapter(folder)
    assert asked == [ModelSpec(str(moved))]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"dtype": "rm -rf"}, 'base model with dtype "rm -rf".*Known: auto, bfloat16'),
        ({"quantize": "int3"}, 'quantize "int3".*Did you mean "int'),
        ({"revision": ["main"]}, "revision is"),
    ],
)
def test_records_with_unknown_values_are_refused(base, tmp_path, record, message):
    folder = adapter(str(base), tmp_path / "adapter")
    change(folder / CONFIG, base_model=record)
    with pytest.raises(AdapterError, match=message):
        load_adapter(folder)


def test_artefacts_without_a_record_load(base, tmp_path):
    folder = adapter(str(base), tmp_path / "adapter")
    change(folder / CONFIG, base_model=None)
    assert load_adapter(folder)[1] is not None
    assert base_record(build("bert"))["head"] == "classification"


def test_a_whole_classifier_loads_with_its_head(base, tmp_path):
    model, tokenizer = load_base(str(base), num_labels=3)
    full = apply_adapter(model, AdapterSpec(method="full"), 0)
    folder = save_adapter(full, tmp_path / "model")
    tokenizer.save_pretrained(folder)
    loaded, _ = load_adapter(folder)
    ids, mask = batch()
    assert torch.equal(forward(loaded, ids, mask), forward(full, ids, mask))


# Another base of the same shape


def other_weights(model):
    """Return a model after something happened to its embedding."""
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    return model


def without_fingerprint(folder):
    """Make an artefact one of those that were written without a fingerprint."""
    file = folder / (SIDECAR if (folder / SIDECAR).is_file() else CONFIG)
    record = json.loads(file.read_text())["base_model"]
    assert len(record.pop("fingerprint")) == 16
    change(file, base_model=record)


@pytest.mark.parametrize("method", ["loreft", "lora"])
def test_a_base_of_another_name_is_warned_of(base, tmp_path, caplog, method):
    folder = adapter(str(base), tmp_path / "adapter", method)
    moved = shutil.copytree(base, tmp_path / "copy")
    with warnings.catch_warnings():  # the fingerprint says that it is a copy
        warnings.filterwarnings("error", message=".*adapter was trained on")
        load_adapter(folder, model=load_base(str(moved))[0])
    with pytest.warns(UserWarning, match=r"trained on .*base. and is loaded on .*copy"):
        load_adapter(folder, model=other_weights(load_base(str(moved))[0]))
    assert "is loaded on" in caplog.text
    without_fingerprint(folder)
    with pytest.warns(UserWarning, match=r"trained on .*base. and is loaded on .*copy"):
        load_adapter(folder, model=load_base(str(moved))[0])


@pytest.mark.parametrize("method", ["loreft", "lora"])
def test_other_weights_of_the_same_name_are_warned_of(base, tmp_path, method):
    folder = adapter(str(base), tmp_path / "adapter", method)
    model = load_base(str(base))[0]
    with warnings.catch_warnings():  # neither precision nor more tokens make it another model
        warnings.filterwarnings("error", message=".*adapter was trained on")
        load_adapter(folder, model=copy.deepcopy(model).to(torch.bfloat16))
        longer = copy.deepcopy(model)
        longer.resize_token_embeddings(longer.config.vocab_size + 8)
        load_adapter(folder, model=longer)
    with pytest.warns(UserWarning, match=r"weights of .*base. are not those that the adapter"):
        load_adapter(folder, model=other_weights(model))


def test_an_embedding_that_cannot_be_read_keeps_the_fingerprint_of_before(base, tmp_path):
    model = load_base(str(base))[0]
    seen = fingerprint(model)
    assert len(seen) == 16 and len(set(seen)) > 8
    adapted = get_peft_model(model, ReftConfig("loreft"))
    model.get_input_embeddings().to("meta")
    assert fingerprint(adapted) is None and fingerprint(torch.nn.Linear(2, 2)) is None
    folder = save_adapter(adapted, tmp_path / "adapter")
    assert json.loads((folder / CONFIG).read_text())["base_model"]["fingerprint"] == seen


def test_a_config_used_again_notes_its_new_model():
    config = ReftConfig("loreft")
    first, second = build("llama"), other_weights(build("llama"))
    get_peft_model(first, config)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*adapter was trained on")
        get_peft_model(second, config)
    assert config.base_model["fingerprint"] == fingerprint(second) != fingerprint(first)


def test_equal_unknown_and_downloaded_names_are_not_warned_of(base, tmp_path):
    folder = adapter(str(base), tmp_path / "adapter")
    for name, stored in (
        (str(base), str(base)), ("", str(base)), (str(base), None), ("owner/base", str(base)),
        ("/x/models--owner--base/snapshots/ab", "owner/base"), ("/data/base", "owner/base"),
    ):  # fmt: skip
        model = load_base(str(base))[0]
        model.config._name_or_path = name
        change(folder / CONFIG, base_model_name_or_path=stored)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*is loaded on")
            load_adapter(folder, model=model)


# Devices


@pytest.mark.parametrize(
    ("cuda", "mps", "world", "expected"),
    [
        (True, True, "1", "cuda"), (False, True, "1", "mps"), (False, False, "1", "cpu"),
        (True, False, "2", "cpu"),
    ],
)  # fmt: skip
def test_models_go_to_the_fastest_device(monkeypatch, cuda, mps, world, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setenv("WORLD_SIZE", world)
    assert default_device() == expected


def test_load_base_places_the_model(base, monkeypatch):
    monkeypatch.setattr(building, "default_device", lambda: "meta")
    assert load_base(str(base))[0].device.type == "meta"
    assert load_base(str(base), device="cpu")[0].device.type == "cpu"


# The hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub in a folder: what is pushed there can be fetched."""
    import huggingface_hub

    calls = []

    class Api:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo, **kwargs):
            calls.append(("create", repo, kwargs))
            return f"https://huggingface.co/{repo}"

        def create_branch(self, repo, **kwargs):
            calls.append(("branch", repo, kwargs))

        def upload_folder(self, repo_id, folder_path, commit_message, revision):
            calls.append(("upload", repo_id, commit_message, revision))
            shutil.copytree(folder_path, tmp_path / "hub" / repo_id / (revision or "main"))

    def fetch(repo, revision=None):
        calls.append(("fetch", repo, revision))
        folder = tmp_path / "hub" / repo / (revision or "main")
        if not folder.is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError("not there")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    return SimpleNamespace(calls=calls, folder=tmp_path / "hub")


@torch.no_grad()
def test_push_and_load_by_name_and_revision(hub, tmp_path):
    model = wrapped(build("llama"), "loreft", positions="f2+l1")
    wanted = forward(model, *batch())
    address = reftune.push(
        model, "owner/tuned", figures={"accuracy": 0.5}, revision="v1", private=True, token="t"
    )
    assert address == "https://huggingface.co/owner/tuned"
    assert hub.calls == [
        ("token", "t"),
        ("create", "owner/tuned", {"private": True, "exist_ok": True}),
        ("branch", "owner/tuned", {"branch": "v1", "exist_ok": True}),
        ("upload", "owner/tuned", "Upload with reftune", "v1"),
    ]
    card = (hub.folder / "owner/tuned/v1/README.md").read_text()
    assert 'reftune.load("owner/tuned")' in card and "import reftune.peft" in card
    assert "| accuracy | 0.5 |" in card and "base_model:" not in card
    loaded, _ = reftune.load("owner/tuned@v1", model=build("llama"))
    assert hub.calls[-1] == ("fetch", "owner/tuned", "v1")
    assert torch.equal(forward(loaded, *batch()), wanted)
    with pytest.raises(AdapterError, match='"owner/tuned" is no local folder and could not be'):
        reftune.load("owner/tuned", model=build("llama"))
    folder = save_adapter(model, tmp_path / "run" / "adapter")
    reftune.push(folder.parent, "owner/again")
    loaded, _ = reftune.load("owner/again", model=build("llama"))
    assert torch.equal(forward(loaded, *batch()), wanted)


def test_a_hub_that_refuses_is_named(hub, monkeypatch):
    from huggingface_hub.errors import HFValidationError

    def refuse(self, repo, **kwargs):
        raise HFValidationError("Repo id must be in the form 'name' or 'namespace/name'")

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(AdapterError, match=r'hub did not take "a/b/c".*Log in'):
        reftune.push(wrapped(build("llama"), "loreft"), "a/b/c")


@pytest.mark.parametrize("name", ["default", "second"])
def test_the_card_that_peft_writes_names_the_import(tmp_path, name):
    model = wrapped(build("llama"), "loreft", name=name)
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.count("import reftune.peft") == 1 and "- reftune" in card
    assert "library_name: peft" in card and "[More Information Needed]" in card
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text().count("import reftune.peft") == 1


def test_cards_of_others_are_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("# Mine\n")
    reftune.ReftConfig(reftune.LoreftConfig()).save_pretrained(tmp_path / "config")
    assert (tmp_path / "README.md").read_text() == "# Mine\n"
    assert not (tmp_path / "config" / "README.md").exists()


def test_cards_name_only_bases_the_hub_knows(base):
    assert is_hub_name("owner/base") and is_hub_name("gpt2")
    assert not any(map(is_hub_name, (str(base), "nano", "./base", "a/b/c", None)))
