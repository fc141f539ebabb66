"""Every error the project raises on purpose, as one tree.

    EngramError                     one line for people: what is wrong, the value, the limit, the flag to turn
    ├── SettingsError               a flag, environment variable or command line          exit 2
    ├── ModelError                  a backbone that cannot be loaded                      exit 3
    │   ├── UnknownModel            the name leads nowhere
    │   ├── UnsupportedModel        readable, but an architecture or type we do not serve
    │   └── BrokenModel             truncated, inconsistent, not what it says it is
    ├── PackError                   a memory pack that cannot be opened or attached       exit 4
    │   └── TableError              its table file: truncated, foreign, replaced
    ├── CapacityError               it does not fit; the message names the value that would  exit 5
    ├── RequestError                the client's request                                  HTTP 400
    │   ├── UnknownModelName        a model name this server does not serve               HTTP 404
    │   ├── BodyTooLarge            above the body limit                                  HTTP 413
    │   ├── Unauthorized            no key, or a wrong one                                HTTP 401
    │   ├── Forbidden               the key may not do this                               HTTP 403
    │   ├── SlowClient              the request did not arrive in time                    HTTP 408
    │   ├── NotFound                a thing that is not here                              HTTP 404
    │   ├── Conflict                not as things stand now                               HTTP 409
    │   └── QueueFull               above the queue's bound, or the key's own             HTTP 429
    ├── NotReady                    loading, draining, or the engine is gone              HTTP 503
    ├── RequestTimeout              the answer took longer than --request-timeout         HTTP 504
    └── StepFailed                  the engine failed while computing this request        HTTP 500

Exit codes and HTTP statuses stand on the classes: the CLI and the API read them, nobody maps them again.
"""

from __future__ import annotations


class EngramError(Exception):
    """Base of all errors raised on purpose. `str(error)` is one line for people, whatever a file's names hold."""

    exit_code: int = 1
    status: int = 500
    kind: str = "InternalServerError"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        self.message = " ".join(message.splitlines())
        super().__init__(self.message)
        self.param = param

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.param)


def _rebuild(cls: type[EngramError], message: str, param: str | None) -> EngramError:
    return cls(message, param=param)


class SettingsError(EngramError):
    exit_code = 2


class ModelError(EngramError):
    exit_code = 3


class UnknownModel(ModelError):
    pass


class UnsupportedModel(ModelError):
    pass


class BrokenModel(ModelError):
    pass


class PackError(EngramError):
    exit_code = 4


class TableError(PackError):
    pass


class CapacityError(EngramError):
    exit_code = 5


class RequestError(EngramError):
    status = 400
    kind = "BadRequestError"


class UnknownModelName(RequestError):
    status = 404
    kind = "NotFoundError"


class BodyTooLarge(RequestError):
    status = 413
    kind = "RequestEntityTooLargeError"


class Unauthorized(RequestError):
    status = 401
    kind = "AuthenticationError"


class Forbidden(RequestError):
    status = 403
    kind = "PermissionDeniedError"


class SlowClient(RequestError):
    status = 408
    kind = "RequestTimeoutError"


class NotFound(RequestError):
    status = 404
    kind = "NotFoundError"


class Conflict(RequestError):
    status = 409
    kind = "ConflictError"


class QueueFull(RequestError):
    status = 429
    kind = "RateLimitError"


class NotReady(EngramError):
    status = 503
    kind = "ServiceUnavailableError"


class RequestTimeout(EngramError):
    status = 504
    kind = "TimeoutError"


class StepFailed(EngramError):
    status = 500
    kind = "InternalServerError"
