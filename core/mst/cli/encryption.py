"""`mst data keygen|encrypt|decrypt|rekey|verify`: data that lies on disk encrypted."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mst.cli.keys import add_key_options, ring_given
from mst.errors import EncryptionError, UsageError

if TYPE_CHECKING:
    from mst.seal.container.reader import SealedFile
    from mst.seal.container.writer import Wrap
    from mst.seal.keys.ring import KeyRing

ACTIONS = ("keygen", "encrypt", "decrypt", "rekey", "verify")


def add_arguments(actions: Any) -> None:
    """Add the actions of encryption and their options."""
    each = actions.add_parser("keygen", help="make a key file", allow_abbrev=False)
    where = each.add_mutually_exclusive_group(required=True)
    where.add_argument("--key-file", metavar="FILE", help="written, mode 0400")
    where.add_argument("--pkcs11", metavar="URI", help="made on that token, which never shows it")

    each = actions.add_parser("encrypt", help="write an encrypted copy", allow_abbrev=False)
    each.add_argument("path", metavar="FILE", help="data file; it is left as it is")
    _add_output(each, "default: FILE.mst")
    _add_new_keys(each, "")
    each.add_argument("--suite", default="AES-256-GCM", choices=("AES-256-GCM", "SM4-GCM"))

    each = actions.add_parser("decrypt", help="write a plain copy", allow_abbrev=False)
    each.add_argument("path", metavar="FILE", help="encrypted file; it is left as it is")
    _add_output(each, "default: FILE without .mst")
    add_key_options(each)

    each = actions.add_parser(
        "rekey", help="change which keys open a file; its data stay as they are", allow_abbrev=False
    )
    each.add_argument("path", metavar="FILE", help="encrypted file; replaced at once")
    _add_output(each, "write a copy there instead")
    add_key_options(each)
    _add_new_keys(each, "new-")
    each.add_argument("--add", action="store_true", help="keep the keys that open it today")

    each = actions.add_parser(
        "verify", help="check every byte of an encrypted file", allow_abbrev=False
    )
    each.add_argument("path", metavar="FILE", help="encrypted file")
    add_key_options(each)


def _add_output(parser: argparse.ArgumentParser, words: str) -> None:
    parser.add_argument("--output", metavar="FILE", help=f"{words}; never replaced")


def _add_new_keys(parser: argparse.ArgumentParser, new: str) -> None:
    parser.add_argument(
        f"--{new}key-file", nargs="+", default=[], dest="new_key_file", metavar="FILE",
        help="each opens it; made by mst data keygen",
    )  # fmt: skip
    parser.add_argument(
        f"--{new}passphrase", action="store_true", dest="new_passphrase",
        help="asked for at the terminal, twice",
    )  # fmt: skip
    parser.add_argument(
        f"--{new}passphrase-file", dest="new_passphrase_file", metavar="FILE",
        help="a file of yours, or /dev/fd/N",
    )  # fmt: skip
    parser.add_argument(
        f"--{new}systemd-creds", action="store_true", dest="new_credential",
        help="a key that opens on this machine alone",
    )  # fmt: skip
    parser.add_argument(
        f"--{new}pkcs11", dest="new_pkcs11", metavar="URI",
        help="a key on a token: pkcs11:token=LABEL;object=KEY",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Do one action; return 0."""
    doing = {
        "keygen": _keygen,
        "encrypt": _encrypt,
        "decrypt": _decrypt,
        "rekey": _rekey,
        "verify": _verify,
    }
    doing[args.action](args)
    return 0


def _keygen(args: argparse.Namespace) -> None:
    from mst.seal.keys.key_file import make_key_file
    from mst.seal.keys.token import make_on_token, token_key

    if args.pkcs11 is not None:
        print(f"key     {make_on_token(token_key(args.pkcs11))}: it never leaves the token")
        print("Let a second key open what it encrypts: who loses the token loses the data.")
        return
    path = Path(args.key_file).expanduser()
    name = make_key_file(path)
    print(f"key     {name}, in {path}, readable by you alone")
    print(
        "Keep a copy where this disk's end doesn't reach it: nothing else opens what it encrypts."
    )


