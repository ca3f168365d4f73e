"""What is in an image, as CycloneDX 1.6: `python3 docker/sbom.py IMAGE > image.cdx.json`. Needs Docker, nothing else.

Read from the image itself: Debian's package list, the metadata of installed Python packages, and the modules that Go
wrote into its programs. Two runs on one image give the same document.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
import uuid
from collections.abc import Iterator
from email.parser import BytesHeaderParser
from typing import IO, Any

GO_PROGRAMS = ("usr/local/bin/minio",)
GO_MODULE = re.compile(rb"(?:mod|dep)\t([^\t\n]+)\t(v[^\t\n]+)")


def main() -> None:
    image = sys.argv[1]
    facts = json.loads(_docker("image", "inspect", image))[0]
    container = _docker("create", "--network=none", image).decode().strip()
    try:
        exported = subprocess.Popen(["docker", "export", container], stdout=subprocess.PIPE)
        assert exported.stdout is not None
        found = sorted(set(_components(exported.stdout)))
        if exported.wait():
            sys.exit(f"{image} cannot be exported")
    finally:
        _docker("rm", container)
    labels = facts["Config"].get("Labels") or {}
    json.dump(_document(image, facts["Id"], labels, found), sys.stdout, indent=1)


def _components(stream: IO[bytes]) -> Iterator[tuple[str, str, str]]:
    """Kind, name and version of each package in an image's file system."""
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        for entry in tar:
            file = tar.extractfile(entry) if entry.isfile() and _speaks(entry.name) else None
            if file is None:
                continue
            if entry.name == "var/lib/dpkg/status":
                for paragraph in file.read().split(b"\n\n"):
                    package = BytesHeaderParser().parsebytes(paragraph)
                    if "installed" in (package["Status"] or ""):
                        yield "deb/debian", package["Package"], package["Version"]
            elif entry.name.endswith(".dist-info/METADATA"):
                package = BytesHeaderParser().parsebytes(file.read())
                yield "pypi", re.sub(r"[-_.]+", "-", package["Name"]).lower(), package["Version"]
            else:
                for name, version in GO_MODULE.findall(file.read()):
                    yield "golang", name.decode(), version.decode()


def _speaks(name: str) -> bool:
    return name == "var/lib/dpkg/status" or name.endswith(".dist-info/METADATA") or name in GO_PROGRAMS


def _document(image: str, digest: str, labels: dict[str, str], found: list[tuple[str, str, str]]) -> dict[str, Any]:
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, digest)}",
        "version": 1,
        "metadata": {
            "component": {
                "type": "container",
                "bom-ref": image,
                "name": labels.get("org.opencontainers.image.title", image),
                "version": labels.get("org.opencontainers.image.version", ""),
                "properties": [
                    {"name": "revision", "value": labels.get("org.opencontainers.image.revision", "")},
                    {"name": "image", "value": digest},
                ],
            }
        },
        "components": [
            {
                "type": "library",
                "bom-ref": f"pkg:{kind}/{name}@{version}",
                "name": name,
                "version": version,
                "purl": f"pkg:{kind}/{name}@{version}",
            }
            for kind, name, version in found
        ],
    }


def _docker(*words: str) -> bytes:
    return subprocess.run(["docker", *words], check=True, stdout=subprocess.PIPE).stdout


if __name__ == "__main__":
    main()
