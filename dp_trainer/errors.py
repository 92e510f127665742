"""Every error that this package raises on purpose.

::

    Exception
    └── DPTrainerError                  catch this for all of them
        ├── ConfigurationError          a setting or an input is wrong (also a ValueError)
        ├── UnsupportedOperationError   a model or feature has no exact, private form here
        ├── CertificateError            a measured gradient disagrees with its slow twin
        ├── PrivacyBudgetError          the step or the run would exceed its budget
        └── RunFaultError               the machine failed: a full disk, a dead worker (also a RuntimeError)

Each message names the place, the fact and the way out.
"""


class DPTrainerError(Exception):
    """The root of all errors raised on purpose by ``dp_trainer``."""


class ConfigurationError(DPTrainerError, ValueError):
    """A setting, a column, a dataset or a checkpoint is not what it must be."""


class UnsupportedOperationError(DPTrainerError):
    """The exact per-sample gradient of something the model does is not known here."""


class CertificateError(DPTrainerError):
    """Real samples showed an inexact norm, a coupling between samples, or an unbounded contribution."""


class PrivacyBudgetError(DPTrainerError):
    """Going on would spend more privacy than the run was given."""


class RunFaultError(DPTrainerError, RuntimeError):
    """The machine failed the run; what was saved before is intact, and what was spent is counted."""
