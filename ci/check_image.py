"""Run the steps of docs/deploy/Dockerfile.cpu without an engine, in a chroot of debootstrap.

`python ci/check_image.py --bundle DIR --mirror URL -- devices`, as root.
The image's steps are run one by one as the file has them, then its entry point with the arguments,
as its user and in a network namespace that has no way out. Needs debootstrap and some GiB. A
chroot gives no user namespaces, so that the jail of sealed commands is the broker there.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

DOCKERFILE = Path(__file__).resolve().parents[1] / "docs" / "deploy" / "Dockerfile.cpu"
_BIND = re.compile(r"--mount=type=bind,source=(\S+),target=(\S+)\s+")


@dataclass
class Image:
    """What the instructions so far say of how commands are run."""

    environ: dict[str, str] = field(default_factory=lambda: {"PATH": "/usr/sbin:/usr/bin:/bin"})
    user: str = "root"
    directory: str = "/"
    entry: tuple[str, ...] = ()


def instructions(text: str) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile and what they say, in order."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    parts = [line.partition(" ") for line in joined.splitlines() if line.strip()]
    return [(name, rest.strip()) for name, _, rest in parts]


def chroot(root: Path, image: Image, command: list[str], apart: bool = False) -> None:
    """Run a command in a chroot as the image would; `apart` in a network namespace of its own."""
    off = ["unshare", "--net"] if apart else []
    environ = [f"{name}={value}" for name, value in image.environ.items()]
    cd = ["sh", "-c", 'cd "$0" && exec "$@"', image.directory]
    subprocess.run(
        [
            *off,
            "chroot",
            f"--userspec={image.user}",
            str(root),
            "env",
            "-i",
            *environ,
            *cd,
            *command,
        ],
        check=True,
    )


def take(root: Path, image: Image, name: str, rest: str, bundle: Path) -> None:
    """Do one instruction."""
    if name == "RUN":
        bind = _BIND.match(rest)
        if bind is None:
            chroot(root, image, ["/bin/sh", "-c", rest])
            return
        place = root / bind[2].lstrip("/")
        place.mkdir()
        subprocess.run(["mount", "--bind", "-o", "ro", str(bundle), str(place)], check=True)
        try:
            chroot(root, image, ["/bin/sh", "-c", rest[bind.end() :]])
        finally:
            subprocess.run(["umount", str(place)], check=True)
            place.rmdir()
    elif name == "ENV":
        for each in shlex.split(rest):
            key, _, value = each.partition("=")
            image.environ[key] = value.replace("$PATH", image.environ["PATH"])
    elif name == "USER":
        image.user = rest
    elif name == "WORKDIR":
        image.directory = rest
    elif name == "ENTRYPOINT":
        image.entry = tuple(json.loads(rest))


def main() -> None:
    """Make the chroot, run the steps, then the entry point."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--bundle", required=True, type=Path, metavar="DIR")
    parser.add_argument("--mirror", required=True, metavar="URL", help="of Debian's packages")
    parser.add_argument("command", nargs="+", help="what follows `mst` in the image")
    args = parser.parse_args()
    steps = instructions(DOCKERFILE.read_text(encoding="utf-8"))
    suite = steps[0][1].removeprefix("debian:").removesuffix("-slim")
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "root"
        subprocess.run(
            ["debootstrap", "--variant=minbase", suite, str(root), args.mirror], check=True
        )
        root.chmod(0o755)
        subprocess.run(["mount", "--bind", "/proc", str(root / "proc")], check=True)
        subprocess.run(["mount", "--bind", "/dev", str(root / "dev")], check=True)
        try:
            image = Image()
            for name, rest in steps[1:]:
                print(f"{name} {rest}", flush=True)
                take(root, image, name, rest, args.bundle.resolve())
            chroot(root, image, [*image.entry, *args.command], apart=True)
        finally:
            subprocess.run(["umount", str(root / "dev"), str(root / "proc")], check=False)
    print(f"every step of {DOCKERFILE.name} ran")


if __name__ == "__main__":
    main()
