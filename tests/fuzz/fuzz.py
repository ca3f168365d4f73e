"""Coverage-guided fuzzing (atheris, libFuzzer) of what reads strangers' bytes.

    python tests/fuzz/fuzz.py pictures 60      # the decoder that ingest, training and serving share
    python tests/fuzz/fuzz.py tensors 60       # Open Inference Protocol requests
    python tests/fuzz/fuzz.py forms 60         # multipart forms

Whatever is no error of ours, a leak past the memory limit or an input that takes ten seconds ends it with a crash file.
The corpus grows in `var/fuzz/<target>` from run to run.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["lawnwatch", "PIL", "python_multipart"]):
    import numpy as np

    import serving_bundle as sb
    from lawnwatch import images
    from lawnwatch.errors import InputError
    from lawnwatch.serving import tensors, uploads


def pictures(data: bytes) -> None:
    """Decoded to what the model takes, or refused."""
    try:
        rgb = images.decode(data, size=224, max_pixels=1_000_000)
    except InputError:
        return
    assert rgb.shape == (224, 224, 3) and rgb.dtype == np.uint8
    images.thumbnail(data, width=64, height=64, max_pixels=1_000_000)


def inferences(data: bytes) -> None:
    """A request as it says, or refused; the first byte chooses where the JSON ends."""
    if not data:
        return
    length = "" if data[0] == 0 else str(len(data[1:]) * data[0] // 255)
    try:
        read = tensors.read(data[1:], length, size=2, most=4, most_json=100_000)
    except InputError:
        return
    assert 1 <= len(read.pictures) <= 4 and set(read.outputs) <= set(tensors.OUTPUTS)


def forms(data: bytes) -> None:
    """The pictures in a form, or refused."""
    try:
        found = uploads.pictures("multipart/form-data; boundary=x1x", data, most=4)
    except InputError:
        return
    assert 1 <= len(found) <= 4


def seeds(target: str) -> list[bytes]:
    """Valid inputs to begin with."""
    if target == "pictures":
        made = [
            sb.picture(sb.YELLOW, size=(17, 11), format=format, **options)
            for format, options in (
                ("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("WEBP", {"lossless": True}),
            )
        ]  # fmt: skip
    elif target == "tensors":
        raw = b'{"inputs":[{"name":"file","datatype":"BYTES","shape":[1],"parameters":{"binary_data_size":5}}]}'
        picture = b'{"inputs":[{"name":"file","datatype":"BYTES","shape":[1],"data":["AAAA"]}],"id":"a"}'
        pixels = b'{"inputs":[{"name":"image","datatype":"UINT8","shape":[1,2,2,3],"data":[1,2,3,4,5,6,7,8,9,0,1,2]}]}'
        made = [b"\0" + picture, b"\0" + pixels, b"\xf3" + raw + b"\x01\0\0\0a"]
    else:
        head = b'--x1x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        made = [head + b"ab\r\n--x1x--\r\n", head + b"ab\r\n" + head + b"cd\r\n--x1x--\r\n"]
    return made


TARGETS = {"pictures": pictures, "tensors": inferences, "forms": forms}


def main() -> None:
    target, seconds = sys.argv[1], int(sys.argv[2])
    corpus = Path("var/fuzz") / target
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds(target)):
        (corpus / f"seed{number}").write_bytes(seed)
    flags = [f"-max_total_time={seconds}", "-timeout=10", "-rss_limit_mb=1500", "-max_len=4096", "-verbosity=0"]
    flags += ["-print_final_stats=1", f"-artifact_prefix={corpus.parent}/{target}-"]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], TARGETS[target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
