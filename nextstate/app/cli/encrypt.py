"""`nextstate encrypt`: encrypts the state folder, changes its key, or takes the encryption away."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextstate.app.cli.common import add_command

if TYPE_CHECKING:
    from nextstate.config import StoreConfig
    from nextstate.store.encryption import Encryption
    from nextstate.store_key import StoreKey

_EPILOG = """\
End `nextstate up` first. The key is looked for in NEXTSTATE_STORE_KEY, in the file that
NEXTSTATE_STORE_KEY_FILE names, in systemd's credential nextstate-store-key and in the keyring. Keep
a copy of it: without it nobody can read the store again. It must not lie in the state folder. A
change that was interrupted goes on when the command is given again.

examples:
  nextstate encrypt --key-file /media/usb/store.key            with a new key, in a new file
  nextstate encrypt                                            with the key of the environment
  nextstate encrypt --rotate --key-file /media/usb/new.key     another key opens it, at once
  nextstate encrypt --rotate                                   everything is encrypted anew
  nextstate encrypt --off                                      as it was before
"""


def add(subparsers: Any) -> None:
    text = "encrypt the state folder, or change its key"
    parser = add_command(subparsers, "encrypt", run, text)
    parser.epilog = _EPILOG
    which = parser.add_mutually_exclusive_group()
    text = "with --key-file another key opens the store; without it, everything is encrypted anew"
    which.add_argument("--rotate", action="store_true", help=text)
    which.add_argument("--off", action="store_true", help="take the encryption away")
    text = "the new key; the file is made if it is not there"
    parser.add_argument("--key-file", type=Path, metavar="FILE", help=text)


def run(args: argparse.Namespace) -> int:

    from learner.folders import remove_drafts
    from nextstate.app.progress import progress
    from nextstate.app.settings import Settings
    from nextstate.app.trained_judge import judges_lock
    from nextstate.sealed_files import change_files
    from nextstate.store import Store
    from nextstate.store_key import FILE_VARIABLE, find_store_key

    settings = Settings.read(args.config)
    config = settings.store
    # A judge that is being trained would be saved as it was when its training began.
    with Store.encryption(config) as encryption, judges_lock(settings):
        remove_drafts(config.path)
        key = None if args.key_file is None else _key_given(args, config)
        if encryption.is_interrupted:
            print("a change was interrupted: it goes on")
        elif not _begin(encryption, config, args):
            return 0
        elif not (args.rotate or args.off):
            key = key or _key_given(args, config)
            encryption.turn_on(key)
        with progress() as step:
            encryption.go_on(
                key,
                partial(step, "rows"),
                lambda source, target: change_files(config.path, source, target),
            )
        is_on = encryption.is_on
    print(f"{config.path} is {'encrypted' if is_on else 'not encrypted any more'}")
    if is_on and find_store_key(config.path) is None:
        print(f"set {FILE_VARIABLE}={args.key_file} wherever nextstate runs")
    return 0


def _begin(encryption: Encryption, config: StoreConfig, args: argparse.Namespace) -> bool:
    """Whether every row shall be changed. Raises ConfigError."""
    from nextstate.errors import ConfigError
    from nextstate.store_key import FILE_VARIABLE

    if not encryption.is_on:
        if args.rotate or args.off:
            raise ConfigError(f"{config.path} is not encrypted: `nextstate encrypt` does that")
        return True
    if args.off:
        encryption.turn_off()
        return True
    if not args.rotate:
        raise ConfigError(
            f"{config.path} is encrypted already: --rotate changes its key, --off ends it"
        )
    if args.key_file is None:
        encryption.change_data_key()
        return True
    encryption.change_key(_key_given(args, config))
    print(f"from now on only the key in {args.key_file} opens {config.path}")
    print(f"set {FILE_VARIABLE}={args.key_file} wherever nextstate runs")
    return False


def _key_given(args: argparse.Namespace, config: StoreConfig) -> StoreKey:
    """The key that the store shall have. Raises ConfigError."""
    from nextstate.errors import ConfigError
    from nextstate.store_key import HOW, find_store_key, make_key_file, read_key_file

    if args.key_file is not None:
        file = args.key_file.expanduser().absolute()
        if file.exists():
            return read_key_file(file, config.path, "--key-file")
        return make_key_file(file, config.path)
    key = find_store_key(config.path)
    if key is None:
        raise ConfigError(
            f"no key is given: `nextstate encrypt --key-file FILE` makes one, or {HOW}"
        )
    return key
