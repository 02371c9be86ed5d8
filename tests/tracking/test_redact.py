"""What is hidden, what is not, and that hiding twice is hiding once."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import UserError
from core.preflight import preflight
from core.provenance import refuse_secrets
from core.redact import redact, redact_all, without_password
from registry import get

HUB = "hf_" + "aBcDeFgHiJkLmNoPqRsT"
SECRET = "s3cr3t-value"

TEXTS = [
    f"http://bob:{SECRET}@host:5000/x",
    f"postgresql+psycopg://bob:{SECRET}@host/db",
    f"https://{SECRET}@host/x",
    f"--hub-token {SECRET}",
    f"--hub-token={SECRET}",
    f"HF_TOKEN={SECRET} python train.py",
    f"export AWS_SECRET_ACCESS_KEY='{SECRET}'",
    f"password: {SECRET}",
    f'{{"api_key": "{SECRET}"}}',
    f"{{'Authorization': 'Basic {SECRET}'}}",
    f"Authorization: Bearer {SECRET}",
    f"authorization=token {SECRET}",
    f"https://host/a?token={SECRET}&b=1",
    f"https://bucket/a?X-Amz-Signature={SECRET}",
    f"+    client = Client(api_key='{SECRET}')",
]


@pytest.mark.parametrize("text", TEXTS)
def test_what_stands_behind_a_secret_name_is_hidden(text):
    assert SECRET not in redact(text) and "***" in redact(text)


@pytest.mark.parametrize(
    "shape",
    [
        HUB,
        "AKIAIOSFODNN7EXAMPLE",
        "ghp_" + "a1" * 18,
        "github_pat_" + "a1" * 15,
        "glpat-" + "x" * 20,
        "xoxb-1234567890-abc",
        "sk-proj-" + "a1" * 16,
        "eyJhbGciOiJI.eyJzdWIiOiIx.c2lnbmF0dXJl",
        "-----BEGIN RSA PRIVATE KEY-----\nabc\ndef\n-----END RSA PRIVATE KEY-----",
    ],
)
def test_what_looks_like_a_secret_is_hidden_wherever_it_stands(shape):
    assert redact(f"before {shape} after") == "before *** after"


@pytest.mark.parametrize(
    "text",
    [
        "num_tokens=77 tokenizer: CLIP max_token_length: 12",
        "+    token: str = None",
        "def f(token: str, password=None):",
        "git@github.com:group/project and bob@example.org",
        "ssh://git@github.com/group/project",
        "3f786850e387550fdab836ed7e6dc881de23001b",
        "/runs/design=3/assignment=2/pattern=4",
        "python -m registry run lvdm-short-sky --lr 6e-5 --data-root datasets/sky",
        "sqlite:////home/bob/runs/mlflow.db",
        "http://host:5000/#/experiments/1",
    ],
)
def test_what_is_no_secret_stays_as_it_is(text):
    assert redact(text) == text


def test_values_of_secret_variables_are_hidden_as_they_are_and_as_they_look_in_a_uri(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "p@ss/w:rd9")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://bob:other-pw@host")
    monkeypatch.setenv("SHORT_TOKEN", "ab")
    monkeypatch.setenv("PWD", "/home/bob")
    said = redact("p@ss/w:rd9, p%40ss%2Fw%3Ard9, other-pw, about /home/bob")
    assert said == "***, ***, ***, about /home/bob"


@given(st.text(max_size=60) | st.sampled_from(TEXTS))
def test_hiding_twice_is_hiding_once(text):
    assert redact(redact(text)) == redact(text)


def test_json_is_hidden_by_the_names_of_its_fields_too_and_numbers_stay():
    value = {"hub.token": SECRET, "list": [HUB, 3, None], "loss": 0.5, "num_tokens": "77"}
    said = redact_all(value)
    assert SECRET not in json.dumps(said) and HUB not in json.dumps(said)
    assert (said["loss"], said["list"][1:], said["num_tokens"]) == (0.5, [3, None], "77")


def test_a_store_is_written_down_without_user_and_password():
    assert without_password(f"http://bob:{SECRET}@host:5000/x?y=1") == "http://host:5000/x?y=1"
    assert without_password("sqlite:////home/b@b/mlflow.db") == "sqlite:////home/b@b/mlflow.db"


def test_a_recipe_with_a_secret_in_it_is_refused_by_field_without_saying_it():
    recipe = get("lvdm-short-sky-tiny")
    refuse_secrets(recipe)
    for tag in (f"hub={HUB}", f"TOKEN={SECRET}", f"from=http://bob:{SECRET}@host"):
        with pytest.raises(UserError, match=r"tracking\.tags = .*looks like a secret.*environment variables") as caught:
            preflight(recipe.but(tracking=recipe.tracking.but(tags=("a=b", tag))))
        assert SECRET not in str(caught.value) and HUB not in str(caught.value)
