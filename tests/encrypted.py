"""Stores that are encrypted, for tests."""

from __future__ import annotations

import secrets

import pytest

from nextstate.config import StoreConfig
from nextstate.store import Store
from nextstate.store_key import VARIABLE, StoreKey


def encrypt(config: StoreConfig, monkeypatch: pytest.MonkeyPatch) -> StoreKey:
    """Encrypts a store, and gives this process its key."""
    key = StoreKey(secrets.token_bytes(32), "the test")
    monkeypatch.setenv(VARIABLE, key.key.hex())
    with Store.encryption(config) as encryption:
        encryption.turn_on(key)
        encryption.go_on(key, lambda *_: None, lambda *_: None)
    return key
