"""The error tree: one base, one subclass per boundary crossed.

    NextStateError
    ├── ConfigError     a key of the TOML file, a command-line value, a named secret
    ├── StartError      what the machine must provide: a port, a model, a package, an engine
    ├── EngineError     vLLM answered wrongly, late or not at all
    │   ├── AnswerError      … with a status that says so
    │   └── WrongEngineError … and will until a person changes something
    ├── StoreError      the database refused or failed
    │   ├── WaitError   … but may not in a while: it is locked, or its disk is full
    │   └── NoTurnError … because it has no such turn
    ├── RecordError     a record that contradicts itself
    ├── JudgeError      a judge that could not vote
    │   └── BusyError   … but may in a moment
    ├── LearnerError    a batch or a version that must not be trained or served
    │   └── DiskError   what was trained cannot be written, for now
    ├── AdapterError    an adapter on disk that is missing, or not the one that was registered
    └── PluginError     a plugin that cannot be found or loaded

Each message names the value, what was expected, and the key or command that fixes it: the command
line prints it as it is and exits with 2.
"""


class NextStateError(Exception):
    """Base of every error that NextState raises on purpose."""


class ConfigError(NextStateError):
    """A configuration value is unknown, of the wrong kind or not allowed."""


class StartError(NextStateError):
    """A part cannot start on this machine as it is."""


class EngineError(NextStateError):
    """The inference engine failed a request that NextState itself made."""


class AnswerError(EngineError):
    """The engine answered with an error."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class WrongEngineError(EngineError):
    """What answers is not an engine that we may use: another server, or one with another key."""


class StoreError(NextStateError):
    """The database cannot do what was asked."""


class WaitError(StoreError):
    """The database cannot be used for now, and whoever asked has waited long enough."""


class NoTurnError(StoreError):
    """There is no such turn in the store."""


class RecordError(NextStateError):
    """A record contradicts itself, for example lists of unequal length."""


class JudgeError(NextStateError):
    """A judge could not give a vote; the turn is retried, never charged to the policy."""


class BusyError(JudgeError):
    """The judge's server is away, overloaded or asks to wait."""


class LearnerError(NextStateError):
    """Training or publishing must not go on."""


class DiskError(LearnerError):
    """A version cannot be kept on disk; it may work once there is room."""


class AdapterError(NextStateError):
    """An adapter's folder is missing, cannot be read or has changed."""


class PluginError(NextStateError):
    """A plugin is missing or does not have the expected form."""