def _encrypt(args: argparse.Namespace) -> None:
    from mst.data.compressed import COMPRESSIONS
    from mst.data.records import ACCEPTED_SUFFIXES, kind_of
    from mst.seal.container.layout import MAGIC, SUFFIX
    from mst.seal.container.output import refuse_existing, whole_file
    from mst.seal.container.writer import encrypt

    path = Path(args.path).expanduser()
    output = Path(args.output or f"{path}{SUFFIX}").expanduser()
    if kind_of(path) is None:
        raise UsageError(
            f"mst data encrypt {path}: its suffix is not one of {ACCEPTED_SUFFIXES}. Rename it to"
            " the suffix of what it holds."
        )
    suffixes = [each.lower() for each in path.suffixes]
    ending = "".join(suffixes[-2 if suffixes[-1] in COMPRESSIONS else -1 :])
    refuse_existing(output)
    try:
        source = path.open("rb")
    except OSError as error:
        raise EncryptionError(
            f"{path} could not be read: {error.strerror}. Check the path."
        ) from None
    with source:
        start = source.read(len(MAGIC))
        if not start:
            raise EncryptionError(
                f"{path} is empty: there is nothing to encrypt. Pass another file."
            )
        if start == MAGIC:
            raise EncryptionError(
                f"{path} is encrypted already; it only lacks the suffix {SUFFIX}. To change who"
                " can open it, use `mst data rekey`."
            )
        source.seek(0)
        ways = _new_ways(args, str(path))
        with whole_file(output) as target:
            written = encrypt(source, target, ending, ways, args.suite)
    rows = f", {written.rows} lines or records indexed" if written.rows else ""
    print(f"wrote   {output}: {written.plain_bytes} bytes in {args.suite}{rows}")
    print(f"{path} is still there, unencrypted. Removing it doesn't erase it from the disk: an")
    print("encrypted disk, or one that is destroyed, does.")


def _new_ways(args: argparse.Namespace, name: str, kept: bool = False) -> tuple[Wrap, ...]:
    """Return the ways that the options name."""
    from mst.seal.keys import wrapping
    from mst.seal.keys.key_file import read_key_file
    from mst.seal.keys.passphrase import ask_passphrase, read_passphrase
    from mst.seal.keys.token import token_key

    ways: list[Wrap] = [
        wrapping.KeyFileWay(read_key_file(Path(each).expanduser())) for each in args.new_key_file
    ]
    if args.new_passphrase_file is not None:
        phrase = read_passphrase(Path(args.new_passphrase_file).expanduser())
        ways.append(wrapping.PassphraseWay(phrase))
    if args.new_passphrase:
        ways.append(wrapping.PassphraseWay(ask_passphrase(name, new=True)))
    if args.new_credential:
        ways.append(wrapping.CredentialWay())
    if args.new_pkcs11 is not None:
        ways.append(wrapping.TokenWay(token_key(args.new_pkcs11)))
    if not kept:
        wrapping.refuse_none(tuple(ways))
    return tuple(ways)


def _opened(args: argparse.Namespace) -> tuple[KeyRing, SealedFile]:
    ring = ring_given(args)
    return ring, ring.open(Path(args.path).expanduser())


def _decrypt(args: argparse.Namespace) -> None:
    from mst.seal.container.layout import SUFFIX
    from mst.seal.container.output import refuse_existing, whole_file

    path = Path(args.path).expanduser()
    if args.output is None and path.suffix != SUFFIX:
        raise UsageError(f"mst data decrypt {path}: say where to, with --output FILE.")
    output = Path(args.output).expanduser() if args.output else path.with_suffix("")
    refuse_existing(output)
    _, sealed = _opened(args)
    with sealed:
        sealed.verify()
        with whole_file(output) as target:
            for number in range(sealed.count):
                target.write(sealed.segment(number))
    print(f"wrote   {output}, unencrypted, readable by you alone")


def _rekey(args: argparse.Namespace) -> None:
    from mst.seal.container.output import refuse_existing, whole_file
    from mst.seal.container.writer import rewrap
    from mst.seal.keys.wrapping import described

    path = Path(args.path).expanduser()
    output = Path(args.output).expanduser() if args.output else path
    if args.output:
        refuse_existing(output)
    _, sealed = _opened(args)
    with sealed:
        sealed.verify()
        front, key = sealed.front, sealed.data_key
        new = tuple(
            way.wrap(key, front.header.salt) for way in _new_ways(args, str(path), kept=args.add)
        )
        wrappings = (*(front.wrappings if args.add else ()), *new)
        with path.open("rb") as source, whole_file(output, replaces=not args.output) as target:
            rewrap(source, target, front, key, wrappings)
    print(f"wrote   {output}; it opens with: {', '.join(map(described, wrappings))}")
    if not args.add:
        print("Copies made before open with the old keys, and so does what was read with them.")


def _verify(args: argparse.Namespace) -> None:
    from mst.seal.keys.wrapping import described

    ring, sealed = _opened(args)
    with sealed:
        digest = sealed.verify()
        header = sealed.front.header
        ways = ", ".join(map(described, sealed.front.wrappings))
        print(f"whole   {sealed.path}: every byte is as it was written")
        print(f"holds   {header.plain_bytes} bytes of {header.ending}, in {header.suite}")
        print(f"opens   with {ways}; opened with {ring.way_to(sealed)}")
        print(f"sha256  {digest}")
