"""Write what is derived from the chart: the manifests in k8s/, its overlay `small`, and the chart's table of values.

python infra/render_chart.py            # needs helm
python infra/render_chart.py --check    # writes nothing; exit code 1 when something is not as the chart says
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "helm/lawnwatch"
NAMESPACE = "lawnwatch"
NOTE = "# Rendered from helm/lawnwatch by `make manifests`; change the chart, not this file.\n"
KUSTOMIZATION = f"{NOTE}apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"
NAMESPACE_FILE = f"""{NOTE}apiVersion: v1
kind: Namespace
metadata:
  name: {NAMESPACE}
  labels:
    pod-security.kubernetes.io/enforce: restricted
    pod-security.kubernetes.io/warn: restricted
"""


def main() -> None:
    base = manifests()
    wanted = base | small_overlay() | {CHART / "README.md": readme()}
    links = {ROOT / "k8s" / path.name: f"base/{path.name}" for path in base}
    links.pop(ROOT / "k8s/kustomization.yaml")  # `kubectl apply -f k8s/` would take it for a resource
    there = {path for folder in ("k8s", "k8s/base", "k8s/overlays/small") for path in (ROOT / folder).glob("*.yaml")}
    stale = [path for path in there if path not in wanted and path not in links]
    stale += [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    stale += [path for path, to in links.items() if not path.is_symlink() or str(path.readlink()) != to]
    if "--check" in sys.argv:
        names = ", ".join(str(path.relative_to(ROOT)) for path in sorted(stale))
        sys.exit(f"not as the chart says: {names}; run `make manifests`" if stale else 0)
    for path in there:
        path.unlink()
    for path, text in wanted.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for path, to in links.items():
        path.symlink_to(to)
    print(f"wrote {len(wanted)} files")


def manifests() -> dict[Path, str]:
    """One file for each template, and a kustomization that lists them."""
    parts: dict[str, list[str]] = {}
    for source, text in render():
        parts.setdefault(source, []).append(text)
    base = ROOT / "k8s/base"
    files = {base / name: NOTE + "\n---\n".join(documents) + "\n" for name, documents in sorted(parts.items())}
    files[base / "00-namespace.yaml"] = NAMESPACE_FILE
    names = sorted(path.name for path in files)
    files[base / "kustomization.yaml"] = f"{KUSTOMIZATION}resources:\n" + "".join(f"  - {name}\n" for name in names)
    return files


def small_overlay() -> dict[Path, str]:
    """The objects that values-small.yaml changes, each as a patch of the one in k8s/base."""
    base = {_identity(text): text for _, text in render()}
    small = {_identity(text): text for _, text in render("--values", str(CHART / "values-small.yaml"))}
    if base.keys() != small.keys():
        sys.exit(f"a patch neither adds nor takes away an object: {sorted(base.keys() ^ small.keys())}")
    overlay = ROOT / "k8s/overlays/small"
    files = {overlay / f"{name}.yaml": f"{NOTE}{text}\n" for name, text in small.items() if text != base[name]}
    names = sorted(path.name for path in files)
    files[overlay / "kustomization.yaml"] = (
        f"{KUSTOMIZATION}# One node with 2 cores and 12 GB, as values-small.yaml: kubectl apply -k k8s/overlays/small\n"
        "resources: [../../base]\npatches:\n" + "".join(f"  - path: {name}\n" for name in names)
    )
    return files


def _identity(text: str) -> str:
    """The name of an object's file: `statefulset-mysql`."""
    kind, name = re.findall(r"^(?:kind|  name): (\S+)$", text, re.MULTILINE)[:2]
    return f"{kind.lower()}-{name.removeprefix('lawnwatch-')}"


def render(*values: str) -> Iterator[tuple[str, str]]:
    """Name of the template and text of each object, as `kubectl apply` takes it."""
    # infra/test-servers builds one where there is none.
    helm = shutil.which("helm", path=f"{os.environ['PATH']}:{Path.home() / '.cache/lawnwatch/bin'}")
    if helm is None:
        sys.exit("helm is not installed; infra/test-servers builds it")
    rendered = subprocess.run(
        [helm, "template", "lawnwatch", str(CHART), "--namespace", NAMESPACE, "--skip-tests",
         "--kube-version", "1.34.0", "--set", "secrets.create=job", *values],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    for document in re.split(r"^---\n", rendered, flags=re.MULTILINE):
        source = re.match(r"# Source: lawnwatch/templates/(\S+)\n", document)
        if source:
            # An object of its own is only what holds more than comments.
            text = document[source.end() :].strip("\n")
            if re.search(r"^kind:", text, re.MULTILINE):
                yield source[1], _plain(text)


def _plain(document: str) -> str:
    """An object without what only Helm reads, and with the namespace that Helm would add."""
    document = re.sub(r"^ +(helm\.sh/\S+|app\.kubernetes\.io/managed-by): .*\n", "", document, flags=re.MULTILINE)
    document = re.sub(r"^( *)annotations:\n(?!\1 )", "", document, flags=re.MULTILINE)
    document = re.sub(r"[ \t]+$", "", document, flags=re.MULTILINE)
    return re.sub(r"^metadata:\n", f"metadata:\n  namespace: {NAMESPACE}\n", document, count=1, flags=re.MULTILINE)


def readme() -> str:
    """The chart's README, with a row for each value and its comment."""
    rows, path = [], [""] * 8
    for line in (CHART / "values.yaml").read_text().splitlines():
        found = re.match(r"( *)([A-Za-z]+):(?: ([^#]*?))?(?: +# (.*))?$", line)
        if found is None:
            continue
        depth, key, value, comment = len(found[1]) // 2, found[2], (found[3] or "").strip(), found[4] or ""
        path[depth] = key
        if value:
            rows.append(f"| `{'.'.join(path[: depth + 1])}` | `{value}` | {comment} |")
        elif comment:
            rows.append(f"| `{'.'.join(path[: depth + 1])}` | | {comment} |")
    return README + "\n".join(rows) + "\n"


README = """<!-- Written by `make manifests` from values.yaml. -->
# The chart

```
helm install lawnwatch ./helm/lawnwatch -n lawnwatch --create-namespace
```

brings the whole platform into an empty namespace: API, web page, Airflow, MLflow, MySQL, MinIO, Prometheus and
Alertmanager. `-f helm/lawnwatch/values-small.yaml` fits it on one node with 2 cores and 12 GB,
`-f helm/lawnwatch/values-production.yaml` leaves MySQL and S3 to a provider.
[docs/kubernetes.md](../../docs/kubernetes.md) says what differs between kinds of clusters, and how to upgrade, go back
and take it away.

A key that is not in this table is an error that names it.

## Values

| value | default | meaning |
|---|---|---|
"""


if __name__ == "__main__":
    main()
