"""Writes a wheel of a folder: python3 wheel.py FOLDER OUT NAME VERSION TAG REQUIRES... (each `extra:requirement`)."""

import base64
import hashlib
import sys
import zipfile
from pathlib import Path

folder, out, name, version, tag, *requires = sys.argv[1:]
folder, out = Path(folder), Path(out)
info = f"{name}-{version}.dist-info"
readme = (folder / "README.md").read_text()

extras = [entry.split(":", 1) for entry in requires]
metadata = [
    "Metadata-Version: 2.1",
    f"Name: {name}",
    f"Version: {version}",
    "Summary: GGUF models with a KV cache that shrinks where it can: a program, and llama-cpp-python on a small cache",
    "License: MIT",
    "Requires-Python: >=3.8",
    *(f"Provides-Extra: {extra}" for extra in sorted({extra for extra, _ in extras})),
    *(f'Requires-Dist: {requirement}; extra == "{extra}"' for extra, requirement in extras),
    "Description-Content-Type: text/markdown",
    "",
    readme,
]
meta = {
    f"{info}/METADATA": "\n".join(metadata),
    f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: simlayer\nRoot-Is-Purelib: false\nTag: {tag}\n",
    f"{info}/entry_points.txt": f"[console_scripts]\nsimlayer-run = {name}:main\n",
}

records = []
path = out / f"{name}-{version}-{tag}.whl"
with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:

    def add(inner, data, mode=0o644):
        entry = zipfile.ZipInfo(inner, (2020, 1, 1, 0, 0, 0))
        entry.compress_type = zipfile.ZIP_DEFLATED
        entry.external_attr = (0o100000 | mode) << 16
        wheel.writestr(entry, data)
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        records.append(f"{inner},sha256={digest},{len(data)}")

    for file in sorted((folder / name).rglob("*")):
        if file.is_file():
            mode = 0o755 if file.stat().st_mode & 0o111 else 0o644
            add(file.relative_to(folder).as_posix(), file.read_bytes(), mode)
    for inner, text in meta.items():
        add(inner, text.encode())
    for terms in ("LICENSE", "THIRD-PARTY"):
        add(f"{info}/licenses/{terms}", (folder / terms).read_bytes())
    records.append(f"{info}/RECORD,,")
    wheel.writestr(f"{info}/RECORD", "\n".join(records) + "\n")
print(path)
