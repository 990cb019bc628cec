"""The tables. nextstate/store/migrations.py brings an older database up to them.

A column of 16 bytes that holds a text holds its hash, the key of a row of `texts`. Columns of lists
hold hashes one after the other: `turns.messages`, and runs of token ids in `turns.prompt_ids` and
`verdicts.hinted_prompt_ids`. What is sealed in an encrypted store has a type of
nextstate/store/vault.py, or is a value: `texts.stored` and `VALUES`.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy import event

from nextstate.store.vault import HexName, Name, PrefixName, Word

VERSION = 6
metadata = sa.MetaData()


def _client() -> sa.Column[Any]:
    return sa.Column("client", sa.String(60), nullable=False, default="", server_default="")


schema_version = sa.Table("schema_version", metadata, sa.Column("version", sa.Integer))

texts = sa.Table(
    "texts",
    metadata,
    sa.Column("hash", Name(16), primary_key=True),
    sa.Column("uses", sa.Integer, nullable=False),
    sa.Column("base", Name(16)),
    sa.Column("stored", sa.LargeBinary, nullable=False),
)
"""Everything that people and models wrote, each distinct text once (nextstate/store/texts.py).

`uses` counts what refers to it. A long text that is much like an earlier one is compressed against
that one, its `base`, which has no base itself."""

turns = sa.Table(
    "turns",
    metadata,
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("id", sa.String(40), nullable=False, unique=True),
    sa.Column("session", Word(200), nullable=False),
    sa.Column("idx", sa.Integer, nullable=False),
    sa.Column("kind", sa.String(8), nullable=False),
    sa.Column("lineage", sa.String(80), nullable=False),
    sa.Column("policy_version", sa.Integer),
    sa.Column("client_model", sa.String(200), nullable=False),
    sa.Column("messages", Name, nullable=False),
    sa.Column("tools", Name(16)),
    sa.Column("rest", Name(16), nullable=False),
    sa.Column("reply", Name(16), nullable=False),
    sa.Column("finish_reason", sa.String(40)),
    sa.Column("prompt_ids", Name),
    sa.Column("completion_ids", sa.LargeBinary),
    sa.Column("behaviour_logprobs", sa.LargeBinary),
    sa.Column("sampling", sa.Text, nullable=False),
    sa.Column("started_at", sa.Float, nullable=False),
    sa.Column("first_token_s", sa.Float),
    sa.Column("total_s", sa.Float, nullable=False),
    sa.Column("untrainable", sa.Text),
    sa.Column("parent", sa.String(40)),
    sa.Column("continued", sa.Boolean, nullable=False, default=False),
    sa.Column("chain_key", Name(16), nullable=False),
    sa.Column("reply_key", Name(16), nullable=False),
    sa.Column("client_session", Word(200)),
    sa.Column("place", Name(16)),
    sa.Column("replaced_by", sa.String(40)),
    sa.Column("context_key", PrefixName(32)),
    sa.Column("episode", sa.String(100)),
    sa.Column("step", sa.Integer),
    _client(),
    sa.Column("engine", sa.String(300)),
)
"""`client` is the key that sent it; empty: one that may do everything, or none was needed."""
sa.Index("turns_by_session", turns.c.session, turns.c.idx)
sa.Index("turns_by_chain", turns.c.chain_key, turns.c.seq)
sa.Index("turns_by_reply", turns.c.reply_key, turns.c.seq)


def _where_set(name: str, *columns: sa.Column[Any]) -> None:
    """An index of the rows in which its first column is set."""
    rows = columns[0].is_not(None)
    sa.Index(name, *columns, sqlite_where=rows, postgresql_where=rows)


_where_set("texts_by_base", texts.c.base)
_where_set("turns_by_client_session", turns.c.client_session, turns.c.seq)
_where_set("turns_by_place", turns.c.place)
_where_set("turns_by_context", turns.c.context_key, turns.c.seq)
_where_set("turns_by_episode", turns.c.episode, turns.c.step)

next_states = sa.Table(
    "next_states",
    metadata,
    sa.Column("turn", sa.String(40), sa.ForeignKey("turns.id"), primary_key=True),
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("source", sa.String(16), nullable=False),
    sa.Column("text", Name(16), nullable=False),
    sa.Column("trust", sa.Float, nullable=False),
)

judgements = sa.Table(
    "judgements",
    metadata,
    sa.Column("turn", sa.String(40), sa.ForeignKey("turns.id"), primary_key=True),
    sa.Column("state", sa.String(8), nullable=False),
    sa.Column("lease_until", sa.Float),
    sa.Column("not_before", sa.Float, nullable=False, default=0.0),
    sa.Column("attempts", sa.Integer, nullable=False, default=0),
    sa.Column("reason", sa.Text),
    sa.Column("task_end", sa.String(40)),
    sa.Column("seq", sa.Integer),
)
"""The judge's work: one row for each main turn that has a next state. `task_end` is the later turn
whose next state speaks about this one too, `seq` the turn's own."""
sa.Index("judgements_by_due", judgements.c.state, judgements.c.not_before, judgements.c.seq)

