"""The hash of what is installed, by which a server finds clients that run something else."""

import shutil

from silotune.core import installed


def test_the_hash_is_of_every_file_and_its_name_and_not_of_pythons_caches(tmp_path, monkeypatch):
    package = tmp_path / "package"
    (package / "part").mkdir(parents=True)
    (package / "a.py").write_text("a = 1\n")
    (package / "part" / "b.toml").write_text("b = 1\n")
    monkeypatch.setattr(installed, "PACKAGE", package)

    def now() -> str:
        installed.code_sha256.cache_clear()
        return installed.code_sha256()

    before = now()
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "a.pyc").write_text("x")
    assert now() == before
    (package / "part" / "b.toml").write_text("b = 2\n")
    changed = now()
    (package / "part" / "b.toml").rename(package / "part" / "c.toml")
    moved = now()
    shutil.copy(package / "a.py", package / "new.py")
    assert len({before, changed, moved, now()}) == 4
    installed.code_sha256.cache_clear()
