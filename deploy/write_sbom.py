"""Write sbom.cdx.json next to this file: the packages of requirements.lock, in CycloneDX.

Reads what `cyclonedx-py environment` found in the environment that the lock was made from, and
keeps what is the same on every machine: names, versions, licences, and what requires what. Left
out: pip, the links that packages declare, and which build of torch it was, which differs by index.

    cyclonedx-py environment --pyproject pyproject.toml PYTHON | python deploy/write_sbom.py
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

HERE = Path(__file__).parent
SBOM = HERE / "sbom.cdx.json"
LOCK = HERE.parent / "requirements.lock"
KEPT = ("type", "name", "version", "licenses")


def normal(name: str) -> str:
    """A package's name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def of_lock(found: dict[str, Any], lock: dict[str, str]) -> dict[str, Any]:
    """The lock's part of what was found."""
    refs = {found["metadata"]["component"]["bom-ref"]: "silotune"}
    components: list[dict[str, Any]] = []
    for own in found["components"]:
        own["version"] = own["version"].partition("+")[0]
        name = normal(own["name"])
        if name in lock and own["version"] != lock[name]:
            sys.exit(f"{name} is {own['version']} in the environment, {lock[name]} in {LOCK.name}")
        if name in lock:
            ref = refs[own["bom-ref"]] = f"pkg:pypi/{name}@{own['version']}"
            kept = {key: own[key] for key in KEPT if key in own}
            components.append({**kept, "purl": ref, "bom-ref": ref})
    if missing := lock.keys() - {normal(own["name"]) for own in components}:
        sys.exit(f"not in the environment: {', '.join(sorted(missing))}")
    needs = [
        {
            "ref": refs[own["ref"]],
            "dependsOn": sorted({refs[r] for r in own.get("dependsOn", ()) if r in refs}),
        }
        for own in found["dependencies"]
        if own["ref"] in refs
    ]
    about = found["metadata"]
    tools = [{k: own[k] for k in KEPT if k in own} for own in about["tools"]["components"]]
    return {
        **{key: found[key] for key in ("bomFormat", "specVersion", "version")},
        "metadata": {
            "component": {**about["component"], "bom-ref": "silotune"},
            "tools": {"components": tools},
        },
        "components": sorted(components, key=lambda own: own["bom-ref"]),
        "dependencies": sorted(needs, key=lambda own: own["ref"]),
    }


def main() -> None:
    """Read from standard input, and write the file."""
    lines = (line.partition("==") for line in LOCK.read_text(encoding="utf-8").split())
    made = of_lock(json.load(sys.stdin), {normal(name): version for name, _, version in lines})
    text = json.dumps(made, indent=1, sort_keys=True) + "\n"
    judge = JsonStrictValidator(SchemaVersion.from_version(made["specVersion"]))
    if error := judge.validate_str(text):
        sys.exit(f"not a valid SBOM: {error}")
    SBOM.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