verdicts = sa.Table(
    "verdicts",
    metadata,
    sa.Column("turn", sa.String(40), sa.ForeignKey("turns.id"), primary_key=True),
    sa.Column("votes", sa.Text, nullable=False),
    sa.Column("score", sa.Integer, nullable=False),
    sa.Column("judge", sa.String(40), nullable=False),
    sa.Column("hint", Name(16)),
    sa.Column("hinted_prompt_ids", Name),
    sa.Column("created_at", sa.Float, nullable=False),
)

feedback = sa.Table(
    "feedback",
    metadata,
    sa.Column("turn", sa.String(40), sa.ForeignKey("turns.id"), primary_key=True),
    sa.Column("score", sa.Integer, nullable=False),
    sa.Column("hint", Name(16)),
    sa.Column("comment", Name(16)),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("updated_at", sa.Float, nullable=False),
    sa.Column("voted_score", sa.Integer),
    sa.Column("voted_judge", sa.String(40)),
    _client(),
)
"""What a person said of a turn last; with what a judge's votes, which did not know it, came to.
`client` is the key that said it, as in `turns`."""

sa.Index("feedback_by_client", feedback.c.client, feedback.c.updated_at)

reviews = sa.Table(
    "reviews",
    metadata,
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("turn", sa.String(40), sa.ForeignKey("turns.id"), nullable=False),
    _client(),
    sa.Column("score", sa.Integer, nullable=False),
    sa.Column("hint", Name(16)),
    sa.Column("comment", Name(16)),
    sa.Column("reason", sa.String(16), nullable=False),
    sa.Column("at", sa.Float, nullable=False),
)
"""Feedback that counts only once somebody accepts it (nextstate/store/reviewing.py)."""
sa.Index("reviews_by_turn", reviews.c.turn, reviews.c.client, unique=True)
sa.Index("reviews_by_client", reviews.c.client)

spending = sa.Table(
    "spending",
    metadata,
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("calls", sa.Integer, nullable=False),
    sa.Column("tokens", sa.Integer, nullable=False),
)
"""What judging has cost, and when: the judge's budget is counted from it."""
sa.Index("spending_by_time", spending.c.at)

samples = sa.Table(
    "samples",
    metadata,
    sa.Column("turn", sa.String(40), sa.ForeignKey("turns.id"), primary_key=True),
    sa.Column("lineage", sa.String(80), nullable=False),
    sa.Column("state", sa.String(8), nullable=False),
    sa.Column("policy_version", sa.Integer),
    sa.Column("score", sa.Integer, nullable=False),
    sa.Column("hinted", sa.Boolean, nullable=False),
    sa.Column("batch", sa.String(40)),
    sa.Column("trained_in", sa.Integer),
    sa.Column("reason", sa.Text),
    sa.Column("seq", sa.Integer),
    sa.Column("screened", sa.Boolean),
    sa.Column("advantage", sa.Float),
    _client(),
    sa.Column("source", sa.String(16)),
)
"""What may train. `seq` is the turn's own. `screened` is set once the learner has looked at a ready
sample and not held it out; it is NULL before, and of a sample that is held out. `advantage` is set
when the turn's group is settled, and `score` is its sign from then on; NULL for people's turns.
`client` is the key that decided what it teaches: whose feedback it is, or else who sent the turn.
`source` is the most trusted source of that (`Source`); NULL of an episode's step."""
_of_state = (samples.c.lineage, samples.c.state)
sa.Index(
    "samples_by_kind",
    *(*_of_state, samples.c.client, samples.c.policy_version, samples.c.score),
    *(samples.c.hinted, samples.c.seq),
)
sa.Index("samples_by_age", *_of_state, samples.c.screened, samples.c.seq)
sa.Index("samples_by_turn", samples.c.lineage, samples.c.seq)
_where_set("samples_by_training", samples.c.trained_in, samples.c.lineage, samples.c.seq)

