"""Passwords and keys are hidden wherever they stand, and nothing else is changed."""

import logging

import pytest

from tbac.redaction import hide_in_record, hide_in_text, hide_secrets

SECRET = "geh3im"
SECRETS = [
    f"https://me:{SECRET}@host/x", f"http://{SECRET}@host", f"postgresql://me:{SECRET}@db:5432/mlflow",
    f"mysql+pymysql://u:{SECRET}@h/d", f"https://me:a{SECRET}/b@c@host/x", f"https://me:x%40{SECRET}@host:80",
    f"https://host/x?token={SECRET}", f"https://host/x?a=1&X-Amz-Signature={SECRET}&b=2", f"https://h/?api_key={SECRET}",
    f"https://h/?sig={SECRET}#x", f"https://h/x?AWSAccessKeyId={SECRET}", f"s3://key:{SECRET}@bucket/x.tar",
    f"pipe:curl -H 'Authorization: Bearer {SECRET}' https://h/x", f"pipe:curl --password {SECRET} https://h/x",
    f"pipe:curl -H 'X-Auth-Token: {SECRET}' https://h", f"pipe:tool --api-key={SECRET} x", f"https://u:{SECRET}@h:443/",
    f"error at https://a:{SECRET}@h/x, and https://b:{SECRET}@h/y.", f"tracking_uri='https://me:{SECRET}@host/x'",
    f"[{{path: 'https://me:{SECRET}@h/x', split: train}}]", f"https://:{SECRET}@host",
    f"checkpoint https:/me:{SECRET}@host/x.ckpt doesn't exist",
]  # fmt: skip
HARMLESS = [
    "sqlite:///outputs/mlflow.db", "http://127.0.0.1:5000", "https://host:8080/a@b/c", "me@host", "s3://bucket/x.tar",
    "https://host/x?steps=3&seed=4", "a photo of a red circle: password", "tokens=3", "https://host/page#key",
    "file:///data/a b", "https://host:443/v1/models?name=x", "", "outputs/train/2026-01-01_000000",
]  # fmt: skip


@pytest.mark.parametrize("text", SECRETS)
def test_a_secret_is_hidden_in_texts_configs_and_logs(text: str) -> None:
    assert SECRET not in hide_in_text(text)
    config = {"a": {"b": [text, {"c": (text,)}], text: 1}, "n": 1, "none": None, "flag": True}
    hidden = hide_secrets(config)
    assert SECRET not in str(hidden)
    assert (hidden["n"], hidden["none"], hidden["flag"]) == (1, None, True)
    assert hide_secrets(hidden) == hidden
    record = logging.LogRecord("x", logging.INFO, "x", 1, "%s failed", (text,), None)
    assert SECRET not in hide_in_record(record).getMessage()


@pytest.mark.parametrize(
    "name", ["password", "db_password", "api_key", "apikey", "token", "hf_token", "secret", "PASSWD"]
)
def test_a_value_under_a_telling_name_is_hidden(name: str) -> None:
    assert SECRET not in str(hide_secrets({"x": {name: SECRET}}))


@pytest.mark.parametrize("text", HARMLESS)
def test_what_holds_no_secret_stays_as_it_is(text: str) -> None:
    assert hide_in_text(text) == text
    assert hide_secrets({"max_text_tokens": 128, "tokenizer": text, "key": [text]}) == {
        "max_text_tokens": 128, "tokenizer": text, "key": [text],
    }  # fmt: skip
