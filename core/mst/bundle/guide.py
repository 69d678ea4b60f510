"""README.txt of a bundle: how to verify and install it, in English and in Chinese."""

from __future__ import annotations

from mst.bundle.install import SIGNATURE, SUMS
from mst.bundle.target import Target, platform_tag

_VERIFY = "sha256sum --check --quiet --strict " + SUMS
_SIGNED = f"openssl dgst -sha256 -verify KEY.pub -signature {SIGNATURE} {SUMS}"


def guide(target: Target, signed: bool) -> str:
    """Return the text.

    Args:
        target: what the bundle is for.
        signed: a signature lies in it.
    """
    python = f"python{target.python}"
    key = " --public-key KEY.pub" if signed else ""
    steps = [
        *([_SIGNED] if signed else []),
        _VERIFY,
        f"{python} install.py{key} --to /opt/mst/.venv",
    ]
    commands = "\n".join(f"    {each}" for each in steps)
    what = f"Python {target.python}, {target.device}, {platform_tag(target)}"
    english = (
        f"mst, the Multi-Silicon Trainer: a bundle for {what}\n\n"
        "In this directory, on a machine without a network:\n\n"
        f"{commands}\n\n"
        "The last command verifies every file too. Who doubts install.py itself runs those before"
        " it\nfirst"
        + (", with a public key that came by another way" if signed else "")
        + ": these are the system's own programs.\n"
    )
    chinese = (
        f"\nmst 离线安装包：{what}\n\n"
        "在没有网络的机器上，进入本目录，依次运行上面的命令。最后一条也会校验每个文件；\n"
        "若不信任 install.py 本身，请先运行前面的命令，它们只用系统自带的程序"
        + ("，公钥须另行取得" if signed else "")
        + "。\n"
    )
    return english + chinese
