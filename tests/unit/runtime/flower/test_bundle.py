"""The only bundle that a client accepts, and everything that is not it."""

import hashlib
import io
import tomllib
import zipfile

import pytest
import tomli_w
from flwr.cli.build import build_fab_from_files

from silotune.runtime.flower.bundle import (
    FAB_ID,
    FAB_VERSION,
    MANIFEST,
    PROJECT,
    TOLD,
    BundleError,
    check_bundle,
    project_file,
)

OURS = tomllib.loads(project_file(TOLD))


def zipped(files: dict[str, bytes], *, manifest: bytes | None = None) -> bytes:
    made, lines = io.BytesIO(), []
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
            lines.append(f"{name},{hashlib.sha256(content).hexdigest()},{8 * len(content)}")
        text = "\n".join(lines).encode() if manifest is None else manifest
        archive.writestr(zipfile.ZipInfo(MANIFEST), text)
    return made.getvalue()


def table(**project) -> bytes:
    return tomli_w.dumps({**OURS, "project": {**OURS["project"], **project}}).encode()


@pytest.mark.filterwarnings(  # flwr 1.42 uses a name that pathspec 1 calls deprecated
    "ignore:GitWildMatchPattern:DeprecationWarning"
)
def test_what_flower_makes_of_our_project_file_is_accepted():
    built, _ = build_fab_from_files({PROJECT: project_file(TOLD).encode()})
    check_bundle(built)
    app = OURS["tool"]["flwr"]["app"]
    assert (f"{app['publisher']}/{OURS['project']['name']}", OURS["project"]["version"]) == (
        FAB_ID,
        FAB_VERSION,
    )


def test_another_compression_of_the_same_files_is_the_same_bundle():
    check_bundle(zipped({PROJECT: project_file(TOLD).encode()}))
    check_bundle(zipped({PROJECT: table()}))


def other_component() -> bytes:
    app = {
        **OURS["tool"]["flwr"]["app"],
        "components": {"serverapp": "evil:app", "clientapp": "evil:app"},
    }
    return tomli_w.dumps({**OURS, "tool": {"flwr": {"app": app}}}).encode()


def prepared(key: str) -> bytes:
    found = tomllib.loads(project_file(TOLD))
    found["tool"]["flwr"]["app"]["config"][key] = "x"
    return tomli_w.dumps(found).encode()


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({PROJECT: other_component()}, "differs in 'tool.flwr.app.components.clientapp'"),
        ({PROJECT: table(dependencies=["evil"])}, "differs in 'project.dependencies'"),
        ({PROJECT: table(name="silotune-runs")}, "differs in 'project.name'"),
        ({PROJECT: table(version="0.0.1")}, "differs in 'project.version'"),
        ({PROJECT: prepared("recipe")}, "differs in 'tool.flwr.app.config.recipe'"),
        ({PROJECT: prepared("other")}, "differs in 'tool.flwr.app.config.other'"),
        ({PROJECT: table(), "silotune/__init__.py": b""}, "holds 'pyproject.toml', 'silotune/"),
        ({PROJECT: table(), "./torch.py": b""}, "holds 'pyproject.toml', './torch.py'"),
        ({PROJECT: table(), "../evil.py": b""}, "holds 'pyproject.toml', '../evil.py'"),
        ({"./" + PROJECT: table()}, "holds './pyproject.toml'"),
        ({PROJECT: b"\xff"}, r"cannot be read \(UnicodeDecodeError\)"),
        ({PROJECT: b"x = " + b"[" * 5000}, "cannot be read"),
        ({PROJECT: bytes(200_000)}, "is too large"),
        ({}, "holds '.info/CONTENT'"),
    ],
)
def test_every_other_bundle_is_refused_with_the_difference(files, says):
    with pytest.raises(BundleError, match=says):
        check_bundle(zipped(files))


def test_a_second_project_file_and_another_manifest_are_refused():
    made = io.BytesIO(zipped({PROJECT: table()}))
    with (
        zipfile.ZipFile(made, "a") as archive,
        pytest.warns(UserWarning, match="Duplicate name"),
    ):
        archive.writestr(PROJECT, other_component())
    with pytest.raises(BundleError, match="holds"):
        check_bundle(made.getvalue())
    with pytest.raises(BundleError, match="is not that of its"):
        check_bundle(zipped({PROJECT: table()}, manifest=b"evil.py,00,0"))


def test_a_name_that_ends_before_its_end_is_refused():
    """A reader that stops at a zero byte, and one that does not, would see different files."""
    made = zipped({PROJECT: table(), PROJECT + "X": b""}, manifest=b"")
    cut = made.replace(f"{PROJECT}X".encode(), f"{PROJECT}\0".encode())
    assert cut != made
    with pytest.raises(BundleError, match=r"holds 'pyproject.toml', 'pyproject.toml\\x00'"):
        check_bundle(cut)


@pytest.mark.parametrize("content", [b"", b"no zip file", bytes(70_000)])
def test_what_is_no_bundle_is_refused(content):
    with pytest.raises(BundleError):
        check_bundle(content)


def test_a_bundle_with_one_flipped_bit_is_refused_or_the_same():
    """Bits that no reader of a zip file looks at, such as dates, may differ."""
    good, refused = zipped({PROJECT: table()}), 0
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 1
        try:
            check_bundle(bytes(bad))
        except BundleError:
            refused += 1
    assert refused > len(good) // 2


def test_the_names_that_a_server_chose_are_shortened_and_quoted():
    files = {f"\x1b]0;title{i}" + "x" * 300: b"" for i in range(9)}
    with pytest.raises(BundleError) as caught:
        check_bundle(zipped(files))
    assert "\x1b" not in str(caught.value)
    assert "and 5 more" in str(caught.value)
    assert len(str(caught.value)) < 1000
