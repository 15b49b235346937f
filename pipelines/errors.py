"""Every failure a user can meet, and the exit code it ends a verb with.

HHNetError                    1  the work itself failed
├── WorkFailed                1  a stage could not finish
├── DamagedArtifact           1  stored bytes are not what their manifest says
├── CommitConflict            1  another run published different bytes under the same name
├── UsageError                2  bad usage, configuration or input
│   ├── ConfigError           2  an unknown key or a bad value
│   ├── ReadOnlyStore         2  a store that cannot promise put-if-absent was to be written
│   ├── InputError            2  the data given cannot be used
│   └── FingerprintMismatch   2  the artifacts do not belong together
├── Unavailable               3  something outside is out of reach
│   ├── StoreUnavailable      3  the store does not answer or refuses to write
│   │   ├── StoreRefused      3  the store refuses for good: keys, rights, a missing bucket
│   │   └── CommitUnknown     3  a write may or may not have landed
│   └── ClusterUnavailable    3  Ray cannot be reached or cannot place the work
│       └── HeadLost          3  Ray's head stopped answering while the work ran
└── Degraded                  4  completed, but above the reject budget

Interrupts end with 130 (SIGINT) and 143 (SIGTERM).
"""


def format_count(number: int, noun: str) -> str:
    """Format a number with its noun: 1 worker, 12 workers."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


class HHNetError(Exception):
    """Base of all expected failures; the message is one line: what, where, what to do."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(str(message).split()))


class WorkFailed(HHNetError):
    """A stage could not finish its own work."""


class DamagedArtifact(HHNetError):
    """Stored bytes do not match the digest, size or count that was published for them.

    Messages name the damage alone, since `hhnet verify` lists many of them; the command line adds `REMEDY` once.
    """

    REMEDY = "restore the damaged bytes from a copy, or make the artifact again"


class CommitConflict(HHNetError):
    """Put-if-absent found other bytes under the same name."""


class UsageError(HHNetError):
    """The user asked for something that cannot be done."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration key is unknown or its value is out of range."""


class ReadOnlyStore(UsageError):
    """A store that cannot promise to put an object only if there is none was to be written."""


class InputError(UsageError):
    """The data that was named cannot be used."""


class FingerprintMismatch(UsageError):
    """An artifact was made from other inputs or settings than the ones at hand."""


class Unavailable(HHNetError):
    """Something outside the process cannot be reached."""

    exit_code = 3


class StoreUnavailable(Unavailable):
    """The store does not answer, or refuses the operation."""


class StoreRefused(StoreUnavailable):
    """The store refuses the operation, and will refuse it again: keys, rights, a missing bucket."""


class CommitUnknown(StoreUnavailable):
    """A write may or may not have landed; nothing may be deleted after it."""


class ClusterUnavailable(Unavailable):
    """Ray cannot be reached, or the resources asked for can never be placed."""


class HeadLost(ClusterUnavailable):
    """Ray's head stopped answering; Ray cannot be left in an orderly way any more."""


class Degraded(HHNetError):
    """The run completed, but more was rejected than the budget allows."""

    exit_code = 4


def is_out_of_reach(error: object) -> bool:
    """Tell whether the store or the cluster failed, by the exit code: a job's error has no class of its own."""
    return getattr(error, "exit_code", None) == Unavailable.exit_code


def may_heal(error: object) -> bool:
    """Tell whether another try may succeed later: something is out of reach, and does not refuse for good."""
    return is_out_of_reach(error) and not isinstance(error, StoreRefused)
