"""Looks over what is installed and committed: `python -m scripts.audit`, without a network.

Packages: each is pinned exactly, in constraints.txt or by another package that demands one version
of it; each pin is needed by something; their demands on one another are met; and each pin has been
looked up in the PyPA's advisory database. An advisory that concerns one must be accepted, with a
reason, in .ci/advisories.json. Files: none that git tracks holds a key or a token.

`--database DIR` looks all pins up anew, in a clone of github.com/pypa/advisory-database, and writes
the answer to .ci/advisories.json; `make advisories` does that.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, date, datetime
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

ROOT = Path(__file__).resolve().parent.parent
PINS, ADVISORIES = ROOT / "constraints.txt", ROOT / ".ci" / "advisories.json"
OWN, EXTRAS = "gpt-train", ("dev", "hub", "track")
TOOLS = {"pip", "setuptools", "wheel"}  # that Python's venv brings
OLD_DAYS = 90
DATABASE = "https://github.com/pypa/advisory-database"
# What these find is certain enough to fail on; guesses by entropy cry wolf at every hash.
GUESSES = {"Base64HighEntropyString", "HexHighEntropyString", "KeywordDetector", "IPPublicDetector"}
Pins = Mapping[str, str]


@dataclass
class Snapshot:
    """What the database said of the pins at one time.

    Attributes:
        commit: of the database.
        date: of that commit.
        looked_up: name and version of every pin that was looked up, the names canonical.
        found: advisories that concern one of them: package, version, id, summary.
        accepted: id and reason of those that do no harm here; kept when all is looked up anew.
    """

    source: str = DATABASE
    commit: str = ""
    date: str = ""
    looked_up: dict[str, str] = field(default_factory=dict)
    found: list[dict[str, str]] = field(default_factory=list)
    accepted: dict[str, str] = field(default_factory=dict)


def main() -> int:
    """Says what is wrong, a line each; 1 if anything is."""
    parser = argparse.ArgumentParser(prog="python -m scripts.audit", description=__doc__)
    parser.add_argument("--database", type=Path, metavar="DIR", help="look up all pins anew in it")
    arguments = parser.parse_args()
    pins, snapshot = read_pins(PINS.read_text(encoding="utf-8")), read_snapshot(ADVISORIES)
    if arguments.database is not None:
        snapshot = look_up(pins, arguments.database, snapshot.accepted)
        text = json.dumps(asdict(snapshot), indent=1, ensure_ascii=False)
        ADVISORIES.write_text(text + "\n", encoding="utf-8")
    files = tracked()
    problems = [
        *check_installed(pins, list(distributions())),
        *check_demands(),
        *check_advisories(pins, snapshot),
        *check_secrets(files),
    ]
    for problem in problems:
        print(f"error: {problem}")
    age = (datetime.now(UTC).date() - date.fromisoformat(snapshot.date)).days
    if age > OLD_DAYS:
        print(f"warning: the advisories are {age} days old; look them up anew: make advisories")
    print(
        f"audit: {len(pins)} pins, advisories as of {snapshot.date}, {len(files)} files looked "
        f"through for secrets, {len(problems)} problems"
    )
    return 1 if problems else 0


def read_pins(text: str) -> dict[str, str]:
    """Name, canonical, and version of each line of a constraints file; all must be exact."""
    pins = {}
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            name, exact, version = line.strip().partition("==")
            assert exact, f"constraints.txt: {line} is no exact version"
            pins[str(canonicalize_name(name))] = version
    return pins


def read_snapshot(path: Path) -> Snapshot:
    """What was looked up last."""
    return Snapshot(**json.loads(path.read_text(encoding="utf-8")))


def check_installed(pins: Pins, installed: Sequence[Distribution]) -> Iterator[str]:
    """Whether installed and pinned are the same, and nothing is pinned that nothing needs."""
    found = {str(canonicalize_name(one.name)): one for one in installed}
    demanded = exactly_demanded(found)
    for name, one in sorted(found.items()):
        if name not in pins and one.version in demanded.get(name, ()):
            continue
        # torch's builds for one kind of machine say so behind a plus.
        if name not in TOOLS | {OWN} and pins.get(name) != Version(one.version).public:
            said = f"{pins[name]} in constraints.txt" if name in pins else "not in constraints.txt"
            yield f"{name} {one.version} is installed, and {said}"
    needed = reachable(found)
    for name in sorted(pins.keys() - needed):
        yield f"{name} is pinned, and nothing needs it; take it out of constraints.txt"


def exactly_demanded(installed: Mapping[str, Distribution]) -> dict[str, set[str]]:
    """Names and versions that other packages demand and no others: they come pinned by those.

    torch's builds for GPUs bring the libraries of CUDA so.
    """
    demanded: dict[str, set[str]] = {}
    for one in installed.values():
        for wish in map(Requirement, one.requires or []):
            for specifier in wish.specifier:
                if specifier.operator == "==" and "*" not in specifier.version:
                    name = str(canonicalize_name(wish.name))
                    demanded.setdefault(name, set()).add(specifier.version)
    return demanded


def reachable(installed: Mapping[str, Distribution]) -> set[str]:
    """All that this package needs, with its extras, and what those need, and so on."""
    needed: set[str] = set()
    left = [(OWN, extra) for extra in ("", *EXTRAS)]
    done = set()
    while left:
        name, extra = left.pop()
        if (name, extra) in done or name not in installed:
            continue
        done.add((name, extra))
        for line in installed[name].requires or []:
            wish = Requirement(line)
            if wish.marker is None or wish.marker.evaluate({"extra": extra}):
                inner = str(canonicalize_name(wish.name))
                needed.add(inner)
                left += [(inner, each) for each in ("", *wish.extras)]
    return needed


def check_demands() -> Iterator[str]:
    """Whether all packages get the versions that they ask for, as pip sees it."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "check"]
    told = subprocess.run(pip, capture_output=True, text=True, check=False)
    if told.returncode:
        yield from told.stdout.splitlines() or [told.stderr.strip()]


