"""An older database is brought up to the tables of now, a newer one is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa

from nextstate.config import StoreConfig
from nextstate.errors import StoreError
from nextstate.store import Store, schema
from nextstate.store.migrations import migrate


def test_a_newer_store_is_refused_and_an_older_one_is_brought_up(tmp_path: Path) -> None:
    store = Store(StoreConfig(dir=str(tmp_path)))
    store.close()
    engine = sa.create_engine(f"sqlite:///{tmp_path}/nextstate.sqlite3")
    with engine.begin() as connection:
        migrate(
            connection,
            target=schema.VERSION + 1,
            steps={
                schema.VERSION + 1: lambda c: (
                    c.exec_driver_sql("CREATE TABLE newer (x INTEGER)") and None
                )
            },
        )
        assert sa.inspect(connection).has_table("newer")
    engine.dispose()
    with pytest.raises(StoreError, match="schema version"):
        Store(StoreConfig(dir=str(tmp_path)))
