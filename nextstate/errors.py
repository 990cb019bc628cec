"""The error tree: one base, one subclass per boundary crossed.

    NextStateError
    ├── ConfigError     a key of the TOML file, a command-line value, a named secret
    ├── StartError      the machine lacks a port, a model, a package or an engine
    │   ├── TakenError  a process of another machine has what this one would do
    │   └── NoRoomError an update does not fit into memory
    ├── EngineError     vLLM answered wrongly, late or not at all
    │   ├── AnswerError       it answered with an error status
    │   └── WrongEngineError  what answers is not our engine; a person must act
    ├── StoreError      the database refused or failed
    │   ├── WaitError   it is locked or its disk is full: try later
    │   ├── FencedError another process has this one's role by now
    │   ├── NoTurnError it has no such turn
    │   ├── NoEpisodeError  it has no such episode
    │   ├── NoKeyError  it has no such key
    │   ├── SealError   an encrypted value, or the key to it, is not the one that was stored
    │   └── ConflictError   it holds something else under this name
    │       └── BudgetError an episode has used up what it may
    ├── RecordError     a record contradicts itself
    ├── JudgeError      a judge could not vote
    │   └── BusyError   it is overloaded or away: try again soon
    ├── LearnerError    a batch or version must not be trained or served
    │   └── DiskError   a version cannot be written to disk for now
    ├── LostNodeError   this machine is no longer a node of its cluster: try again
    ├── LostRankError   a process of a learner of several ranks has ended or hangs: try again
    ├── RolloutError    an episode cannot go on, and not because of the policy
    │   └── RefusedError    the proxy refused its request
    ├── AdapterError    an adapter on disk is missing or has changed
    └── PluginError     a plugin cannot be found or loaded

Each message names the value, what was expected, and the key or command that fixes it: the command
line prints it as it is and exits with `EXIT_USAGE`.
"""

import os

EXIT_USAGE = 2
"""A process exits with this code when only a person can help."""
EXIT_LATER = os.EX_TEMPFAIL
"""A process exits with this code when the same command may succeed later."""


class NextStateError(Exception):
    """Base of every error that NextState raises on purpose."""


class ConfigError(NextStateError):
    """A configuration value is unknown, of the wrong kind or not allowed."""


class StartError(NextStateError):
    """A process cannot start on this machine as it is."""


class LostNodeError(NextStateError):
    """This machine is no longer a node of its cluster."""


class NoRoomError(StartError):
    """The largest possible update does not fit into memory."""


class TakenError(StartError):
    """Another machine's process does this already: this one may once that has ended."""


class EngineError(NextStateError):
    """The inference engine failed a request that NextState itself made."""


class AnswerError(EngineError):
    """The engine answered with an error."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class WrongEngineError(EngineError):
    """Another kind of server answers at the engine's address, or an engine with another key."""


class StoreError(NextStateError):
    """The database cannot do what was asked."""


class WaitError(StoreError):
    """The database stayed locked or its disk full for longer than the caller may wait."""


class FencedError(StoreError):
    """Another process has taken this one's role: it must not write any more."""


class NoTurnError(StoreError):
    """There is no such turn in the store."""


class NoEpisodeError(StoreError):
    """There is no such episode, or no such step of it, in the store."""


class NoKeyError(StoreError):
    """There is no key of such a name in the store."""


class SealError(StoreError):
    """What is encrypted cannot be read: a wrong key, or a value that was changed."""


class ConflictError(StoreError):
    """What was asked contradicts what the store holds."""


class BudgetError(ConflictError):
    """An episode may not call the model any more."""


class RecordError(NextStateError):
    """A record contradicts itself, for example lists of unequal length."""


class JudgeError(NextStateError):
    """A judge could not give a vote; the turn is retried, never charged to the policy."""


class BusyError(JudgeError):
    """The judge's server is down or overloaded, or asks to wait."""


class LearnerError(NextStateError):
    """Training or publishing must not go on."""


class DiskError(LearnerError):
    """A version cannot be written to disk; it may work once there is room."""


class LostRankError(NextStateError):
    """A process of the learner is gone; a new start goes on from the checkpoint."""


class RolloutError(NextStateError):
    """An environment, a sandbox or the proxy failed; that says nothing about the policy."""


class LateError(RolloutError):
    """An agent's program was ended at its deadline; what it has reached counts."""


class RefusedError(RolloutError):
    """The proxy answered with an error."""

    def __init__(self, message: str, status: int, kind: str) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        """The type in the answer, such as `EpisodeBudgetError`; empty if it had none."""


class AdapterError(NextStateError):
    """An adapter's folder is missing, cannot be read or has changed."""


class PluginError(NextStateError):
    """A plugin is missing or does not have the expected form."""