groups = sa.Table(
    "groups",
    metadata,
    sa.Column("id", sa.String(100), primary_key=True),
    sa.Column("lineage", sa.String(80), nullable=False),
    sa.Column("task_key", HexName(32), nullable=False),
    sa.Column("split", sa.String(8), nullable=False),
    sa.Column("size", sa.Integer),
    sa.Column("state", sa.String(8), nullable=False),
    sa.Column("opened_at", sa.Float, nullable=False),
)
"""Episodes of one task that are compared. NULL as `size`: nobody named one."""
sa.Index("groups_by_state", groups.c.state, groups.c.split)

episodes = sa.Table(
    "episodes",
    metadata,
    sa.Column("id", sa.String(100), primary_key=True),
    sa.Column("key_hash", sa.String(40), nullable=False, unique=True),
    sa.Column("lineage", sa.String(80), nullable=False),
    sa.Column("environment", sa.String(100), nullable=False),
    sa.Column("task", Name(16), nullable=False),
    sa.Column("task_key", HexName(32), nullable=False),
    sa.Column("group_id", sa.String(100), sa.ForeignKey("groups.id")),
    sa.Column("split", sa.String(8), nullable=False),
    sa.Column("seed", sa.BigInteger),
    sa.Column("max_calls", sa.Integer),
    sa.Column("max_tokens", sa.Integer),
    sa.Column("deadline_s", sa.Float),
    sa.Column("sampling", sa.Text, nullable=False),
    sa.Column("metadata", Name(16), nullable=False),
    sa.Column("state", sa.String(8), nullable=False),
    sa.Column("status", sa.String(12)),
    sa.Column("outcome", sa.Float),
    sa.Column("opened_at", sa.Float, nullable=False),
    sa.Column("closed_at", sa.Float),
    sa.Column("version_min", sa.Integer),
    sa.Column("version_max", sa.Integer),
    sa.Column("calls", sa.Integer, nullable=False),
    sa.Column("tokens", sa.Integer, nullable=False),
    sa.Column("reason", sa.Text),
    sa.Column("version", sa.Integer),
    sa.Column("process", sa.Float),
    sa.Column("settled_at", sa.Float),
    sa.Column("opener", sa.String(100)),
    sa.Column("family", HexName(32)),
)
"""`task` and `metadata` are hashes of texts. `version` is the policy version that shall serve it,
`process` the mean process reward of its judged steps when it was settled. `opener` is the sign of
the key that opened it, NULL if it had none; of an episode without a `family` nobody knows it."""
_where_set("episodes_by_group", episodes.c.group_id)
sa.Index("episodes_by_state", episodes.c.state, episodes.c.split)
_where_set("episodes_by_settling", episodes.c.settled_at, episodes.c.lineage)

rewards = sa.Table(
    "rewards",
    metadata,
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("episode", sa.String(100), sa.ForeignKey("episodes.id"), nullable=False),
    sa.Column("turn", sa.String(40), sa.ForeignKey("turns.id")),
    sa.Column("name", sa.String(100), nullable=False),
    sa.Column("kind", sa.String(8), nullable=False),
    sa.Column("value", sa.Float, nullable=False),
    sa.Column("source", sa.String(100)),
    sa.Column("at", sa.Float, nullable=False),
)
"""One row for each name and step; NULL as `turn` stands for the whole episode."""
sa.Index("rewards_by_episode", rewards.c.episode)

