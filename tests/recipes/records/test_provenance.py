"""Where a number comes from."""

import subprocess

from records import provenance


def test_results_not_yet_committed_do_not_count_as_changes_but_other_files_do(tmp_path, monkeypatch):
    def git(*command):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *command], cwd=tmp_path, check=True)

    git("init", "-q")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "compare.py").write_text("")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "recipes" / "compare.py"))
    assert provenance.read_provenance()["git"]["is_dirty"] is False

    results = tmp_path / "recipes" / "toy" / "results" / "runs"
    results.mkdir(parents=True)
    (results / "run.json").write_text("{}")
    assert provenance.read_provenance()["git"]["is_dirty"] is False

    (tmp_path / "recipes" / "other.py").write_text("")
    assert provenance.read_provenance()["git"]["is_dirty"] is True