def check_advisories(pins: Pins, snapshot: Snapshot) -> Iterator[str]:
    """Whether each pin was looked up, and whatever was found is accepted."""
    for name, version in sorted(pins.items()):
        if snapshot.looked_up.get(name) != version:
            yield f"{name} {version} was never looked up in the advisories; make advisories"
    for one in snapshot.found:
        if pins.get(one["package"]) == one["version"] and one["id"] not in snapshot.accepted:
            yield (
                f"{one['package']} {one['version']}: {one['id']}: {one['summary']}; take another "
                f"version, or say in {ADVISORIES.name} under `accepted` why it does no harm"
            )
    for identifier in sorted(snapshot.accepted.keys() - {one["id"] for one in snapshot.found}):
        yield f"{ADVISORIES.name}: {identifier} is accepted, and concerns nothing any more"


def look_up(pins: Pins, database: Path, accepted: Mapping[str, str]) -> Snapshot:
    """Looks up each pin in a clone of the database."""
    git = ["git", "-C", str(database), "log", "-1", "--format=%H %cs"]
    commit, when = subprocess.run(git, capture_output=True, text=True, check=True).stdout.split()
    found = [
        {"package": name, "version": version, "id": one["id"], "summary": summary(one)}
        for name, version in sorted(pins.items())
        for one in advisories_of(name, database)
        if concerns(one, name, version)
    ]
    kept = {key: why for key, why in accepted.items() if key in {one["id"] for one in found}}
    return Snapshot(DATABASE, commit, when, dict(sorted(pins.items())), found, kept)


def advisories_of(name: str, database: Path) -> Iterator[dict[str, Any]]:
    """All advisories on a package."""
    for path in sorted((database / "vulns" / name).glob("*.yaml")):
        yield yaml.safe_load(path.read_text(encoding="utf-8"))


def summary(advisory: Mapping[str, Any]) -> str:
    """An advisory in a line."""
    text = str(advisory.get("summary") or advisory.get("details") or "")
    return " ".join(text.split())[:160]


def concerns(advisory: Mapping[str, Any], name: str, version: str) -> bool:
    """Whether an advisory that was not withdrawn concerns this version of the package.

    Source: the Open Source Vulnerability format, its evaluation of `versions` and `ranges`.
    """
    if "withdrawn" in advisory:
        return False
    for affected in advisory.get("affected", []):
        if canonicalize_name(affected["package"]["name"]) != name:
            continue
        if version in map(str, affected.get("versions", [])):
            return True
        ranges = [one for one in affected.get("ranges", []) if one["type"] == "ECOSYSTEM"]
        if any(_in_range(one["events"], version) for one in ranges):
            return True
    return False


def _in_range(events: Iterable[Mapping[str, str]], version: str) -> bool:
    """Whether the last event at or before a version leaves it affected."""
    here, inside = Version(version), False
    for event in sorted(events, key=_place):
        kind, at = next(iter(event.items()))
        if at != "0" and (Version(at) >= here if kind == "last_affected" else Version(at) > here):
            break
        inside = kind == "introduced"
    return inside


def _place(event: Mapping[str, str]) -> Version:
    at = next(iter(event.values()))
    try:
        return Version(at)
    except InvalidVersion:
        return Version("0")


def tracked() -> list[Path]:
    """The files of the last commit and those added since."""
    git = ["git", "-C", str(ROOT), "ls-files", "-z"]
    names = subprocess.run(git, capture_output=True, text=True, check=True).stdout
    paths = [ROOT / name for name in names.split("\0") if name]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def check_secrets(files: Iterable[Path]) -> Iterator[str]:
    """Keys and tokens in files, by detect-secrets; a line with `pragma: allowlist secret` may."""
    from detect_secrets import SecretsCollection
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
    from detect_secrets.settings import transient_settings

    kinds = {one.__name__ for one in get_mapping_from_secret_type_to_class().values()} - GUESSES
    filters = ["allowlist.is_line_allowlisted", "heuristic.is_templated_secret"]
    settings = {
        "plugins_used": [{"name": kind} for kind in sorted(kinds)],
        "filters_used": [{"path": f"detect_secrets.filters.{name}"} for name in filters],
    }
    with transient_settings(settings):
        for path in files:
            secrets = SecretsCollection()
            secrets.scan_file(str(path))
            for _, secret in secrets:
                kind = re.sub(r"\s+", " ", secret.type)
                yield f"{path}:{secret.line_number}: {kind}; take it out, and make a new one"


if __name__ == "__main__":
    sys.exit(main())
