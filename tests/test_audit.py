"""The audit finds what it is for: wrong pins, known holes, committed secrets."""

from importlib.metadata import Distribution, distributions
from pathlib import Path

import pytest

from scripts.audit import (
    ADVISORIES,
    PINS,
    Snapshot,
    check_advisories,
    check_installed,
    check_secrets,
    concerns,
    look_up,
    read_pins,
    read_snapshot,
)


def pins() -> dict[str, str]:
    return read_pins(PINS.read_text(encoding="utf-8"))


def secrets() -> dict[str, str]:
    """Made up, and put together here, so that this file itself holds none."""
    return {
        "AWS": "aws_id = '" + "AKIA" + "Z7QK3WXM5TR2NB4C" + "'",
        "Private Key": "-----BEGIN " + "RSA PRIVATE KEY-----",
        "GitHub Token": "token: " + "ghp_" + "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8",
        "JSON Web Token": ".".join(
            ["eyJhbGciOiJIUzI1NiJ9", "eyJzdWIiOiIxMjM0NTY3ODkwIn0", "c2lnbmF0dXJlc2lnbmF0dXJl"]
        ),
        "Slack Token": "xox" + "b-123456789012-1234567890123-" + "a1B2c3D4e5F6g7H8i9J0k1L2",
    }


@pytest.mark.parametrize("kind", secrets())
def test_a_planted_secret_is_found(kind: str, tmp_path: Path):
    clean, dirty = tmp_path / "clean.py", tmp_path / "dirty.py"
    clean.write_text(
        "digest = '9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08'\n"
    )
    dirty.write_text(f"# a line\n{secrets()[kind]}\n")
    assert list(check_secrets([clean])) == []
    (found, *_) = check_secrets([dirty])
    assert found.startswith(f"{dirty}:2: {kind}")


def test_a_package_that_is_not_pinned_is_told():
    installed = list(distributions())
    assert list(check_installed(pins(), installed)) == []
    less = {name: version for name, version in pins().items() if name != "numpy"}
    (problem,) = check_installed(less, installed)
    assert problem.startswith("numpy ")
    assert "not in constraints.txt" in problem
    (problem,) = check_installed({**pins(), "numpy": "1.0"}, installed)
    assert "1.0 in constraints.txt" in problem


def test_what_a_pinned_package_demands_exactly_is_pinned_by_it():
    installed = list(distributions())
    name = "pydantic-core"  # pydantic demands one version of it
    less = {key: version for key, version in pins().items() if key != name}
    assert list(check_installed(less, installed)) == []


def test_a_pin_that_nothing_needs_is_told():
    installed: list[Distribution] = list(distributions())
    (problem,) = check_installed({**pins(), "left-pad": "1.0"}, installed)
    assert problem.startswith("left-pad is pinned, and nothing needs it")


def test_every_pin_was_looked_up():
    snapshot = read_snapshot(ADVISORIES)
    assert list(check_advisories(pins(), snapshot)) == []
    (problem,) = check_advisories({**pins(), "numpy": "99.0"}, snapshot)
    assert "numpy 99.0 was never looked up" in problem


def advisory(*events: dict[str, str], **more: object) -> dict[str, object]:
    package = {"name": "Some_Package", "ecosystem": "PyPI"}
    ranges = [{"type": "ECOSYSTEM", "events": list(events)}]
    return {"id": "X", "affected": [{"package": package, "ranges": ranges, **more}]}


@pytest.mark.parametrize(
    ("version", "wanted"),
    [("0.9", False), ("1.0", True), ("1.9.1", True), ("2.0", False), ("3.0", True), ("3.5", True)],
)
def test_ranges_of_an_advisory(version: str, wanted: bool):
    found = advisory({"introduced": "1.0"}, {"fixed": "2.0"}, {"introduced": "3.0"})
    assert concerns(found, "some-package", version) == wanted
    assert not concerns(found, "another", version)
    assert not concerns({**found, "withdrawn": "2024-01-01"}, "some-package", version)


def test_the_last_affected_version_is_affected():
    found = advisory({"introduced": "0"}, {"last_affected": "1.5"})
    assert concerns(found, "some-package", "1.5")
    assert not concerns(found, "some-package", "1.6")
    assert concerns(advisory(versions=["7.0"]), "some-package", "7.0")


def test_what_was_found_must_be_accepted_with_a_reason(tmp_path: Path):
    folder = tmp_path / "vulns" / "some-package"
    folder.mkdir(parents=True)
    (folder / "PYSEC-1.yaml").write_text(
        "id: PYSEC-1\ndetails: a hole\naffected:\n- package: {name: some-package}\n"
        "  ranges: [{type: ECOSYSTEM, events: [{introduced: '0'}]}]\n"
    )
    import subprocess

    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    held = {"some-package": "1.0"}
    snapshot = look_up(held, tmp_path, {})
    (problem,) = check_advisories(held, snapshot)
    assert "PYSEC-1: a hole" in problem
    again = look_up(held, tmp_path, {"PYSEC-1": "that part is not used", "OLD": "gone"})
    assert again.accepted == {"PYSEC-1": "that part is not used"}
    assert list(check_advisories(held, again)) == []
    stale = Snapshot(looked_up=held, accepted={"OLD": "gone"})
    assert "concerns nothing any more" in next(iter(check_advisories(held, stale)))