versions = sa.Table(
    "versions",
    metadata,
    sa.Column("lineage", sa.String(80), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("parent", sa.Integer),
    sa.Column("path", sa.Text),
    sa.Column("sha256", sa.String(64)),
    sa.Column("samples", sa.Integer, nullable=False),
    sa.Column("state", sa.String(12), nullable=False),
    sa.Column("metrics", sa.Text, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("reason", sa.Text),
)

sa.Index("versions_by_state", versions.c.state, versions.c.lineage)

CHANGED = "nextstate_versions"
"""The channel on which PostgreSQL tells that versions may have changed: a hint that may be lost."""
for _statement in (
    "CREATE FUNCTION versions_told() RETURNS trigger LANGUAGE plpgsql AS "
    f"$$ BEGIN NOTIFY {CHANGED}; RETURN NULL; END $$",
    "CREATE TRIGGER versions_told AFTER INSERT OR UPDATE OR DELETE ON versions "
    "FOR EACH STATEMENT EXECUTE FUNCTION versions_told()",
):
    _tell = sa.DDL(_statement).execute_if(dialect="postgresql")
    event.listen(versions, "after_create", _tell)

decisions = sa.Table(
    "decisions",
    metadata,
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("lineage", sa.String(80), nullable=False),
    sa.Column("number", sa.Integer),
    sa.Column("after", sa.Integer, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("paused_by", sa.String(80)),
)
"""What people decide: version `number` shall serve; with NULL, the lineage pauses or goes on.

`after` is the newest version at that time. `paused_by` is the name of who pauses it, else NULL."""
sa.Index("decisions_by_lineage", decisions.c.lineage, decisions.c.seq)

ledger = sa.Table(
    "ledger",
    metadata,
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("kind", sa.String(12), nullable=False),
    sa.Column("content", sa.Text, nullable=False),
    sa.Column("hash", sa.LargeBinary(32), nullable=False),
)
"""What happened, in a chain of hashes (nextstate/store/ledger.py); `content` is JSON."""

counts = sa.Table(
    "counts",
    metadata,
    sa.Column("area", sa.String(12), primary_key=True),
    sa.Column("key", sa.String(160), primary_key=True),
    sa.Column("count", sa.Integer, nullable=False),
)
"""How many records there are; triggers keep it (nextstate/store/counts.py)."""

workers = sa.Table(
    "workers",
    metadata,
    sa.Column("id", sa.String(20), primary_key=True),
    sa.Column("beat", sa.Float, nullable=False),
    sa.Column("adapters", sa.Text, nullable=False),
    sa.Column("counts", sa.Text, nullable=False),
)
"""What each of several proxy workers said last."""

holds = sa.Table(
    "holds",
    metadata,
    sa.Column("call", sa.String(40), primary_key=True),
    sa.Column("episode", sa.String(100), nullable=False),
    sa.Column("worker", sa.String(20), nullable=False),
    sa.Column("tokens", sa.Integer, nullable=False),
)
"""What the calls that run may use of their episodes' tokens, where there are several workers."""
sa.Index("holds_by_episode", holds.c.episode)

keys = sa.Table(
    "keys",
    metadata,
    sa.Column("name", sa.String(40), primary_key=True),
    sa.Column("hash", sa.LargeBinary(32), nullable=False, unique=True),
    sa.Column("scopes", sa.Text, nullable=False),
    sa.Column("lineage", sa.String(80)),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("used_at", sa.Float),
    sa.Column("revoked_at", sa.Float),
)
"""The proxy's keys, by the SHA-256 of each. NULL as `lineage`: that of everybody without one."""

encryption = sa.Table(
    "encryption",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("wrapped", sa.LargeBinary),
    sa.Column("next_wrapped", sa.LargeBinary),
    sa.Column("phase", sa.String(40)),
    sa.Column("position", sa.Text),
    sa.Column("created_at", sa.Float, nullable=False),
)
"""One row if the store is encrypted, with its data key (nextstate/store/encryption.py). `phase` is
set while everything is changed from the first key to the next one; NULL as a key: not encrypted."""

VALUES = {"turns": ("completion_ids", "behaviour_logprobs", "sampling")}
"""The columns that whoever writes and reads them seals and opens, for a row by its `id`."""
roles = sa.Table(
    "roles",
    metadata,
    sa.Column("name", sa.String(120), primary_key=True),
    sa.Column("epoch", sa.Integer, nullable=False),
    sa.Column("holder", sa.String(200), nullable=False),
    sa.Column("since", sa.Float, nullable=False),
)
"""Who has a role that one process has at a time (nextstate/store/roles.py; not in SQLite), and who
holds the exams of a lineage (nextstate/store/examiners.py)."""
