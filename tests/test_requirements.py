"""What tests need: how it is found, and what its absence does."""

from pathlib import Path

import postgresql
import pytest
import requirements


def programs(folder: Path) -> Path:
    """A folder with the names of PostgreSQL's programs."""
    folder.mkdir(parents=True)
    for name in ("initdb", "pg_ctl"):
        (folder / name).touch(mode=0o755)
    return folder


def test_the_newest_version_of_postgresql_is_taken(tmp_path):
    for version in ("9.6", "16", "15"):
        programs(tmp_path / version / "bin")
    found = postgresql.find_programs(path=str(tmp_path), versions=tmp_path)
    assert found == tmp_path / "16" / "bin"


def test_the_postgresql_of_the_path_comes_first(tmp_path):
    programs(tmp_path / "versions" / "16" / "bin")
    ours = programs(tmp_path / "ours")
    elsewhere = tmp_path / "links"
    elsewhere.mkdir()
    (elsewhere / "initdb").symlink_to(ours / "initdb")
    assert postgresql.find_programs(str(elsewhere), tmp_path / "versions") == ours


def test_without_programs_postgresql_is_missing(tmp_path, monkeypatch):
    pytest.importorskip("psycopg")
    assert postgresql.find_programs(str(tmp_path), tmp_path) is None
    monkeypatch.setattr(postgresql, "find_programs", lambda: None)
    assert "apt-get install postgresql" in postgresql.missing()


@pytest.mark.parametrize(
    ("value", "outcome"),
    [("1", pytest.fail.Exception), ("", pytest.skip.Exception), (None, pytest.skip.Exception)],
)
def test_what_is_missing_skips_or_fails(monkeypatch, value, outcome):
    monkeypatch.delenv(requirements.POSTGRESQL, raising=False)
    if value is not None:
        monkeypatch.setenv(requirements.POSTGRESQL, value)
    with pytest.raises(outcome, match="no server"):
        requirements.leave_out("no server", requirements.POSTGRESQL)
