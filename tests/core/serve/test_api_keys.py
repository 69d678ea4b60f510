"""Keys of callers: shown once, kept as hashes, with limits that hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mst.cli import main
from mst.errors import UsageError
from mst.serve import api_keys
from mst.serve.api_keys import ApiKey, ApiKeyError
from mst.serve.http.quota import Quota
from mst.serve.http.refusals import Refusal


def test_a_key_is_kept_as_a_hash_alone(tmp_path: Path) -> None:
    path = tmp_path / "state" / "keys.json"
    one, other = api_keys.add(path, "one"), api_keys.add(path, "other", 5, 100, ["a"])
    keys = api_keys.read(path)

    assert one.startswith("mst-")
    assert len(one) > 40
    assert one not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert [api_keys.owner(keys, each) for each in (one, other)] == list(keys)
    assert api_keys.owner(keys, one[:-1]) is None
    assert api_keys.owner(keys, "") is None
    assert keys[0].hash not in repr(keys)
    assert keys[0].salt != keys[1].salt
    assert (keys[1].requests_per_minute, keys[1].tokens_per_day, keys[1].models) == (5, 100, ("a",))


def test_a_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    api_keys.add(path, "one")
    path.chmod(0o640)
    with pytest.raises(ApiKeyError, match="chmod 600"):
        api_keys.read(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 9, "keys": []}', "\xff"])
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.json"
    path.write_bytes(text.encode("latin-1"))
    path.chmod(0o600)
    with pytest.raises(ApiKeyError):
        api_keys.read(path)


def test_the_commands_add_list_and_remove(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = ["--keys-file", str(tmp_path / "keys.json")]

    assert main(["apikeys", "list", *file]) == 0
    assert "mst apikeys add NAME" in capsys.readouterr().out
    assert main(["apikeys", "add", "ward", "--requests-per-minute", "5", *file]) == 0
    key = capsys.readouterr().out.strip()
    assert api_keys.owner(api_keys.read(tmp_path / "keys.json"), key) is not None
    assert main(["apikeys", "list", *file]) == 0
    assert "ward  since" in (shown := capsys.readouterr().out)
    assert "5 requests a minute" in shown
    assert main(["apikeys", "list", "--json", *file]) == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert listed["name"] == "ward"
    assert not {"salt", "hash"} & set(listed)
    assert main(["apikeys", "add", "ward", *file]) == 2
    assert "already" in capsys.readouterr().err
    assert main(["apikeys", "remove", "ward", *file]) == 0
    assert main(["apikeys", "remove", "ward", *file]) == 1
    assert "found: none" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", "a b", "-x", "x" * 65, "a/b", "ä"])
def test_a_name_that_would_spoil_a_log_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="name"):
        api_keys.add(tmp_path / "keys.json", name)
    with pytest.raises(UsageError, match="tokens-per-day must be at least 1"):
        api_keys.add(tmp_path / "keys.json", "x", tokens_per_day=0)


def refused(quota: Quota, key: ApiKey) -> Refusal:
    with pytest.raises(Refusal) as found:
        quota.ask(key)
    return found.value


def test_requests_of_a_minute_run_out_and_come_back() -> None:
    clock = [1000.0]
    quota = Quota(lambda: clock[0])
    key = ApiKey("a", "", "", "", requests_per_minute=2)
    quota.ask(key)
    clock[0] += 20
    quota.ask(key)

    assert refused(quota, key).headers == {"Retry-After": "40"}
    # Somebody else's are others.
    quota.ask(ApiKey("b", "", "", "", requests_per_minute=1))
    clock[0] += 40.5
    quota.ask(key)

    assert refused(quota, key).headers == {"Retry-After": "20"}


def test_tokens_of_a_day_run_out_until_midnight() -> None:
    clock = [86400.0 * 100 + 82800]
    quota = Quota(lambda: clock[0])
    key = ApiKey("a", "", "", "", tokens_per_day=10)
    quota.ask(key)
    quota.spend(key, 10)
    found = refused(quota, key)

    assert (found.headers["Retry-After"], found.code) == ("3600", "insufficient_quota")
    clock[0] += 3600
    quota.ask(key)
