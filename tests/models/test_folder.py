"""Folders from somebody else: no file outside is reached, at any depth, and a tokenizer needs no model next to it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from model_bank import build, description, tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mtkd.data.tokenizers import token_ids, train_tokenizer
from mtkd.errors import DataError, UserError
from mtkd.models import folder as folders
from mtkd.models.folder import check_folder, check_links, check_tokenizer_folder, has_tokenizer, package_folder
from mtkd.models.info import MASKED_LM
from mtkd.planning.locate import read_tokenizer, resolve_path

CHECKS = (check_links, check_folder, check_tokenizer_folder)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    build(description("bert"), MASKED_LM).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("link", ["additional_chat_templates/x.jinja", "a/b/c/d.json", "deep/er"])
@pytest.mark.parametrize("target", ["secret", "secret/file"])
def test_no_link_leaves_a_folder_at_any_depth(model: Path, link: str, target: str) -> None:
    """transformers reads some sub folders, and copies what is in them into an export."""
    outside = model.parent / target
    outside.parent.mkdir(parents=True, exist_ok=True)
    outside.write_text("private") if target.endswith("file") else outside.mkdir()
    (model / link).parent.mkdir(parents=True)
    (model / link).symlink_to(outside)
    for check in CHECKS:
        with pytest.raises(DataError, match="link leaves") as error:
            check(model)
        assert error.value.where == str(model / link)


def test_links_within_a_folder_are_followed_by_nobody_and_circles_are_refused(model: Path) -> None:
    """A link to a folder is not walked into: else a link to the parent would never end."""
    (model / "sub").mkdir()
    (model / "sub" / "again.json").symlink_to("../config.json")
    (model / "sub" / "up").symlink_to("..")
    (model / "sub" / "nothing").symlink_to("missing")
    for check in CHECKS:
        check(model)
    (model / "sub" / "one").symlink_to("two")
    (model / "sub" / "two").symlink_to("one")
    with pytest.raises(DataError):
        check_links(model)


def test_a_snapshot_of_the_hubs_cache_may_link_to_its_own_blobs_alone(model: Path, tmp_path: Path) -> None:
    cached = tmp_path / "models--owner--name"
    snapshot, blobs = cached / "snapshots" / "abc", cached / "blobs"
    (snapshot / "additional_chat_templates").mkdir(parents=True)
    blobs.mkdir()
    for file in model.iterdir():
        shutil.copy(file, blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    (blobs / "template").write_text("{{ messages }}")
    (snapshot / "additional_chat_templates" / "x.jinja").symlink_to("../../../blobs/template")
    for check in CHECKS:
        check(snapshot)
    other = tmp_path / "models--owner--other" / "blobs"
    other.mkdir(parents=True)
    (other / "secret").write_text("private")
    (snapshot / "additional_chat_templates" / "y.jinja").symlink_to(other / "secret")
    with pytest.raises(DataError, match="link leaves"):
        check_links(snapshot)


def test_a_pipe_is_refused_before_it_is_read(model: Path) -> None:
    os.mkfifo(model / "tokenizer.json")
    with pytest.raises(DataError, match="neither a file nor a folder") as error:
        check_tokenizer_folder(model)
    assert error.value.where == str(model / "tokenizer.json")


def test_a_folder_of_everything_is_not_walked_for_ever(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "_MOST_FILES", 5)
    check_links(model)
    for number in range(6):
        (model / str(number)).mkdir()
    with pytest.raises(DataError, match="too many files"):
        check_links(model)


def test_a_tokenizers_folder_needs_no_model_and_a_models_no_tokenizer(model: Path, tmp_path: Path) -> None:
    made = train_tokenizer(["a b c"], 300)
    made.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "alone").mkdir()
    shutil.copy(tmp_path / "tokenizer" / "tokenizer.json", tmp_path / "alone")
    for name in ("tokenizer", "alone"):
        found = read_tokenizer(tmp_path / name)
        assert found is not None
        assert token_ids(found) == token_ids(made)
    assert not has_tokenizer(model)
    assert AutoTokenizer.from_pretrained(model) is not None  # transformers makes up one of five tokens
    assert read_tokenizer(model) is None
    (tmp_path / "tokenizer" / "config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": "evil.Evil"}}))
    with pytest.raises(DataError, match="needs code"):
        read_tokenizer(tmp_path / "tokenizer")


def test_a_tokenizer_without_a_vocabulary_is_none(tmp_path: Path, saved_config: Callable[[Path], None]) -> None:
    """A download that broke off: transformers would give a tokenizer of special tokens alone, all words unknown."""
    saved_config(tmp_path / "half")
    with pytest.raises(DataError, match="no vocabulary"):
        read_tokenizer(tmp_path / "half")


@pytest.fixture
def saved_config() -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        made: PreTrainedTokenizerFast = tokenizer()
        made.save_pretrained(folder)
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))

    return save


def test_a_folder_of_a_python_package_is_found_and_nothing_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: `package:NAME/FOLDER` is the folder inside the package, wherever the package is installed."""
    (tmp_path / "brings_a_model" / "deep" / "model").mkdir(parents=True)
    (tmp_path / "brings_a_model" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    found = resolve_path("package:brings_a_model/deep/model", Path("/nowhere"))
    assert found == tmp_path / "brings_a_model" / "deep" / "model"
    assert package_folder("package:brings_a_model") == tmp_path / "brings_a_model"


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("package:not_a_package_of_anyone/model", "pip install not-a-package-of-anyone"),
        ("package:json/model", "has no such folder"),
        ("package:this/model", "has no such folder"),  # a module
        ("package:__main__/model", "__main__"),
        ("package:json/../json", "NAME/FOLDER"),
        ("package:json//etc", "NAME/FOLDER"),
        ("package:json.decoder/model", "NAME/FOLDER"),
        ("package:/etc", "NAME/FOLDER"),
        ("package:", "NAME/FOLDER"),
    ],
)
def test_another_form_or_a_package_without_the_folder_is_refused(path: str, says: str) -> None:
    """Law: nothing outside of the package is named, and the message says what to install."""
    with pytest.raises(UserError) as error:
        package_folder(path)
    assert says in str(error.value)
    assert error.value.where == "@model.path"
