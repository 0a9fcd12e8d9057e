"""The command that lists what lies in the cache, and deletes it."""

import pytest

from improved_diffusion.data import cache


def test_the_cache_is_listed_and_deleted(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("IMPROVED_DIFFUSION_CACHE", str(tmp_path))
    (tmp_path / "a.images").write_bytes(b"0" * 3_000_000)
    (tmp_path / "b.statistics.npz").write_bytes(b"0" * 1_000_000)
    (tmp_path / "mine.txt").write_text("not of this package")
    cache.main([])
    text = capsys.readouterr().out
    assert "3.0 MB  a.images  decoded images" in text and f"4.0 MB in {tmp_path}" in text
    cache.main(["delete"])
    assert "4.0 MB deleted" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(SystemExit, match="usage"):
        cache.main(["--all"])


def test_an_absent_cache_is_an_empty_one(tmp_path):
    assert cache.list_cache(str(tmp_path / "none")) == []
