"""Whether two images hold the same: `python3 docker/compare.py IMAGE IMAGE`. Needs Docker, nothing else.

Compared are paths, kinds, modes, owners, links and contents of all files, and what the image says to run. Times are
not: they are when the build ran. Exit status 1 and a line for each path that differs.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator

# Written by Debian's tools with the time of day inside; nothing at run time reads them.
DIARIES = ("var/log/", "var/cache/ldconfig/", "etc/.pwd.lock")
# What the engine puts into each container's own copy.
ENGINE = (".dockerenv", "etc/hostname", "etc/hosts", "etc/resolv.conf", "dev/", "proc/", "sys/")


def main() -> None:
    left, right = (dict(_entries(image)) for image in sys.argv[1:3])
    differing = sorted(path for path in left.keys() | right.keys() if left.get(path) != right.get(path))
    for path in differing:
        sys.stdout.write(f"{path}\n  {left.get(path)}\n  {right.get(path)}\n")
    if differing:
        sys.exit(f"{len(differing)} of {len(left)} entries differ")
    sys.stdout.write(f"{len(left)} entries, all alike\n")


def _entries(image: str) -> Iterator[tuple[str, str]]:
    """Path and fingerprint of everything in an image's file system, and of its configuration."""
    config = json.loads(_docker("image", "inspect", image))[0]["Config"]
    said = {
        key: config.get(key) for key in ("Cmd", "Entrypoint", "Env", "ExposedPorts", "Healthcheck", "User", "Volumes")
    }
    yield "(configuration)", json.dumps(said, sort_keys=True)
    container = _docker("create", "--network=none", image).decode().strip()
    try:
        exported = subprocess.Popen(["docker", "export", container], stdout=subprocess.PIPE)
        assert exported.stdout is not None
        with tarfile.open(fileobj=exported.stdout, mode="r|") as tar:
            for entry in tar:
                if not entry.name.startswith(DIARIES + ENGINE):
                    file = tar.extractfile(entry) if entry.isreg() else None
                    content = hashlib.sha256(file.read()).hexdigest() if file else entry.linkname
                    yield entry.name, f"{entry.type.decode()} {entry.mode:o} {entry.uid}:{entry.gid} {content}"
        if exported.wait():
            sys.exit(f"{image} cannot be exported")
    finally:
        _docker("rm", container)


def _docker(*words: str) -> bytes:
    return subprocess.run(["docker", *words], check=True, stdout=subprocess.PIPE).stdout


if __name__ == "__main__":
    main()
