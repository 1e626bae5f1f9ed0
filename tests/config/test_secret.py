from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.config.key_sources import read_key_file
from proxy.config.problems import Invalid
from proxy.config.secret import Secret, unusable_key
from tests.config.kit import write


@dataclass(frozen=True)
class Holder:
    secret: Secret


def test_a_secret_does_not_show_itself() -> None:
    secret = Secret("sk-abcdef")
    for text in (repr(secret), str(secret), f"{secret}", f"{secret!r:>5}", repr(Holder(secret)), repr([secret])):
        assert "abcdef" not in text
    assert secret.reveal() == "sk-abcdef"


def test_secrets_are_values() -> None:
    assert Secret("a") == Secret("a")
    assert Secret("a") != Secret("b")
    assert Secret("a") != "a"
    assert len({Secret("a"), Secret("a"), Secret("b")}) == 2


@pytest.mark.parametrize(
    "key",
    [
        "sk-your-api-key",
        "sk-your_key",
        "your-api-key",
        "YOUR_API_KEY",
        "<your key>",
        "<OPENAI_API_KEY>",
        "changeme",
        "change-me",
        "sk-changeme",
        "sk-xxx",
        "sk-xxxxxxxxxxxxxxxx",
        "sk-proj-xxxxxxxx-xxx",
        "sk-xxx...xxx",
        "xxxx",
        "sk-...",
        "sk-…",
        "sk-****",
        "$OPENAI_API_KEY",
        "{{ api_key }}",
        "%OPENAI_API_KEY%",
        "[key]",
        "my-api-key-here",
        "replace_me",
        "sk-placeholder",
        "insert-key",
        "OPENAI_API_KEY",
        "api-key",
        "sk-",
    ],
)
def test_placeholders_are_no_keys(key: str) -> None:
    assert unusable_key(key) in ("is a placeholder", "contains a character that is not ASCII")


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("", "is empty"),
        ("sk-a b", "contains white space"),
        ("Bearer sk-abc", "contains white space"),
        ("sk-a\nb", "contains white space"),
        ("sk-a\x7fb", "contains a control character"),
        ('"sk-abc"', "contains a quote"),
        ("'sk-abc'", "contains a quote"),
        ("sk-äbc", "contains a character that is not ASCII"),
        ("sk-\u200babc", "contains a character that is not ASCII"),
        ("a" * 5000, "is longer than 4096 characters"),
    ],
)
def test_what_cannot_be_a_key(key: str, reason: str) -> None:
    assert unusable_key(key) == reason


@pytest.mark.parametrize(
    "key",
    [
        "sk-proj-Ab1_xyz-0",
        "a" * 32,
        "0123456789abcdef" * 2,
        "EMPTY",
        "not-needed",
        "lm-studio",
        "sk-test",
        "dummy",
        "none",
    ],
)
def test_what_can_be_a_key(key: str) -> None:
    assert unusable_key(key) is None


@given(st.text(min_size=3))
def test_a_reason_never_holds_the_key(key: str) -> None:
    reason = unusable_key(key)
    assert reason is None or len(key) < 10 or key not in reason


def test_a_key_file_is_read_and_stripped(tmp_path: Path) -> None:
    assert read_key_file(write(tmp_path / "key", " sk-abc\n")) == ("sk-abc", None)


def test_a_key_file_may_be_a_symlink(tmp_path: Path) -> None:
    write(tmp_path / "real", "sk-abc")
    (tmp_path / "link").symlink_to("real")
    assert read_key_file(tmp_path / "link") == ("sk-abc", None)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644])
def test_a_loose_key_file_is_a_warning(tmp_path: Path, mode: int) -> None:
    key, warning = read_key_file(write(tmp_path / "key", "sk-abc", mode))
    assert key == "sk-abc"
    assert warning is not None
    assert f"{mode:04o}" in warning
    assert "sk-abc" not in warning


def test_key_files_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    write(tmp_path / "empty", " \n")
    for name in ("folder", "binary", "empty", "missing"):
        with pytest.raises(Invalid, match=name):
            read_key_file(tmp_path / name)
